"""Sample and reference batches in the published layout: an .npz with `arr_0` (images), `arr_1` (labels), `mu`, `sigma`.

A string `extractor` may name the fingerprint of the feature network that `mu` and `sigma` come from.

Files of tens of gigabytes are streamed. Nothing of a file is believed before it is checked: sizes that
headers claim against sizes that are there, checksums, dtypes, shapes and the statistics' own sense. Nothing
is unpickled, and no member is written anywhere. Whatever is wrong is one ValueError that names the file and
the reason.
"""

import errno
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from models.metrics import Gaussian, check_semidefinite
from orchestrator import storage

CHUNK = 1 << 24  # bytes read at once
MAX_HELD = 2 << 30  # bytes of an array that has to be held whole: statistics, and images in Fortran order
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    tokenize.TokenError,
    NotImplementedError,
    UnicodeError,
)
MAX_HEADER = 10_000  # characters of an npy header
KEYS = ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "extractor")


@dataclass(frozen=True)
class _Member:
    """An array inside the archive, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    header: int  # bytes before its data
    offset: int | None  # of its data in the file, where it is stored plainly
    checksum: int  # CRC-32 of header and data

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclass(frozen=True)
class PublishedBatch:
    """A checked file: what it holds, and its images on demand. Plain data: it can be sent to other processes.

    `num_images` is 0 in a file of statistics alone. `pool` and `spatial` are the statistics of pooled and of
    spatial features, each None where the file has none: what needs them is then not available, and not 0.
    """

    uri: str
    num_images: int
    height: int
    width: int
    labels: NDArray[np.int64] | None
    pool: Gaussian | None
    spatial: Gaussian | None
    images: _Member | None
    extractor: str | None = None  # fingerprint of the network behind the statistics, where the file states one

    @property
    def by_range(self) -> bool:
        """Whether `rows` reads no more than it answers; otherwise the file can only be read from its start."""
        return self.images is not None and self.images.offset is not None and not self.images.fortran

    @property
    def checksum(self) -> int:
        """CRC-32 of the images as they are stored; 0 where there are none."""
        return self.images.checksum if self.images else 0

    def rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Images uint8 [stop - start, H, W, 3] of an index range.

        Direct where they are stored plainly (as `np.savez` does); a compressed file is read from its start,
        so prefer `blocks` there. Raises ValueError outside 0..num_images.
        """
        if self.images is None or not 0 <= start <= stop <= self.num_images:
            raise ValueError(f"{self.uri}: rows {start}..{stop} are not within its {self.num_images} images")
        row = self.height * self.width * 3
        if self.images.offset is None or self.images.fortran:
            parts = [block[max(start - first, 0) : stop - first] for first, block in self.blocks() if first < stop]
            return np.concatenate([part for part in parts if len(part)])
        with _reading(self.uri), storage.open_input(self.uri) as file:
            file.seek(self.images.offset + start * row)
            data = _read_exactly(file, (stop - start) * row)
        return np.frombuffer(data, np.uint8).reshape(-1, self.height, self.width, 3)

    def blocks(self, size: int = 512) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(first index, images uint8 [<= size, H, W, 3]) in order, in the memory of one block."""
        if self.images is None:
            return
        with _reading(self.uri), _member(self.uri, self.images) as data:
            if self.images.fortran:
                whole = np.frombuffer(_read_exactly(data, self.images.size), np.uint8)
                whole = whole.reshape(self.images.shape, order="F")
                for first in range(0, self.num_images, size):
                    yield first, np.ascontiguousarray(whole[first : first + size])
                return
            for first in range(0, self.num_images, size):
                count = min(size, self.num_images - first)
                block = _read_exactly(data, count * self.height * self.width * 3)
                yield first, np.frombuffer(block, np.uint8).reshape(count, self.height, self.width, 3)


def open_batch(uri: str, num_classes: int | None = None) -> PublishedBatch:
    """Checks a published-format .npz and says what it holds.

    Reads all of it once, for the checksums, in constant memory. Keys other than arr_0, arr_1, mu, sigma, mu_s,
    sigma_s and extractor are ignored. Labels must lie in 0..num_classes - 1 (in 0.. where None). Raises ValueError for
    anything that is not an intact batch: images other than uint8 [N, H, W, 3], labels that do not match,
    statistics that are no mean and covariance, damaged or foreign files; FileNotFoundError where there is
    none.
    """
    with _reading(uri), storage.open_input(uri) as file, zipfile.ZipFile(file) as archive:
        members = _members(archive, file)
        if not {"arr_0", "mu"} & set(members):
            raise ValueError(f"has neither 'arr_0' (images) nor 'mu' (statistics); it holds {_names(archive)}")
        images = members.get("arr_0")
        count, height, width = _image_shape(images) if images else (0, 0, 0)
        labels = _labels(archive, members.get("arr_1"), count, num_classes)
        pool, spatial = (_statistics(archive, members, *keys) for keys in (("mu", "sigma"), ("mu_s", "sigma_s")))
        extractor = _text(archive, members.get("extractor"))
        if images:
            _verify(archive, images)
    return PublishedBatch(uri, count, height, width, labels, pool, spatial, images, extractor)


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Names the file in every complaint, and gives what broken archives raise one type."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f"{uri} is not an intact .npz file: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{uri} is not an intact .npz file: it points outside itself") from error
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    return sorted(info.filename for info in archive.infolist())[:20]


def _members(archive: zipfile.ZipFile, file: IO[bytes]) -> dict[str, _Member]:
    """The arrays that the layout knows, their claimed sizes checked against what is stored."""
    members: dict[str, _Member] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name not in KEYS or name == info.filename:
            continue
        if name in members:
            raise ValueError(f"it holds {info.filename!r} twice")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} is encrypted or compressed in a way that .npz files are not")
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
    """Shape, order and dtype from an npy header of version 1, 2 or 3; object arrays are refused unread."""
    version = npy.read_magic(data)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{name}: npy version {version} is unknown")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(data, max_header_size=MAX_HEADER)
    if dtype.hasobject:
        raise ValueError(f"{name}: an array of Python objects is a pickle inside, which is never opened")
    if any(length < 0 for length in shape):
        raise ValueError(f"{name}: shape {shape} is impossible")
    return shape, fortran, dtype


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after its local header, whose two last fields are variable lengths."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", _read_exactly(file, 4))
    return int(info.header_offset + 30 + name + extra)


@contextmanager
def _member(uri: str, member: _Member) -> Iterator[IO[bytes]]:
    """The member's data, its header skipped."""
    with storage.open_input(uri) as file, zipfile.ZipFile(file) as archive, archive.open(f"{member.name}.npy") as data:
        _read_exactly(data, member.header)
        yield data


