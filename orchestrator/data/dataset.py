"""Datasets: their manifest, and the reading of batches from their shards.

On disk a dataset is `manifest.json` and Parquet shards with the columns `key`, `label`, `image` (the original encoded
bytes), `width` and `height`. Shards that are registered in place keep their own columns and stay where they are. The id
of a sample is its global row number in its split.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from cluster.stream import READERS, Block, stream
from orchestrator import storage
from orchestrator.data.crops import center_crop, random_crop
from orchestrator.data.images import ExifOrientation, decode
from orchestrator.data.row_groups import read_row_group
from orchestrator.order import OrderPlan, Purpose, Unit, sample_rng

READ_AHEAD_BYTES = 256 << 20  # decoded images that a worker reads ahead, or one unit for each reader if that is more
READ_AHEAD_ROWS = 16384  # at most: reading further ahead only takes CPUs from the training
BLOCK_ROWS, BLOCK_BYTES = 256, 16 << 20  # the largest block that is decoded at a time

T = TypeVar("T")

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)

# ---------------------------------------------------------------------------------------------------- manifest


class Shard(BaseModel, frozen=True, extra="forbid"):
    """One Parquet object of a dataset."""

    path: str  # relative to the manifest's root
    bytes: int
    rows: int
    row_groups: tuple[int, ...]  # rows of each


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of a dataset. `folder` is the place from which the manifest was read; it is not stored."""

    format_version: Literal[1] = 1
    name: str
    classes: tuple[str, ...]  # names in the order of the labels; empty: all labels are -1
    splits: dict[str, tuple[Shard, ...]]
    unlabelled: tuple[str, ...] = ()  # splits whose labels are all -1 although there are classes
    width: tuple[int, int] | None  # smallest and largest, in pixels; None: unknown
    height: tuple[int, int] | None  # likewise
    quarantined: int  # images that could not be decoded and were left out
    resolution: int | None = None  # the images are ADM's centre crops of this size; None: original images
    registered: str | None = None  # folder of shards that are registered in place; None: they lie beside the manifest
    image_column: str = "image"  # column of the encoded bytes
    label_column: str | None = "label"  # column of the class numbers or names; None: there are no labels
    background: str = "drop"  # behind transparent images, see `orchestrator.data.images.decode`
    exif_orientation: ExifOrientation = "ignore"  # likewise
    content: str = ""  # SHA-256 of all images and labels in their order; empty if registered in place
    folder: str = Field("", exclude=True)

    @property
    def fingerprint(self) -> str:
        """Return a SHA-256 of the manifest, which differs for every dataset."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the paths of the columns with the images and, if there are any, with the labels."""
        return (self.image_column, self.label_column) if self.label_column else (self.image_column,)

    @property
    def root(self) -> str:
        """Return the folder of the shards."""
        return self.registered or self.folder

    def decode(self, data: bytes) -> Image.Image:
        """Return the RGB image in `data`, with this dataset's rules for transparency and rotation.

        Raises:
            ValueError: it cannot be decoded.
        """
        return decode(data, self.background, self.exif_orientation)

    def check(self, split: str, image_size: int, crop: Literal["center", "random"], conditional: bool = False) -> None:
        """Check that the split has images for these crops and, with `conditional`, a label for every image.

        Raises:
            ValueError: it does not; the message says which dataset is needed instead.
        """
        self.shards(split)
        if self.resolution is not None and (crop != "center" or image_size != self.resolution):
            raise ValueError(
                f"dataset {self.name!r} holds centre crops of {self.resolution} pixels (resolution={self.resolution}), "
                f"which cannot give crop={crop!r} of image_size={image_size}: prepare another dataset from the same "
                "source without --resolution" + (f", or with --resolution {image_size}" if crop == "center" else "")
            )
        if conditional and (split in self.unlabelled or not self.classes):
            raise ValueError(
                f"split {split!r} of dataset {self.name!r} has no labels (-1), but this job needs the class of every "
                "image: choose a split with labels, or a network without classes"
            )

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Return the shards of a split. Raises ValueError if there is no such split."""
        if split not in self.splits:
            raise ValueError(f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def row_group_sizes(self, split: str) -> tuple[int, ...]:
        """Return the number of rows of every row group of a split, over all its shards."""
        return tuple(rows for shard in self.shards(split) for rows in shard.row_groups)

    def num_samples(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(shard.rows for shard in self.shards(split))


def load_manifest(folder: str) -> Manifest:
    """Return the manifest of the dataset in `folder`.

    Raises:
        FileNotFoundError: no dataset was prepared there, or it is not finished.
        ValueError: it is not a manifest of this format.
    """
    uri = storage.join(folder, "manifest.json")
    try:
        manifest = Manifest.model_validate(storage.read_json(uri))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no finished dataset: run jobs/prepare_dataset.py first") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{uri} is not a manifest of format 1: {where}: {problem['msg']}") from error
    return manifest.model_copy(update={"folder": storage.resolve(folder)})


# ------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class StreamShare:
    """The share of a global batch that comes from one stream: n = B/P rows."""

    stream: int
    epoch: int
    images: np.ndarray  # uint8 [n, H, W, 3], cropped and flipped
    labels: np.ndarray  # int64 [n]; -1 if the dataset has no classes
    samples: np.ndarray  # int64 [n], global row numbers: with the epoch, the keys of all randomness
    flips: np.ndarray  # bool [n], True for rows that are mirrored
    undecodable: np.ndarray  # bool [n], True for rows with another row's image because theirs cannot be decoded


def batches(
    manifest: Manifest,
    order: OrderPlan,
    rank: int,
    world_size: int,
    position: int,
    image_size: int,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    split: str = "train",
    use_ray: bool = True,
    end: int | None = None,
) -> Iterator[list[StreamShare]]:
    """Yield this worker's share of every global batch from `position` (images seen) to `end` (None: without end).

    Each list holds one share for each of the worker's streams, in stream order. `flip` mirrors half of the images.
    Flips and crops depend only on (seed, epoch, sample). With `use_ray`, Ray actors read and decode ahead; otherwise
    this process reads and decodes.

    Raises:
        ValueError: the plan was not made for this split, or rank, world_size or position do not fit it.
        RuntimeError, OSError: data could not be read; the message names the shard.
    """
    if order.row_group_sizes != manifest.row_group_sizes(split):
        raise ValueError(f"the row groups of the order plan are not those of split={split!r} of {manifest.name!r}")
    order.locate(position)  # raise errors here rather than at the first batch
    order.open_bytes(world_size, image_size**2 * 3)  # likewise
    read = _Reader(manifest, split, order.seed, image_size, crop, flip, order.rows_per_stream)
    units = order.units(rank, world_size, position)
    if end is not None:
        last_step = order.locate(max(0, -(-end // order.batch_size) - 1) * order.batch_size)
        units = takewhile(lambda unit: (unit.epoch, unit.first // order.rows_per_stream) <= last_step, units)
    if use_ray:
        rows = min(READ_AHEAD_ROWS, READ_AHEAD_BYTES // (image_size**2 * 3))
        unit_rows = order.config.shuffle_row_groups * max(order.row_group_sizes)
        blocks = stream(units, read, ahead=max(READERS, rows // unit_rows))
    else:
        blocks = (block for unit in units for block in read(unit))
    steps = takewhile(lambda step: end is None or step[1] < end, order.steps(position))
    return _assemble(blocks, order, order.streams(rank, world_size), steps)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items. A thread computes the next one while the caller uses the last one."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _assemble(
    blocks: Iterator[Block], order: OrderPlan, streams: range, steps: Iterator[tuple[int, int]]
) -> Iterator[list[StreamShare]]:
    """Collect blocks by their stream, and take the rows of every step from each; `steps` gives their epochs."""
    waiting: dict[int, list[Block]] = {number: [] for number in streams}
    for epoch, _ in steps:
        shares = []
        for number, rows in waiting.items():
            while sum(len(block["samples"]) for block in rows) < order.rows_per_stream:
                block = next(blocks)
                waiting[int(block["stream"][0])].append(block)
            taken = _take(rows, order.rows_per_stream)
            del taken["stream"]  # one number for all rows
            shares.append(StreamShare(stream=number, epoch=epoch, **taken))
        yield shares


def _take(blocks: list[Block], count: int) -> Block:
    """Remove and return the first `count` rows of some blocks. Rows of a single block are not copied."""
    taken: list[Block] = []
    while count:
        block = blocks.pop(0)
        if len(block["samples"]) > count:
            blocks.insert(0, {name: column[count:] for name, column in block.items()})
            block = {name: column[:count] for name, column in block.items()}
        count -= len(block["samples"])
        taken.append(block)
    if len(taken) == 1:
        return taken[0]
    return {name: np.concatenate([block[name] for block in taken]) for name in taken[0]}


def read_images(manifest: Manifest, split: str, begin: int, end: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [begin, end) of a split as centre crops, uint8 [n, H, W, 3], and their labels, int64 [n].

    Raises:
        ValueError: the split has no such rows.
    """
    if not 0 <= begin < end <= manifest.num_samples(split):
        raise ValueError(
            f"rows [{begin}, {end}) are not in split {split!r}, which has {manifest.num_samples(split)} rows"
        )
    read = _Reader(manifest, split, seed=0, image_size=image_size, crop="center", flip=False)
    blocks: list[Block] = []
    first = 0
    for group, size in enumerate(manifest.row_group_sizes(split)):
        rows = np.arange(max(begin - first, 0), min(end - first, size))
        if len(rows):
            pairs = np.stack([np.full(len(rows), group), rows], axis=1)
            blocks += read(Unit(epoch=0, stream=0, first=0, rows=pairs))
        first += size
    images, labels = (np.concatenate([block[name] for block in blocks]) for name in ("images", "labels"))
    return images, labels


