"""The manifest of a dataset, and the reading of batches from its shards.

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

# The limits of what a worker reads ahead, except that each reader always has one unit.
READ_AHEAD_BYTES = 256 << 20  # of decoded images
READ_AHEAD_ROWS = 16384  # reading further ahead only takes CPUs from the training
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
    row_groups: tuple[int, ...]  # number of rows in each


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """The content of a dataset."""

    format_version: Literal[1] = 1
    name: str
    classes: tuple[str, ...]  # names in the order of the labels; empty: all labels are -1
    splits: dict[str, tuple[Shard, ...]]
    unlabelled: tuple[str, ...] = ()  # splits whose labels are all -1 although there are classes
    width: tuple[int, int] | None  # smallest and largest in pixels; None: unknown
    height: tuple[int, int] | None
    quarantined: int  # images that were left out because they cannot be decoded
    resolution: int | None = None  # the images are ADM's centre crops of this size; None: original images
    registered: str | None = None  # folder of shards that are registered in place; None: they lie beside the manifest
    image_column: str = "image"  # column of the encoded bytes
    label_column: str | None = "label"  # column of the class numbers or names; None: there are no labels
    background: str = "drop"  # how images are decoded, see `orchestrator.data.images.decode_and_describe`
    exif_orientation: ExifOrientation = "ignore"
    content: str = ""  # SHA-256 of all images and labels in their order; empty if registered in place
    folder: str = Field("", exclude=True)  # URI of the folder from which the manifest was read; not stored

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the manifest, which identifies the dataset."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the path of the column of images and, if there are labels, that of their column."""
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
        self.shards(split)  # raises an error if there is no such split
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
    # Call both for their errors, which should be raised here rather than at the first batch.
    order.locate(position)
    order.open_bytes(world_size, image_size**2 * 3)
    read = _Reader(manifest, split, order.seed, image_size, crop, flip, order.rows_per_stream)
    units = order.units(rank, world_size, position)
    if end is not None:  # do not read units that are needed only after the last step; a step is (epoch, step within it)
        last_step = order.locate(max(0, -(-end // order.batch_size) - 1) * order.batch_size)
        units = takewhile(lambda unit: (unit.epoch, unit.first // order.rows_per_stream) <= last_step, units)
    if use_ray:
        rows_ahead = min(READ_AHEAD_ROWS, READ_AHEAD_BYTES // (image_size**2 * 3))
        rows_per_unit = order.config.shuffle_row_groups * max(order.row_group_sizes)
        blocks = stream(units, read, ahead=max(READERS, rows_ahead // rows_per_unit))
    else:
        blocks = (block for unit in units for block in read(unit))
    steps = takewhile(lambda step: end is None or step[1] < end, order.steps(position))
    return _assemble(blocks, order, order.streams(rank, world_size), steps)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, none of which is None. A thread computes the next one while the caller uses the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _assemble(
    blocks: Iterator[Block], order: OrderPlan, streams: range, steps: Iterator[tuple[int, int]]
) -> Iterator[list[StreamShare]]:
    """Queue the blocks of each stream, and yield the shares of every step, taken from the queues.

    steps: (epoch, position) of every step.
    """
    queues: dict[int, list[Block]] = {number: [] for number in streams}
    for epoch, _ in steps:
        shares = []
        for number, queue in queues.items():
            while sum(len(block["samples"]) for block in queue) < order.rows_per_stream:
                block = next(blocks)
                queues[int(block["stream"][0])].append(block)
            rows = _take(queue, order.rows_per_stream)
            del rows["stream"]  # `number`, repeated for all rows
            shares.append(StreamShare(stream=number, epoch=epoch, **rows))
        yield shares


def _take(blocks: list[Block], count: int) -> Block:
    """Remove the first `count` rows from a list of blocks, and return them. Rows of a single block are not copied."""
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
    first_row = 0  # of the row group, in the split
    for group, size in enumerate(manifest.row_group_sizes(split)):
        rows = np.arange(max(begin - first_row, 0), min(end - first_row, size))
        if len(rows):
            group_and_row = np.stack([np.full(len(rows), group), rows], axis=1)
            blocks += read(Unit(epoch=0, stream=0, first=0, rows=group_and_row))
        first_row += size
    images, labels = (np.concatenate([block[name] for block in blocks]) for name in ("images", "labels"))
    return images, labels


class _Reader:
    """A function that reads a unit and yields decoded blocks. It is pickled for other processes, so it holds no data.

    A block has a row for each sample, and the arrays of `StreamShare` with the number of the stream.
    """

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
        # The shard of every row group of the split, and the row group's index within that shard.
        self._row_groups = [(shard, i) for shard in manifest.shards(split) for i in range(len(shard.row_groups))]
        self._first_samples = np.cumsum(sizes) - sizes  # id of the first sample of every row group
        self._label_of_name = {name: label for label, name in enumerate(manifest.classes)}
        self._num_classes = 0 if split in manifest.unlabelled else len(manifest.classes)
        self._seed, self._image_size, self._crop, self._flip = seed, image_size, crop, flip
        max_rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (image_size**2 * 3)))
        # If a share fits into a block, end blocks where shares end: then no share is concatenated from several blocks.
        self.block_rows = max_rows // rows_per_stream * rows_per_stream or max_rows

    def __call__(self, unit: Unit) -> Iterator[Block]:
        tables = {group: self._read_row_group(group) for group in unit.row_groups}
        first_end = -unit.first % self.block_rows or self.block_rows
        for rows in np.split(unit.rows, range(first_end, len(unit.rows), self.block_rows)):
            block = {
                "images": np.empty((len(rows), self._image_size, self._image_size, 3), np.uint8),
                "labels": np.empty(len(rows), np.int64),
                "samples": self._first_samples[rows[:, 0]] + rows[:, 1],
                "flips": np.zeros(len(rows), bool),
                "undecodable": np.zeros(len(rows), bool),
                "stream": np.full(len(rows), unit.stream),
            }
            for i, (group, row) in enumerate(rows.tolist()):
                self._fill(block, i, tables[group], group, row, unit.epoch)
            yield block

    def _read_row_group(self, group: int) -> pa.Table:
        """Return the columns image and, if there are labels, label of a row group."""
        shard, index = self._row_groups[group]
        columns = self._manifest.columns
        table = read_row_group(storage.join(self._manifest.root, shard.path), shard.bytes, index, columns)
        return table.rename_columns(dict(zip(columns, ("image", "label"), strict=False)))

    def _describe(self, group: int) -> str:
        shard, index = self._row_groups[group]
        return f"row group {index} of {storage.join(self._manifest.root, shard.path)}"

    def _fill(self, block: Block, i: int, table: pa.Table, group: int, row: int, epoch: int) -> None:
        """Fill row i of a block with `row` of a row group.

        If its image cannot be decoded, use image and label of the next row of the row group whose image can.
        """
        sample = int(block["samples"][i])
        image, used_row = self._decode_from(table, group, row)
        label = table["label"][used_row].as_py() if self._manifest.label_column else -1
        label = self._label_of_name.get(label, -1) if isinstance(label, str) else label
        if self._num_classes and not 0 <= label < self._num_classes:
            raise ValueError(
                f"label {label} of row {used_row} in {self._describe(group)} is not in [0, {self._num_classes}); "
                "prepare the dataset again"
            )
        mirrored = self._flip and sample_rng(self._seed, epoch, sample, Purpose.FLIP).random() < 0.5
        if self._crop == "random":
            pixels = random_crop(image, self._image_size, sample_rng(self._seed, epoch, sample, Purpose.CROP))
        else:
            pixels = center_crop(image, self._image_size)
        block["images"][i] = pixels[:, ::-1] if mirrored else pixels
        block["labels"][i] = label
        block["flips"][i] = mirrored
        block["undecodable"][i] = used_row != row

    def _decode_from(self, table: pa.Table, group: int, row: int) -> tuple[Image.Image, int]:
        """Return the first image from `row` on that can be decoded, and its row; after the last row comes the first."""
        for candidate in (*range(row, len(table)), *range(row)):
            try:
                return self._manifest.decode(table["image"][candidate].as_py() or b""), candidate
            except ValueError:
                continue  # the caller marks the row as undecodable
        raise ValueError(f"no image of {self._describe(group)} can be decoded; repair the file")
