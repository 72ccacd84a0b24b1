"""Images that come as arrays of pixels: small sets, held in memory and read as PNGs."""

import io
import tarfile
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from orchestrator import storage
from orchestrator.data.sources.index import Listing, Source, index_table, make_source
from orchestrator.pictures import png

CIFAR10_NAME = r"(^|/)cifar-10-binary\.tar\.gz$"
CIFAR10_PICKLES = r"(^|/)(cifar-10-python\.tar\.gz|cifar-10-batches-py/.*|data_batch_\d)$"
_CIFAR10_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # label, then three planes

Pixels = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> images uint8 [n, H, W(, 3)], labels [n]


def digits_pixels(uri: str = "digits") -> Pixels:
    """scikit-learn's 1,797 scanned digits, grey, 8x8 pixels, with the full range of grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {"digit": (np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target)}


def cifar10_pixels(uri: str) -> Pixels:
    """The six batches of CIFAR-10's binary archive.

    Raises:
        ValueError: it is no such archive, or cut short.
    """
    pixels: Pixels = {}
    for name, data in _archive(uri).items():
        if name in _CIFAR10_BATCHES:
            if len(data) % _CIFAR10_RECORD:
                raise ValueError(f"{uri}: {name} has {len(data)} bytes, no multiple of {_CIFAR10_RECORD}")
            records = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR10_RECORD)
            pixels[name] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
    if set(pixels) != set(_CIFAR10_BATCHES):
        raise ValueError(f"{uri} lacks {', '.join(sorted(set(_CIFAR10_BATCHES) - set(pixels)))}")
    return pixels


def digits_source() -> Source:
    """Keys are digit-0000 and so on."""
    return _source("digits", "digits", tuple("0123456789"), digits_pixels(), "{name}-{row:04d}", split=lambda name: "")


def cifar10_source(listing: Listing) -> Source:
    """CIFAR-10 with its own splits, train and test; keys are data_batch_1/00000 and so on."""
    uri = storage.join(listing.uri, listing.matching(CIFAR10_NAME).names[0].as_py())
    classes = tuple(_archive(uri)["batches.meta"].decode().split())
    split = {name: "test" if name == "test_batch" else "train" for name in _CIFAR10_BATCHES}
    return _source("cifar10", uri, classes, cifar10_pixels(uri), "{name}/{row:05d}", split.__getitem__)


def reader(load: Callable[[str], Pixels], uri: str) -> Callable[[Sequence[storage.Range]], list[bytes]]:
    """Rows of the pixels as PNGs: the reader of a source of arrays, which loads them once."""
    pixels = load(uri)
    return lambda ranges: [png(pixels[name][0][row]) for name, row, _ in ranges]


digits_reader = partial(reader, digits_pixels)
cifar10_reader = partial(reader, cifar10_pixels)


def _source(
    layout: str, uri: str, classes: tuple[str, ...], pixels: Pixels, key: str, split: Callable[[str], str]
) -> Source:
    """An index whose `start` is a row of the pixels."""
    parts = []
    for name, (images, labels) in pixels.items():
        rows = np.arange(len(images))
        keys = pa.array([key.format(name=name, row=row) for row in rows], pa.string())
        objects, splits = (pa.array([word] * len(rows), pa.string()) for word in (name, split(name)))
        parts.append(index_table(keys, labels, objects, rows, np.full(len(rows), images[0].size), splits))
    return make_source(layout, uri, classes, pa.concat_tables(parts))


def _archive(uri: str) -> dict[str, bytes]:
    """The files of a small compressed tar, by name without folder and ending."""
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri)), mode="r:gz") as tar:
            files = [(member.name, tar.extractfile(member)) for member in tar if member.isreg()]
            return {name.rsplit("/", 1)[-1].rsplit(".", 1)[0]: file.read() for name, file in files if file}
    except (tarfile.TarError, OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{uri} is no sound tar.gz: {error}") from error
