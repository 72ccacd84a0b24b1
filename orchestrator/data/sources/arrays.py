"""Layouts that store images in arrays or databases. Their images are read in order, and staged."""

import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from orchestrator import storage
from orchestrator.data.sources.index import Entry, Listing, Reading, Splits
from orchestrator.pictures import png

CIFAR = r"(^|/)(cifar-10-binary\.tar\.gz|cifar-100-binary\.tar\.gz|(data_batch_[1-5]|test_batch|train|test)\.bin)$"
_CIFAR100 = r"(^|/)(cifar-100-binary\.tar\.gz|(train|test)\.bin)$"
NPZ = r"\.npz$"
LMDB = r"(^|/)data\.mdb$"
_CLASS_NAME_FILES = r"(^|/)(batches\.meta|fine_label_names)\.txt$"  # of CIFAR, in unpacked folders
_IMAGE_BYTES = 3 * 32 * 32  # of a CIFAR image: planes of red, green and blue


def read_digits() -> Reading:
    """Read scikit-learn's 1,797 scanned digits. Keys are digit-0000 and so on."""
    labels = _digits().target.tolist()
    entries = (Entry(f"digit-{row:04d}", str(label), "", "digits", row) for row, label in enumerate(labels))
    return Reading("scikit-learn's scanned digits", entries, tuple("0123456789"), _digit_images)


def digits_pixels() -> tuple[np.ndarray, np.ndarray]:
    """Return the scanned digits, uint8 [1797, 8, 8] in 0 to 255, and their labels, int64 [1797]."""
    digits = _digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


@lru_cache(1)
def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


def _digit_images(uri: str) -> Iterator[bytes]:
    yield from map(png, digits_pixels()[0])


# -------------------------------------------------------------------------------------------------------------- CIFAR


def read_cifar(listing: Listing, splits: Splits) -> Reading:
    """Read the binary version of CIFAR-10 or CIFAR-100, as an archive or unpacked, with its own splits.

    Keys are data_batch_1/00000 and so on. The classes of CIFAR-100 are its 100 fine classes.

    Raises:
        ValueError: a file is truncated, or the names of the classes are missing.
    """
    objects = listing.matching(CIFAR)
    if 0 < sum(bool(re.search(_CIFAR100, name)) for name in objects) < len(objects):
        raise ValueError(
            f"--source {listing.source} has CIFAR-10 and CIFAR-100; accepted: the folder or the archive of one of them"
        )
    archives = [name for name in objects if name.endswith(".gz")][:1]
    objects = archives or objects
    files: dict[str, bytes] = {}
    for name in archives or listing.matching(_CLASS_NAME_FILES):
        files |= _read_files(storage.join(listing.uri, name))
    class_names = files.get("fine_label_names", files.get("batches.meta"))
    if class_names is None:
        raise ValueError(
            f"--source {listing.source}: no batches.meta.txt or fine_label_names.txt names the classes; add it"
        )
    classes = tuple(class_names.decode().split())

    def entries() -> Iterator[Entry]:
        for name in objects:
            for row, (batch, number, label, _) in enumerate(_records(storage.join(listing.uri, name))):
                split = splits.of_shard(batch) or "train"
                yield Entry(f"{batch}/{number:05d}", label, split, name, row)
        splits.check_used()

    return Reading(f"CIFAR-{len(classes)}, binary version", entries(), classes, _cifar_images)


def _cifar_images(uri: str) -> Iterator[bytes]:
    for _, _, _, planes in _records(uri):
        yield png(planes.reshape(3, 32, 32).transpose(1, 2, 0))


def _records(uri: str) -> Iterator[tuple[str, int, int, np.ndarray]]:
    """Yield (batch, number in it, label, pixels uint8 [3072]) of every image in an archive or in one batch.

    Raises:
        ValueError: a batch is truncated.
    """
    for batch, data in _read_files(uri).items():
        if not re.fullmatch(r"data_batch_[1-5]|test_batch|train|test", batch):
            continue
        label_bytes = 2 if batch in ("train", "test") else 1  # CIFAR-100 has a coarse label before the fine one
        record_bytes = label_bytes + _IMAGE_BYTES
        if len(data) % record_bytes:
            raise ValueError(
                f"{uri}: {batch} has {len(data)} bytes; expected a multiple of {record_bytes}; download it again"
            )
        for number, record in enumerate(np.frombuffer(data, np.uint8).reshape(-1, record_bytes)):
            yield batch, number, int(record[label_bytes - 1]), record[label_bytes:]


def _read_files(uri: str) -> dict[str, bytes]:
    """Return a file, or the files of a small compressed tar, by name without folder and extension."""
    data = storage.read_bytes(uri)
    if not uri.endswith(".gz"):
        return {_stem(uri): data}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
            files = [(member.name, tar.extractfile(member)) for member in tar if member.isreg()]
            return {_stem(name): file.read() for name, file in files if file}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{uri} is not a valid tar.gz archive: {error}") from error


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


# -------------------------------------------------------------------------------------------- downsampled ImageNet


