"""Batches of images and reference statistics in ADM's published layout.

Such an .npz file contains `arr_0` (images), `arr_1` (labels), `mu` and `sigma`, and `mu_s` and `sigma_s` for spatial
features. A string `extractor` may state the fingerprint of the feature network that the statistics come from.

Files of tens of gigabytes are streamed. Everything in a file is checked before it is used: sizes, checksums, dtypes,
shapes, and whether the statistics are a mean and a covariance. Nothing is unpickled, and nothing is extracted to disk.
A damaged or wrong file raises a ValueError that names the file and the reason.
"""

import errno
import io
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from models.metrics import Gaussian, check_semidefinite
from orchestrator import storage

CHUNK = 1 << 24  # bytes read at once
MAX_LOADED = 2 << 30  # bytes of an array that is loaded as a whole: statistics, labels, images in Fortran order
MAX_HEADER = 10_000  # characters of an npy header
ARCHIVE_ERRORS = (  # what reading a damaged archive can raise, besides ValueError and OSError
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    tokenize.TokenError,
    NotImplementedError,
    UnicodeError,
)
KEYS = ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "extractor")


@dataclass(frozen=True)
class _Member:
    """An array in the archive, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool  # in Fortran order
    header: int  # bytes of the npy header, before the data
    offset: int | None  # of the data in the file; None = compressed
    checksum: int  # CRC-32 of header and data

    @property
    def size(self) -> int:
        """Return the bytes of the data; exact for any shape, because the product is one of Python integers."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class ImageRows:
    """Function that reads a range of a file's images. It can be pickled; the copy opens the file again.

    The file stays open between calls. Compressed images can only be decompressed in order. A call continues at the end
    of the last range, or at the beginning of the file if its range starts before that.
    """

    def __init__(self, uri: str, member: _Member) -> None:
        self._uri, self._member = uri, member
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self._uri, self._member)

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images uint8 [stop - start, H, W, 3]; ValueError if the range is not within the file."""
        count, *shape = self._member.shape
        if not 0 <= start <= stop <= count:
            raise ValueError(f"{self._uri}: rows {start}..{stop} are not within its {count} images")
        image_bytes = int(np.prod(shape))
        with self._lock, _naming_errors(self._uri):
            if self._file is None:
                self._file, self._first = self._open()
            self._file.seek(self._first + start * image_bytes)
            data = self._file.read((stop - start) * image_bytes)
        if len(data) != (stop - start) * image_bytes:
            raise ValueError(f"{self._uri} is not an intact .npz file: its images end early")
        return np.frombuffer(bytearray(data), np.uint8).reshape(-1, *shape)

    def _open(self) -> tuple[IO[bytes], int]:
        """Return a seekable file and the position of the first image in it."""
        file = storage.open_input(self._uri)
        if self._member.fortran:
            with file, zipfile.ZipFile(file) as archive:
                return io.BytesIO(_load(archive, self._member).tobytes()), 0
        if self._member.offset is not None:
            return file, self._member.offset
        return zipfile.ZipFile(file).open(f"{self._member.name}.npy"), self._member.header


@dataclass(frozen=True)
class PublishedBatch:
    """The checked content of a file, with its images on demand. It can be pickled."""

    uri: str
    num_images: int  # 0 = the file contains statistics only
    labels: NDArray[np.int64] | None  # [N]; None = the file has none
    pool: Gaussian | None  # statistics of pooled features; None = the file has none
    spatial: Gaussian | None  # statistics of spatial features; None = the file has none
    images: _Member | None
    extractor: str | None = None  # fingerprint of the network behind the statistics, if the file states one

    @property
    def checksum(self) -> int:
        """Return the CRC-32 of the stored images, or 0 if there are none."""
        return self.images.checksum if self.images else 0

    @cached_property
    def rows(self) -> ImageRows:
        """Return the function that reads a range of the images."""
        if self.images is None:
            raise ValueError(f"{self.uri} has statistics but no images (arr_0)")
        return ImageRows(self.uri, self.images)


def open_batch(uri: str) -> PublishedBatch:
    """Check a published .npz file and return its content.

    This reads the whole file once, for the checksums, in constant memory. Other keys than those of the layout are
    ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, its images are not uint8 [N, H, W, 3], it does not have one label for each
            image, or its statistics are not a mean and a covariance.
    """
    with _naming_errors(uri), storage.open_input(uri) as file, zipfile.ZipFile(file) as archive:
        members = _members(archive, file)
        if not {"arr_0", "mu"} & set(members):
            raise ValueError(
                f"it has neither 'arr_0' (images) nor 'mu' (statistics), but {_file_names(archive)}; save it in the "
                "layout of numpy.savez('images.npz', images)"
            )
        images = members.get("arr_0")
        if images:
            _check_images(images)
        count = images.shape[0] if images else 0
        labels = _labels(archive, members["arr_1"], count) if "arr_1" in members else None
        pool, spatial = (_statistics(archive, members, *keys) for keys in (("mu", "sigma"), ("mu_s", "sigma_s")))
        extractor = _string(archive, members["extractor"]) if "extractor" in members else None
        for name in members:
            _check_checksum(archive, name)
    return PublishedBatch(uri, count, labels, pool, spatial, images, extractor)


@contextmanager
def _naming_errors(uri: str) -> Iterator[None]:
    """Convert the errors of a damaged or wrong archive to a ValueError that names the file."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"{uri} is not an intact .npz file: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a seek to an impossible position raises
            raise
        raise ValueError(f"{uri} is not an intact .npz file: it points outside itself") from error
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from error


