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
LOCAL_SIZES = 10_000  # images of a local set whose size is checked before features are extracted
REMOTE_SIZES = 64  # the same for a set on object storage
UNUSUAL_SIZES = 1_000  # the same for images with unusual names
THREADS = 16  # files read at once


@dataclass(frozen=True)
class ListedFile:
    """A file in a folder, or a member of a tar, which is a range of its bytes; the size identifies its content."""

    name: str  # relative to the folder or tar
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Listing:
    """The image files of a folder or a tar, in the order of their indices."""

    files: list[ListedFile]
    unusual: set[str]  # names without the pattern of nearly all others, such as grid.png beside 000123.png
    warnings: list[str]


def folder_files(uri: str) -> list[ListedFile]:
    """Return all files beneath a folder; none if there is no folder."""
    try:
        entries = [entry for entries in storage.list_tree(uri) for entry in entries]
    except FileNotFoundError:
        return []
    return [ListedFile(name, size=size) for name, size in entries if not name.endswith("/")]


def tar_files(uri: str) -> list[ListedFile]:
    """Return the regular files in a tar, without extracting them to disk.

    Raises:
        ValueError: it is not a valid tar archive.
    """
    try:
        with storage.open_input(uri) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            files = [ListedFile(member.name, member.offset_data, member.size) for member in archive if member.isfile()]
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("its end-of-archive marker is missing")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{uri} is not a valid tar archive: {error}") from error
    return files


