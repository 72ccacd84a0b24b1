"""What is measured: a samples folder, a published .npz, a folder or a tar of images; each read by index, in ranges."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

import numpy as np
from PIL import Image

from orchestrator import storage
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import load_manifest, read_images
from orchestrator.data.images import IMAGE_ENDINGS, decode
from orchestrator.evaluation.npz import PublishedBatch, open_batch
from orchestrator.generation.samples import count_samples, read_range

_RECORDS = {"run.json", "config.json"}  # what a samples folder says of how it was made

ReadImages = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. Plain data: it travels to workers, and holds no image."""

    uri: str
    kind: str  # "samples", "npz", "folder", "tar" or "dataset"
    count: int
    identity: str  # another one where the images are others
    read: ReadImages  # rows [begin, end) -> images uint8 [n, H, W, 3], labels int64 [n] (-1 where there are none)
    seed: int | None = None  # of samples that Admiral made: index i is a function of it


def open_images(uri: str, classes: Sequence[str] = (), image_size: int | None = None) -> ImageSet:
    """Look at what lies at `uri` and say how to read it.

    classes: names in the order of labels; images of a folder or tar have labels where they lie in folders of these
    names. image_size: images of a folder or tar are cropped to it as ADM crops its training images; without it they
    must all have one size.

    Raises:
        FileNotFoundError: nothing there, or samples that were not generated to their end.
        ValueError: none of the four, or damaged.
    """
    if uri.endswith(".npz"):
        return batch_images(open_batch(uri, len(classes) or None))
    if uri.endswith(".tar"):
        return _listed("tar", uri, _tar_members(uri), classes, image_size)
    if uri.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")):
        raise ValueError(f"{uri} is compressed, so that image i cannot be reached: pass a plain .tar, or unpack it")
    if "manifest.json" in (names := storage.list_names(uri)) or _RECORDS & set(names):
        return _samples(uri)
    names = [name for name in storage.list_names(uri, recursive=True) if name.lower().endswith(IMAGE_ENDINGS)]
    if not names:
        raise FileNotFoundError(
            f"{uri} holds no finished samples: generate them first (or name an .npz, a .tar or a folder of images)"
        )
    return _listed("folder", uri, [_Place(name) for name in names], classes, image_size)


def split_images(dataset: str, split: str, image_size: int) -> ImageSet:
    """A split of a prepared dataset, centre-cropped."""
    manifest = load_manifest(dataset)
    shards = [shard.model_dump(mode="json") for shard in manifest.shards(split)]
    read = partial(read_images, manifest, split, image_size=image_size)
    identity = _digest([split, image_size, shards])
    return ImageSet(f"{dataset} {split}", "dataset", manifest.num_samples(split), identity, read)


def image_size_of(images: ImageSet) -> int:
    """Pixels on a side. Raises ValueError where the images are not square."""
    shape = images.read(0, 1)[0].shape
    if shape[1] != shape[2]:
        raise ValueError(f"{images.uri}: images of {shape[2]}x{shape[1]} pixels; a dataset's are cropped to squares")
    return int(shape[1])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ samples


def _samples(folder: str) -> ImageSet:
    """What `generate_samples` made."""
    manifest_uri = storage.join(folder, "manifest.json")
    if storage.exists(manifest_uri) and "splits" in storage.read_json(manifest_uri):
        raise ValueError(f"{folder} is a dataset, not samples; name it as the reference")
    count = count_samples(folder)
    (record,) = _RECORDS & set(storage.list_names(folder))
    content = storage.read_json(storage.join(folder, record))
    made_by = content.get("config", content)
    return ImageSet(folder, "samples", count, _digest(made_by), partial(read_range, folder), made_by.get("seed"))


# ------------------------------------------------------------------------------------------------ .npz


def batch_images(batch: PublishedBatch) -> ImageSet:
    """The images of a published batch. Raises ValueError where it has statistics only."""
    if not batch.num_images:
        raise ValueError(f"{batch.uri} holds statistics but no images (arr_0)")
    identity = f"{batch.checksum:08x}-{batch.num_images}"
    return ImageSet(batch.uri, "npz", batch.num_images, identity, _BatchRows(replace(batch, pool=None, spatial=None)))