def _file_names(archive: zipfile.ZipFile) -> str:
    """Return the names of the first 20 files in the archive, for error messages."""
    return ", ".join(sorted(info.filename for info in archive.infolist())[:20]) or "no arrays"


def _members(archive: zipfile.ZipFile, file: IO[bytes]) -> dict[str, _Member]:
    """Return the arrays of the layout by name.

    Raises:
        ValueError: an array is stored twice, is encrypted, or has a header that contradicts its stored size.
    """
    members: dict[str, _Member] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name not in KEYS or name == info.filename:
            continue
        if name in members:
            raise ValueError(f"it contains {info.filename!r} twice")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{info.filename} is encrypted or compressed by an unknown method; save it with numpy.savez or "
                "numpy.savez_compressed"
            )
        with archive.open(info) as data:
            shape, fortran, dtype = _header(data, name)
            header = data.tell()
        offset = _data_offset(file, info) + header if info.compress_type == zipfile.ZIP_STORED else None
        member = _Member(name, shape, dtype, fortran, header, offset, info.CRC)
        if header + member.size != info.file_size:
            stored = info.file_size - header
            raise ValueError(f"{name}: {shape} of {dtype} are {member.size} bytes, but {stored} bytes are stored")
        members[name] = member
    return members


def _header(data: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and dtype from an npy header of version 1, 2 or 3."""
    version = npy.read_magic(data)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name}: npy version {version} is unknown; expected 1.0, 2.0 or 3.0")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(data, max_header_size=MAX_HEADER)
    if dtype.hasobject:
        raise ValueError(f"{name}: an array of Python objects is stored as a pickle, which is never opened")
    if any(length < 0 for length in shape):
        raise ValueError(f"{name}: shape {shape} is impossible")
    return shape, fortran, dtype


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where a stored member's bytes begin: after its local header, which ends in a name and an extra field."""
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return int(info.header_offset + 30 + name_length + extra_length)


def _check_checksum(archive: zipfile.ZipFile, name: str) -> None:
    """Read a member to its end, where zipfile compares its checksum."""
    with archive.open(f"{name}.npy") as data:
        while data.read(CHUNK):
            pass


def _load(archive: zipfile.ZipFile, member: _Member) -> NDArray[Any]:
    if member.size > MAX_LOADED:
        raise ValueError(f"{member.name} has {member.size} bytes; statistics and labels have at most {MAX_LOADED}")
    with archive.open(f"{member.name}.npy") as data:
        return npy.read_array(data, allow_pickle=False, max_header_size=MAX_HEADER)


def _check_images(member: _Member) -> None:
    expected = "expected uint8 images [N, H, W, 3] with values 0..255"
    if member.dtype != np.uint8:
        raise ValueError(f"arr_0 has dtype {member.dtype}; {expected}")
    if len(member.shape) != 4 or member.shape[3] != 3 or 0 in member.shape:
        hint = " (channels come last)" if len(member.shape) == 4 and member.shape[1] == 3 else ""
        raise ValueError(f"arr_0 has shape {member.shape}; {expected}{hint}")
    if member.fortran and member.size > MAX_LOADED:
        raise ValueError(
            f"arr_0 is in Fortran order and too large to convert ({member.size} bytes); save it in C order"
        )


def _labels(archive: zipfile.ZipFile, member: _Member, num_images: int) -> NDArray[np.int64]:
    if member.dtype.kind not in "iu" or member.shape != (num_images,):
        actual = f"{member.dtype} {member.shape}"
        raise ValueError(f"arr_1 (labels) is {actual}; expected one integer for each of {num_images} images")
    labels = _load(archive, member)
    if num_images and labels.min() < 0:
        raise ValueError(f"arr_1 has labels from {labels.min()} to {labels.max()}; expected numbers from 0")
    return labels.astype(np.int64)


def _string(archive: zipfile.ZipFile, member: _Member) -> str:
    if member.dtype.kind != "U" or int(np.prod(member.shape)) != 1:
        raise ValueError(f"{member.name} is {member.dtype} {member.shape}; expected one string")
    return str(_load(archive, member).item())


def _statistics(archive: zipfile.ZipFile, members: dict[str, _Member], mean: str, covariance: str) -> Gaussian | None:
    present = [key for key in (mean, covariance) if key in members]
    if not present:
        return None
    if len(present) == 1:
        missing = covariance if mean in present else mean
        raise ValueError(f"it has {present[0]!r} but not {missing!r}; the file contains {_file_names(archive)}")
    for key in present:
        if members[key].dtype.kind != "f":
            raise ValueError(f"{key} has dtype {members[key].dtype}; expected floating point")
    try:
        statistics = Gaussian(_load(archive, members[mean]), _load(archive, members[covariance]))
        check_semidefinite(statistics)
    except ValueError as error:
        raise ValueError(f"{mean}, {covariance}: {error}") from error
    return statistics