def list_images(files: Iterable[ListedFile]) -> Listing:
    """Return the image files among `files`, and warnings about their names.

    They are sorted by name. If nearly all names have the same pattern, such as image-#.png, they are sorted by the
    numbers in them, so that image-2.png comes before image-10.png.
    """
    kinds: dict[str, list[ListedFile]] = {"hidden": [], "image": [], "other": []}
    for file in sorted(files, key=lambda file: file.name):
        kinds[_kind(file.name)].append(file)
    images, warnings = kinds["image"], []
    if hidden := kinds["hidden"]:
        warnings.append(f"{len(hidden)} hidden files are skipped, such as {hidden[0].name}")
    if other := kinds["other"]:
        endings = Counter(_ending(file) for file in other)
        counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(5))
        warnings.append(f"files with these endings are skipped: {counts}")
    patterns = Counter(_pattern(file) for file in images)
    ((usual, count),) = patterns.most_common(1) or [("", 0)]
    if count < COMMON * len(images):
        return Listing(images, set(), warnings)
    by_name = [file for file in images if _pattern(file) == usual]
    by_number = sorted(by_name, key=_name_and_numbers)
    if by_number != by_name:
        first, later = next(pair for pair in zip(by_number, by_name, strict=True) if pair[0] != pair[1])
        images.sort(key=_name_and_numbers)
        warnings.append(
            "the numbers in the names are not padded with zeros, so images are sorted by number: "
            f"{first.name} comes before {later.name}"
        )
    max_rare = max(1, len(images) // 100)
    rare_patterns = {pattern for pattern, count in patterns.items() if pattern != usual and count <= max_rare}
    return Listing(images, {file.name for file in images if _pattern(file) in rare_patterns}, warnings)


def _kind(name: str) -> str:
    if any(part.startswith(".") and part != "." for part in name.split("/")):
        return "hidden"
    return "image" if name.lower().endswith(IMAGE_ENDINGS) else "other"


def _base_name(file: ListedFile) -> str:
    return file.name.rsplit("/", 1)[-1]


def _ending(file: ListedFile) -> str:
    _, dot, ending = _base_name(file).rpartition(".")
    return f".{ending}" if dot else "none"


def _pattern(file: ListedFile) -> str:
    """Return the file's name without its folder, and with each number replaced by #."""
    return re.sub("[0-9]+", "#", _base_name(file))


def _name_and_numbers(file: ListedFile) -> list[str | int]:
    """Return the pieces of the name, alternating between text and numbers, as a key to sort by."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split("([0-9]+)", file.name))]


@dataclass(frozen=True)
class ImageFiles:
    """Function that reads a range of image files. It can be pickled."""

    uri: str
    in_tar: bool
    files: list[ListedFile]
    labels: np.ndarray  # int64 [N], -1 = no label
    image_size: int | None  # size to which images are cropped; None = they are not cropped
    decoding: Mapping[str, Any] = field(default_factory=dict)  # arguments of `decode`
    shape: tuple[int, ...] | None = None  # of every image, if they are not cropped

    def __call__(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return images uint8 [n, H, W, 3] and labels int64 [n] of the range [begin, end)."""
        files = self.files[begin:end]
        with ThreadPoolExecutor(THREADS) as threads:
            if self.in_tar:
                with storage.open_input(self.uri) as archive:
                    contents = [_read_member(archive, file) for file in files]
            else:
                uris = [storage.join(self.uri, file.name) for file in files]
                contents = list(threads.map(storage.read_bytes, uris))
            images = list(threads.map(self._decode, files, contents))
        return np.stack(images), self.labels[begin:end]

    def _decode(self, file: ListedFile, content: bytes) -> np.ndarray:
        try:
            image: Image.Image = decode(content, **self.decoding)
        except ValueError as error:
            raise ValueError(f"{self.uri}: {file.name} is not an intact image: {error}") from error
        pixels = np.asarray(image) if self.image_size is None else center_crop(image, self.image_size)
        if self.shape is not None and pixels.shape != self.shape:
            raise ValueError(self._size_error(file, pixels.shape[:2]))
        return pixels

    def _size_error(self, file: ListedFile, size: tuple[int, ...]) -> str:
        assert self.shape is not None
        sizes = f"{size[1]}x{size[0]} pixels, but the first image has {self.shape[1]}x{self.shape[0]}"
        return f"{self.uri}: {file.name} has {sizes}; pass --image-size to crop all images to one size"

    def check_sizes(self, unusual: set[str]) -> None:
        """Check the sizes in the headers of the first images, and of images with unusual names.

        Raises:
            ValueError: an image has another size than the first one.
        """
        assert self.shape is not None
        is_remote = "://" in self.uri and not self.uri.startswith("file://")
        first = [file for file in self.files if file.name not in unusual][: REMOTE_SIZES if is_remote else LOCAL_SIZES]
        checked = [file for file in self.files if file.name in unusual][:UNUSUAL_SIZES] + first
        differing = [(file, size) for file, size in self._header_sizes(checked) if size != self.shape[:2]]
        grids = [f"{file.name} ({width}x{height})" for file, (height, width) in differing if file.name in unusual]
        if grids:
            raise ValueError(
                f"{self.uri}: {', '.join(grids[:3])} looks like a grid of images, because the others have other names "
                f"and {self.shape[1]}x{self.shape[0]} pixels; remove it"
            )
        if differing:
            raise ValueError(self._size_error(*differing[0]))

    def _header_sizes(self, files: list[ListedFile]) -> list[tuple[ListedFile, tuple[int, int]]]:
        """Return each file with the height and width of its image."""
        if self.in_tar:
            with storage.open_input(self.uri) as archive:
                return [(file, self._header_size(file, io.BytesIO(_read_member(archive, file)))) for file in files]

        def read(file: ListedFile) -> tuple[ListedFile, tuple[int, int]]:
            with storage.open_input(storage.join(self.uri, file.name)) as content:
                return file, self._header_size(file, content)

        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(read, files))

    def _header_size(self, file: ListedFile, content: BinaryIO) -> tuple[int, int]:
        """Return height and width of an image without decoding its pixels."""
        try:
            with Image.open(content, formats=FORMATS) as image:
                width, height = image.size
                applies_exif = self.decoding.get("exif_orientation") == "apply"
                is_turned = applies_exif and image.getexif().get(0x0112, 1) >= 5  # 0x0112 is the tag Orientation
        except Exception as error:  # damaged files make decoders fail in many ways
            raise ValueError(f"{self.uri}: {file.name} is not an intact image: {error}") from error
        return (width, height) if is_turned else (height, width)


def _read_member(archive: BinaryIO, file: ListedFile) -> bytes:
    archive.seek(file.offset)
    return archive.read(file.size)