class _Reader:
    """A function that reads a unit and yields decoded blocks. It is sent to other processes, so it holds no data."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        seed: int,
        image_size: int,
        crop: Literal["center", "random"],
        flip: bool,
        rows_per_stream: int = 1,
    ) -> None:
        manifest.check(split, image_size, crop)
        sizes = np.array(manifest.row_group_sizes(split), dtype=np.int64)
        self._manifest = manifest
        self._row_groups = [(s, place) for s in manifest.shards(split) for place in range(len(s.row_groups))]
        self._first_samples = np.cumsum(sizes) - sizes
        self._numbers = {name: label for label, name in enumerate(manifest.classes)}
        self._num_classes = 0 if split in manifest.unlabelled else len(manifest.classes)
        self._seed, self._image_size, self._crop, self._flip = seed, image_size, crop, flip
        most = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (image_size**2 * 3)))
        # Blocks end where batches end, if a batch fits into a block: then no batch is assembled from pieces.
        self.block_rows = most // rows_per_stream * rows_per_stream or most

    def __call__(self, unit: Unit) -> Iterator[Block]:
        groups = {group: self._read_row_group(group) for group in unit.row_groups}
        begin = -unit.first % self.block_rows or self.block_rows
        for rows in np.split(unit.rows, range(begin, len(unit.rows), self.block_rows)):
            block = {
                "images": np.empty((len(rows), self._image_size, self._image_size, 3), np.uint8),
                "labels": np.empty(len(rows), np.int64),
                "samples": self._first_samples[rows[:, 0]] + rows[:, 1],
                "flips": np.zeros(len(rows), bool),
                "undecodable": np.zeros(len(rows), bool),
                "stream": np.full(len(rows), unit.stream),
            }
            for place, (group, row) in enumerate(rows.tolist()):
                self._fill(block, place, groups[group], group, row, unit.epoch)
            yield block

    def _read_row_group(self, group: int) -> pa.Table:
        shard, place = self._row_groups[group]
        columns = self._manifest.columns
        table = read_row_group(storage.join(self._manifest.root, shard.path), shard.bytes, place, columns)
        return table.rename_columns(dict(zip(columns, ("image", "label"), strict=False)))

    def _named(self, group: int) -> str:
        shard, place = self._row_groups[group]
        return f"row group {place} of {storage.join(self._manifest.root, shard.path)}"

    def _fill(self, block: Block, place: int, table: pa.Table, group: int, row: int, epoch: int) -> None:
        """Fill in one sample. If its image cannot be decoded, it gets the next good image of its row group."""
        sample = int(block["samples"][place])
        image, used_row = self._next_good(table, group, row)
        label = table["label"][used_row].as_py() if self._manifest.label_column else -1
        label = self._numbers.get(label, -1) if isinstance(label, str) else label
        if self._num_classes and not 0 <= label < self._num_classes:
            raise ValueError(
                f"label {label} of row {used_row} in {self._named(group)} is not in [0, {self._num_classes}); prepare "
                "the dataset again"
            )
        mirrored = self._flip and sample_rng(self._seed, epoch, sample, Purpose.FLIP).random() < 0.5
        if self._crop == "random":
            pixels = random_crop(image, self._image_size, sample_rng(self._seed, epoch, sample, Purpose.CROP))
        else:
            pixels = center_crop(image, self._image_size)
        block["images"][place] = pixels[:, ::-1] if mirrored else pixels
        block["labels"][place], block["flips"][place], block["undecodable"][place] = label, mirrored, used_row != row

    def _next_good(self, table: pa.Table, group: int, row: int) -> tuple[Image.Image, int]:
        """Return the first image from `row` on that can be decoded, and its row; after the last row comes the first."""
        for candidate in (*range(row, len(table)), *range(row)):
            try:
                return self._manifest.decode(table["image"][candidate].as_py() or b""), candidate
            except ValueError:
                continue  # counted by the caller: the row is marked as undecodable
        raise ValueError(f"no image of {self._named(group)} can be decoded")