class _BatchRows:
    """Ranges of a batch. A compressed one can only be read forwards: this goes on from where the last range ended."""

    def __init__(self, batch: PublishedBatch) -> None:
        self._batch = batch
        self._blocks: Iterator[tuple[int, np.ndarray]] | None = None
        self._held = (0, np.empty(0, np.uint8))  # first index and images of the block last read

    def __reduce__(self) -> tuple:
        return type(self), (self._batch,)  # an open file does not travel

    def __call__(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        batch = self._batch
        images = batch.rows(begin, end).copy() if batch.by_range else np.concatenate(list(self._forward(begin, end)))
        return images, np.full(end - begin, -1) if batch.labels is None else batch.labels[begin:end]

    def _forward(self, begin: int, end: int) -> Iterator[np.ndarray]:
        first, block = self._held
        if self._blocks is None or begin < first:
            self._blocks = self._batch.blocks()
            first, block = next(self._blocks)
        while True:
            if begin < first + len(block):
                yield block[max(begin - first, 0) : end - first]
            self._held = first, block
            if end <= first + len(block):
                return
            first, block = next(self._blocks)


# ------------------------------------------------------------------------------------------------ images as files


@dataclass(frozen=True)
class _Place:
    """Where the bytes of an image lie: a file, or a range of a tar."""

    name: str
    offset: int = 0
    size: int = 0


def _tar_members(uri: str) -> list[_Place]:
    """The images inside, in the order of their names; no member is written anywhere."""
    try:
        with storage.open_input(uri) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = [m for m in archive if m.isfile() and m.name.lower().endswith(IMAGE_ENDINGS)]
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends without the mark of its end")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{uri} is not an intact .tar file: {error}") from error
    if not members:
        raise ValueError(f"{uri} holds no images ({', '.join(IMAGE_ENDINGS)})")
    return sorted((_Place(m.name, m.offset_data, m.size) for m in members), key=lambda place: place.name)


def _listed(kind: str, uri: str, places: list[_Place], classes: Sequence[str], image_size: int | None) -> ImageSet:
    """Image files as a set; labels come from their folders where these are all classes."""
    number = {name: label for label, name in enumerate(classes)}
    folders = [place.name.rsplit("/", 2)[-2] if "/" in place.name else "" for place in places]
    labelled = all(folder in number for folder in folders)
    labels = np.array([number[folder] for folder in folders] if labelled else [-1] * len(places))
    identity = _digest([image_size, [(place.name, place.offset, place.size) for place in places]])
    read = _Files(uri, kind == "tar", places, labels, image_size)
    if image_size is None:
        read = replace(read, shape=read(0, 1)[0].shape[1:])
    return ImageSet(uri, kind, len(places), identity, read)


@dataclass(frozen=True)
class _Files:
    """Ranges of image files."""

    uri: str
    in_tar: bool
    places: list[_Place]
    labels: np.ndarray
    image_size: int | None
    shape: tuple[int, ...] | None = None  # of every image, where none is cropped

    def __call__(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        places = self.places[begin:end]
        if self.in_tar:
            with storage.open_input(self.uri) as file:
                images = [self._pixels(place, self._range(file, place)) for place in places]
        else:
            images = [self._pixels(p, storage.read_bytes(storage.join(self.uri, p.name))) for p in places]
        return np.stack(images), self.labels[begin:end]

    @staticmethod
    def _range(file: BinaryIO, place: _Place) -> bytes:
        file.seek(place.offset)
        return file.read(place.size)

    def _pixels(self, place: _Place, data: bytes) -> np.ndarray:
        try:
            image: Image.Image = decode(data)
        except ValueError as error:
            raise ValueError(f"{self.uri}: {place.name} is not an intact image: {error}") from error
        pixels = np.asarray(image) if self.image_size is None else center_crop(image, self.image_size)
        if self.shape is not None and pixels.shape != self.shape:
            sizes = f"{pixels.shape[1]}x{pixels.shape[0]} pixels, the first image {self.shape[1]}x{self.shape[0]}"
            raise ValueError(f"{self.uri}: {place.name} has {sizes}; pass --image-size to crop all to one size")
        return pixels