def _read_exactly(data: IO[bytes], count: int) -> bytes:
    pieces, left = [], count
    while left:
        piece = data.read(min(left, CHUNK))
        if not piece:
            raise EOFError(f"it ends {left} bytes early")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _verify(archive: zipfile.ZipFile, member: _Member) -> None:
    """Reads a member to its end, where its checksum is compared."""
    with archive.open(f"{member.name}.npy") as data:
        while data.read(CHUNK):
            pass


def _load(archive: zipfile.ZipFile, member: _Member) -> NDArray[Any]:
    if member.size > MAX_HELD:
        raise ValueError(f"{member.name}: {member.size} bytes are more than statistics or labels can be")
    with archive.open(f"{member.name}.npy") as data:
        _read_exactly(data, member.header)
        array = np.frombuffer(_read_exactly(data, member.size), member.dtype)
        data.read(1)  # the end, where the checksum is compared
    return array.reshape(member.shape, order="F" if member.fortran else "C")


def _image_shape(member: _Member) -> tuple[int, int, int]:
    """N, H, W of the images, or what is wrong with them."""
    wanted = "wanted uint8 images [N, H, W, 3] with values 0..255"
    if member.dtype != np.uint8:
        raise ValueError(f"arr_0 has dtype {member.dtype}; {wanted}")
    if len(member.shape) != 4 or member.shape[3] != 3 or 0 in member.shape:
        hint = " (channels come last)" if len(member.shape) == 4 and member.shape[1] == 3 else ""
        raise ValueError(f"arr_0 has shape {member.shape}; {wanted}{hint}")
    if member.fortran and member.size > MAX_HELD:
        raise ValueError(f"arr_0 is in Fortran order and has {member.size} bytes, too many to turn: save it in C order")
    return member.shape[0], member.shape[1], member.shape[2]


def _labels(
    archive: zipfile.ZipFile, member: _Member | None, num_images: int, num_classes: int | None
) -> NDArray[np.int64] | None:
    if member is None:
        return None
    if member.dtype.kind not in "iu" or member.shape != (num_images,):
        found = f"{member.dtype} {member.shape}"
        raise ValueError(f"arr_1 (labels) is {found}; wanted one integer for each of {num_images} images")
    labels = _load(archive, member)
    if num_images and (labels.min() < 0 or labels.max() >= (num_classes or np.inf)):
        limit = "" if num_classes is None else f"{num_classes - 1}"
        raise ValueError(f"arr_1 holds labels from {labels.min()} to {labels.max()}; wanted 0..{limit}")
    return labels.astype(np.int64)


def _text(archive: zipfile.ZipFile, member: _Member | None) -> str | None:
    if member is None:
        return None
    if member.dtype.kind != "U" or int(np.prod(member.shape)) != 1:
        raise ValueError(f"{member.name} is {member.dtype} {member.shape}; expected one string")
    return str(_load(archive, member).item())


def _statistics(archive: zipfile.ZipFile, members: dict[str, _Member], mean: str, covariance: str) -> Gaussian | None:
    present = [key for key in (mean, covariance) if key in members]
    if not present:
        return None
    if len(present) == 1:
        missing = covariance if mean in present else mean
        raise ValueError(f"it has {present[0]!r} but not {missing!r}; it holds {_names(archive)}")
    for key in present:
        if members[key].dtype.kind != "f":
            raise ValueError(f"{key} has dtype {members[key].dtype}; wanted floating point")
    try:
        statistics = Gaussian(_load(archive, members[mean]), _load(archive, members[covariance]))
        check_semidefinite(statistics)
    except ValueError as error:
        raise ValueError(f"{mean}, {covariance}: {error}") from error
    return statistics