def read_npz(listing: Listing, splits: Splits) -> Reading:
    """Read downsampled ImageNet: .npz files with `data`, uint8 [N, 3 S S] in planes, and `labels` from 1 on.

    Raises:
        ValueError: a file is damaged or contains other arrays.
    """
    reading = Reading("downsampled ImageNet", images=_npz_images)
    split_of_file = splits.of_shards(listing.matching(NPZ), reading.suspicions)

    def entries() -> Iterator[Entry]:
        for name, split in split_of_file.items():
            with _open_npz(storage.join(listing.uri, name)) as (labels, _, _):
                for row, label in enumerate(labels.tolist()):
                    yield Entry(f"{name.removesuffix('.npz')}/{row:07d}", label - 1, split, name, row)

    reading.entries = entries()
    return reading


def _npz_images(uri: str) -> Iterator[bytes]:
    with _open_npz(uri) as (labels, data, side):
        for _ in labels:
            pixels = data.read(3 * side**2)
            if len(pixels) < 3 * side**2:
                raise ValueError(f"{uri} is truncated; copy it again")
            yield png(np.frombuffer(pixels, np.uint8).reshape(3, side, side).transpose(1, 2, 0))


@contextmanager
def _open_npz(uri: str) -> Iterator[tuple[np.ndarray, IO[bytes], int]]:
    """Yield the labels, int [N]; a file with the images, uint8 [N, 3, S, S]; and S.

    Raises:
        ValueError: the file is not an .npz, or its arrays are not those of downsampled ImageNet.
    """
    try:
        with storage.open_input(uri, 8 << 20) as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            if not {"data.npy", "labels.npy"} <= set(members):
                raise ValueError(
                    f"{uri} contains {', '.join(members[:10])}; accepted: data and labels of downsampled ImageNet"
                )
            with archive.open("labels.npy") as data:
                labels = npy.read_array(data, allow_pickle=False)
            with archive.open("data.npy") as data:
                read_header = npy.read_array_header_1_0 if npy.read_magic(data) == (1, 0) else npy.read_array_header_2_0
                shape, fortran_order, dtype = read_header(data)
                side = round((shape[-1] / 3) ** 0.5) if len(shape) == 2 else 0
                if dtype != np.uint8 or fortran_order or not side or 3 * side**2 != shape[1]:
                    raise ValueError(f"{uri}: data is {dtype} {shape}; accepted: uint8 [N, 3 x S x S] in planes")
                count = shape[0]
                if labels.dtype.kind not in "iu" or labels.shape != (count,) or (count and labels.min() < 1):
                    raise ValueError(
                        f"{uri}: labels are {labels.dtype} {labels.shape}; accepted: {count} integers from 1 on"
                    )
                yield labels, data, side
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{uri} is not a valid .npz file: {error}; copy it again") from error


# --------------------------------------------------------------------------------------------------------------- LSUN


def read_lmdb(listing: Listing, splits: Splits) -> Reading:
    """Read LSUN's databases, such as bedroom_train_lmdb/. Each category is a class; a single category has no labels.

    Raises:
        ValueError: they are not on a local disk, or the package lmdb is not installed (when entries are read).
    """
    folders = [name.removesuffix("data.mdb").rstrip("/") for name in listing.matching(LMDB)]
    stems = {folder: (folder or listing.uri.rsplit("/", 1)[-1]).removesuffix("_lmdb") for folder in folders}
    categories = {folder: re.sub(r".*/|_(train|val|test)$", "", stem) for folder, stem in stems.items()}
    reading = Reading("LSUN's LMDB", images=_lmdb_images)
    split_of_stem = splits.of_shards(list(stems.values()), reading.suspicions)
    has_labels = len(set(categories.values())) > 1

    def entries() -> Iterator[Entry]:
        for folder, stem in stems.items():
            label = categories[folder] if has_labels else None
            uri = storage.join(listing.uri, folder) if folder else listing.uri
            for row, (key, _) in enumerate(_items(uri)):
                yield Entry(f"{stem}/{key.decode('latin-1')}", label, split_of_stem[stem], folder or ".", row)

    reading.entries = entries()
    return reading


def _lmdb_images(uri: str) -> Iterator[bytes]:
    yield from (bytes(value) for _, value in _items(uri))


def _items(uri: str) -> Iterator[tuple[bytes, memoryview]]:
    """Yield (key, encoded image) of every record of an LMDB; an image is valid until the next one is read."""
    if "://" in uri and not uri.startswith("file://"):
        raise ValueError(f"--source {uri}: an LMDB can only be read from a local disk; copy it there")
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise ValueError(f"--source {uri} is an LMDB, which needs a package: pip install -e '.[lmdb]'") from error
    path = uri.removeprefix("file://").removesuffix("/.")
    try:
        with (
            lmdb.open(path, readonly=True, lock=False, readahead=False) as database,
            database.begin(buffers=True) as transaction,
        ):
            yield from ((bytes(key), value) for key, value in transaction.cursor())
    except lmdb.Error as error:
        raise ValueError(f"{uri} is not a valid LMDB: {error}") from error
