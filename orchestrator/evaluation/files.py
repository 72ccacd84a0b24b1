"""Samples as image files in a folder or a tar: which files are images, their order, and how ranges are read."""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from orchestrator import storage
from orchestrator.data.crops import center_crop
from orchestrator.data.images import FORMATS, IMAGE_ENDINGS, decode

COMMON = 0.9  # names have a common pattern if at least this share of them matches it
LOCAL_SIZES, REMOTE_SIZES, ODD_SIZES = 10_000, 64, 1_000  # images whose header is read before features are extracted
THREADS = 16  # files read at once


@dataclass(frozen=True)
class Place:
    """The location of an image: a file, or a range of a tar."""

    name: str
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Listing:
    """The image files of a folder or a tar, in the order of their indices."""

    places: list[Place]
    odd: set[str]  # names without the pattern of nearly all others, such as grid.png beside 000123.png
    warnings: list[str]


def folder_places(uri: str) -> list[Place]:
    """Return all files beneath a folder."""
    return [Place(name) for name in storage.list_names(uri, recursive=True)]


def tar_places(uri: str) -> list[Place]:
    """Return the members of a tar, without extracting them to disk.

    Raises:
        ValueError: it is not a valid tar archive.
    """
    try:
        with storage.open_input(uri) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            places = [Place(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("its end-of-archive marker is missing")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{uri} is not a valid tar archive: {error}") from error
    return places


def list_images(places: Iterable[Place]) -> Listing:
    """Return the image files among `places`, and warnings about their names.

    They are sorted by name. If the names have a common pattern, they are sorted by the numbers in them, so that 2.png
    comes before 10.png.
    """
    kinds: dict[str, list[Place]] = {"hidden": [], "image": [], "other": []}
    for place in sorted(places, key=lambda place: place.name):
        kinds[_kind(place.name)].append(place)
    images, warnings = kinds["image"], []
    if hidden := kinds["hidden"]:
        warnings.append(f"{len(hidden)} hidden files are skipped, such as {hidden[0].name}")
    if other := kinds["other"]:
        endings = Counter("." + end if dot else "none" for _, dot, end in (_base(p).rpartition(".") for p in other))
        counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(5))
        warnings.append(f"files with these endings are skipped: {counts}")
    patterns = Counter(_pattern(place) for place in images)
    ((usual, count),) = patterns.most_common(1) or [("", 0)]
    if count < COMMON * len(images):
        return Listing(images, set(), warnings)
    by_name = [place for place in images if _pattern(place) == usual]
    by_number = sorted(by_name, key=_numbers)
    if by_number != by_name:
        first, later = next(pair for pair in zip(by_number, by_name, strict=True) if pair[0] != pair[1])
        images.sort(key=_numbers)
        warnings.append(
            "the numbers in the names are not padded with zeros, so images are sorted by number: "
            f"{first.name} comes before {later.name}"
        )
    rare = max(1, len(images) // 100)
    odd = {place.name for place in images if _pattern(place) != usual and patterns[_pattern(place)] <= rare}
    return Listing(images, odd, warnings)


def _kind(name: str) -> str:
    if any(part.startswith(".") and part != "." for part in name.split("/")):
        return "hidden"
    return "image" if name.lower().endswith(IMAGE_ENDINGS) else "other"


def _base(place: Place) -> str:
    return place.name.rsplit("/", 1)[-1]


def _pattern(place: Place) -> str:
    """Return the file's name with each number replaced by #."""
    return re.sub("[0-9]+", "#", _base(place))


def _numbers(place: Place) -> list[str | int]:
    """Return the pieces of the name, alternating between text and numbers."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split("([0-9]+)", place.name))]


@dataclass(frozen=True)
class ImageFiles:
    """Reader of ranges of image files."""

    uri: str
    in_tar: bool
    places: list[Place]
    labels: np.ndarray
    image_size: int | None  # size to which images are cropped; None = they are not cropped
    decoding: Mapping[str, Any] = field(default_factory=dict)  # arguments of `decode`
    shape: tuple[int, ...] | None = None  # of every image, if they are not cropped

    def __call__(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        places = self.places[begin:end]
        with ThreadPoolExecutor(THREADS) as threads:
            if self.in_tar:
                with storage.open_input(self.uri) as file:
                    contents = [_member(file, place) for place in places]
            else:
                contents = list(
                    threads.map(lambda place: storage.read_bytes(storage.join(self.uri, place.name)), places)
                )
            images = list(threads.map(self._pixels, places, contents))
        return np.stack(images), self.labels[begin:end]

    def _pixels(self, place: Place, data: bytes) -> np.ndarray:
        try:
            image: Image.Image = decode(data, **self.decoding)
        except ValueError as error:
            raise ValueError(f"{self.uri}: {place.name} is not an intact image: {error}") from error
        pixels = np.asarray(image) if self.image_size is None else center_crop(image, self.image_size)
        if self.shape is not None and pixels.shape != self.shape:
            raise ValueError(self._other_size(place, pixels.shape[:2]))
        return pixels

    def _other_size(self, place: Place, size: tuple[int, ...]) -> str:
        assert self.shape is not None
        sizes = f"{size[1]}x{size[0]} pixels, but the first image has {self.shape[1]}x{self.shape[0]}"
        return f"{self.uri}: {place.name} has {sizes}; pass --image-size to crop all images to one size"

    def check_sizes(self, odd: set[str]) -> None:
        """Check the sizes in the headers of the first images and of images with odd names.

        Raises:
            ValueError: an image has another size than the first one.
        """
        assert self.shape is not None
        remote = "://" in self.uri and not self.uri.startswith("file://")
        oddities = [place for place in self.places if place.name in odd][:ODD_SIZES]
        checked = oddities + [p for p in self.places if p.name not in odd][: REMOTE_SIZES if remote else LOCAL_SIZES]
        differing = [(place, size) for place, size in self._header_sizes(checked) if size != self.shape[:2]]
        grids = [f"{place.name} ({width}x{height})" for place, (height, width) in differing if place.name in odd]
        if grids:
            raise ValueError(
                f"{self.uri}: {', '.join(grids[:3])} looks like a grid of images, because the others have other names "
                f"and {self.shape[1]}x{self.shape[0]} pixels; remove it"
            )
        if differing:
            raise ValueError(self._other_size(*differing[0]))

    def _header_sizes(self, places: list[Place]) -> list[tuple[Place, tuple[int, int]]]:
        if self.in_tar:
            with storage.open_input(self.uri) as file:
                return [(place, self._header_size(place, io.BytesIO(_member(file, place)))) for place in places]

        def read(place: Place) -> tuple[Place, tuple[int, int]]:
            with storage.open_input(storage.join(self.uri, place.name)) as file:
                return place, self._header_size(place, file)

        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(read, places))

    def _header_size(self, place: Place, file: BinaryIO) -> tuple[int, int]:
        """Return height and width without decoding the pixels."""
        try:
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                turned = self.decoding.get("exif_orientation") == "apply" and image.getexif().get(0x0112, 1) >= 5
        except Exception as error:  # damaged files make decoders fail in many ways
            raise ValueError(f"{self.uri}: {place.name} is not an intact image: {error}") from error
        return (width, height) if turned else (height, width)


def _member(file: BinaryIO, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)
