"""Datasets: from images as people have them to shuffled Parquet shards, and from shards to microbatches.

On disk a dataset is `manifest.json` and Parquet shards with the columns `key`, `label`, `image` (the encoded bytes
as they were), `width` and `height`. All keys are shuffled by seed before they are dealt to shards, so that any
row group is a fair sample. A sample's id is its global row number in its split.
"""

import hashlib
import io
import json
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from cluster.stream import Block, stream
from orchestrator import storage
from orchestrator.config import JobConfig, claim
from orchestrator.order import OrderPlan, Purpose, Unit, keyed_rng, sample_rng
from orchestrator.pictures import grid_png
from orchestrator.progress import progress_line
from orchestrator.tracking import tracked

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ROW_GROUP_IMAGES = 128  # at most, at least half of it
SHARD_BYTES = 64 << 20  # at least where there is so much, at most twice
MIN_ROW_GROUPS = 16  # of a split with that many images: four for each of four streams
READ_AHEAD_BYTES = 64 << 20  # decoded images that one pipeline reads; a worker holds two such
CONTACT_SHEET_PIXELS = 64  # largest size of an image on the sheet that shows a prepared dataset
READ_AHEAD_ROWS = 8192  # and no more of them: what is read further ahead only takes CPUs from the training
BLOCK_ROWS = 64  # decoded at a time

# Odd EXIF blocks and palettes: the image decodes all the same, and a user can do nothing about it.
warnings.filterwarnings("ignore", module=r"PIL\.")

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
_METADATA_KEY = b"admiral"  # in a shard's footer: what the manifest gathers from it

# ---------------------------------------------------------------------------------------------------- manifest


class Shard(BaseModel, frozen=True, extra="forbid"):
    """One Parquet object of a dataset."""

    path: str  # relative to the manifest's folder
    bytes: int
    rows: int
    row_groups: tuple[int, ...]  # rows of each


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What a dataset holds. `folder` is where it was read from, and no part of it."""

    format_version: Literal[1] = 1
    name: str
    classes: tuple[str, ...]  # names in the order of the labels; none: the labels are -1
    splits: dict[str, tuple[Shard, ...]]
    width: tuple[int, int]  # smallest and largest, pixels
    height: tuple[int, int]  # smallest and largest, pixels
    quarantined: int  # images that could not be decoded and were left out
    folder: str = Field("", exclude=True)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split; ValueError where there is no such split."""
        if split not in self.splits:
            raise ValueError(f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def row_group_sizes(self, split: str) -> tuple[int, ...]:
        """Rows of every row group of a split, over all its shards."""
        return tuple(rows for shard in self.shards(split) for rows in shard.row_groups)

    def num_samples(self, split: str) -> int:
        """Rows of a split."""
        return sum(shard.rows for shard in self.shards(split))


def load_manifest(folder: str) -> Manifest:
    """The manifest of the dataset in `folder`.

    Raises:
        FileNotFoundError: nothing was prepared there, or not to its end.
        ValueError: it is not a manifest of this format.
    """
    uri = storage.join(folder, "manifest.json")
    try:
        found = Manifest.model_validate(storage.read_json(uri))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no finished dataset: prepare it first") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{uri} is not a manifest of format 1: {where}: {problem['msg']}") from error
    return found.model_copy(update={"folder": storage.resolve(folder)})


# ----------------------------------------------------------------------------------------------------- prepare


class PrepareConfig(JobConfig):
    """Preparing a dataset."""

    source: str  # folder or URI of a tree <class>/<image>; or digits, scikit-learn's 1,797 scanned digits
    output: str  # the dataset's folder
    name: str  # what reports call the dataset
    seed: int = Field(0, ge=0, lt=2**64)  # of the shuffle and of the split
    validation_fraction: float = Field(0.0, ge=0, lt=1)  # share of the images kept from training
    max_corrupt_fraction: float = Field(0.001, ge=0, le=1)  # stop where a larger share cannot be decoded


@dataclass(frozen=True)
class Source:
    """Encoded images to prepare: their labels are at hand, their bytes are read on demand."""

    classes: tuple[str, ...]
    labels: dict[str, int]  # key -> label, in the order of the keys
    read: Callable[[str], bytes]


@dataclass(frozen=True)
class _ShardPlan:
    """One shard to write: a run of keys, cut into row groups."""

    path: str
    row_groups: list[list[str]]

    @property
    def num_keys(self) -> int:
        return sum(map(len, self.row_groups))


def prepare(config: PrepareConfig) -> Manifest:
    """Shuffle, split and shard the source; answer the manifest, which is written last.

    Finished shards are kept and a finished dataset is found, so that the same command goes on where it stopped.
    Images that cannot be decoded go to `quarantine.json` with their key and the reason.

    Raises:
        ValueError: the source is unfit, or the folder holds another dataset.
        RuntimeError: more than `max_corrupt_fraction` of the images cannot be decoded.
    """
    output = config.path(config.output)
    if storage.exists(storage.join(output, "manifest.json")):
        claim(output, config)
        return load_manifest(output)
    source = _open_source(config)
    claim(output, config)
    _hold_source(output, source)
    splits = {split: _plan_shards(split, keys, source) for split, keys in _split(source, config).items()}

    there = set(storage.list_names(output))
    allowed = math.floor(config.max_corrupt_fraction * len(source.labels))
    shards: dict[str, list[Shard]] = {split: [] for split in splits}
    facts: list[dict[str, Any]] = []
    done = 0
    with progress_line(len(source.labels), "images") as progress:
        for split, plans in splits.items():
            for shard_plan in plans:
                if shard_plan.path not in there:
                    _write_shard(output, shard_plan, source)
                shard, shard_facts = _read_footer(output, shard_plan.path)
                shards[split].append(shard)
                facts.append(shard_facts)
                _check_quarantine([entry for fact in facts for entry in fact["quarantine"]], allowed)
                done += shard_plan.num_keys
                progress.update_to(done)

    quarantine = [entry for fact in facts for entry in fact["quarantine"]]
    storage.write_json(storage.join(output, "quarantine.json"), quarantine)
    manifest = Manifest(
        name=config.name,
        classes=source.classes,
        splits={split: tuple(found) for split, found in shards.items()},
        width=_span(fact["width"] for fact in facts),
        height=_span(fact["height"] for fact in facts),
        quarantined=len(quarantine),
    )
    storage.create_bytes(storage.join(output, "manifest.json"), storage.json_bytes(manifest.model_dump(mode="json")))
    return load_manifest(output)


def prepare_and_track(config: PrepareConfig) -> str:
    """`prepare` with its MLflow run and a contact sheet; answer the dataset's URI. Raises what `prepare` does."""
    output = config.path(config.output)
    with tracked("prepare", config, output) as tracker:
        manifest = prepare(config)
        counts = {split: manifest.num_samples(split) for split in manifest.splits}
        tracker.metrics({**counts, "quarantined": manifest.quarantined})
        size = min(CONTACT_SHEET_PIXELS, manifest.width[0], manifest.height[0])
        images, _ = read_images(manifest, "train", 0, min(100, counts["train"]), size)
        tracker.picture("contact-sheet.png", grid_png(images, columns=10))
    described = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{output}: {described} images of {len(manifest.classes)} classes, {manifest.quarantined} quarantined")
    return output


def plan(config: PrepareConfig) -> str:
    """What preparing would read and write."""
    output = config.path(config.output)
    if storage.exists(storage.join(output, "manifest.json")):
        return f"{output} is prepared already"
    source = _open_source(config)
    lines = [f"reads   {config.source}: {len(source.labels):,} images in {len(source.classes)} classes"]
    for split, keys in _split(source, config).items():
        plans = _plan_shards(split, keys, source)
        groups = sum(len(shard.row_groups) for shard in plans)
        lines.append(f"writes  {output}: {split}: {len(keys):,} images, {groups} row groups, {len(plans)} shards")
    return "\n".join(lines)


def _open_source(config: PrepareConfig) -> Source:
    source = digits_source() if config.source == "digits" else folder_source(config.path(config.source))
    empty = set(range(len(source.classes))) - set(source.labels.values())
    if empty or not source.labels:
        named = ", ".join(source.classes[label] for label in sorted(empty)[:5]) or "all"
        raise ValueError(f"source={config.source} has no images of some classes: {named}")
    return source


def digits_source() -> Source:
    """scikit-learn's 1,797 scanned digits as greyscale PNGs of 8x8 pixels, with the full range of grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    keys = [f"digit-{index:04d}" for index in range(len(digits.target))]
    pixels = dict(zip(keys, np.round(digits.images * (255 / 16)).astype(np.uint8), strict=True))

    def read(key: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels[key]).save(file, "PNG")
        return file.getvalue()

    labels = dict(zip(keys, map(int, digits.target), strict=True))
    return Source(tuple(map(str, digits.target_names)), labels, read)


def folder_source(uri: str) -> Source:
    """A tree <class>/<image>, classes in the order of their sorted names; a key is the path beneath `uri`.

    Raises:
        ValueError: there are no images, or some that lie in no class folder.
    """
    names = [name for name in storage.list_names(uri, recursive=True) if name.lower().endswith(IMAGE_ENDINGS)]
    if not names:
        raise ValueError(f"source={uri} holds no images ({', '.join(IMAGE_ENDINGS)})")
    if stray := [name for name in names if "/" not in name]:
        raise ValueError(f"source={uri}: {len(stray)} images lie in no class folder, {stray[0]} among them")
    classes = sorted({name.split("/", 1)[0] for name in names})
    number = {name: label for label, name in enumerate(classes)}
    labels = {name: number[name.split("/", 1)[0]] for name in names}
    return Source(tuple(classes), labels, lambda key: storage.read_bytes(storage.join(uri, key)))


def _hold_source(output: str, source: Source) -> None:
    """Shards of an earlier attempt fit only if the source still holds the same keys and labels."""
    digest = hashlib.sha256(json.dumps([source.classes, source.labels]).encode()).hexdigest()
    record = {"images": len(source.labels), "sha256": digest}
    uri = storage.join(output, "source.json")
    if not storage.create_bytes(uri, storage.json_bytes(record)) and (held := storage.read_json(uri)) != record:
        raise ValueError(
            f"{output} was begun from a source of {held['images']} images; it has changed (now {len(source.labels)} "
            "images, or other names or classes): choose another output"
        )


def _split(source: Source, config: PrepareConfig) -> dict[str, list[str]]:
    """All keys in their shuffled order, the validation images first cut off."""
    keys = sorted(source.labels)
    keys = [keys[i] for i in keyed_rng(Purpose.SHARDS, config.seed).permutation(len(keys))]
    held_out = math.ceil(round(config.validation_fraction * len(keys), 6))
    splits = {"train": keys[held_out:], "validation": keys[:held_out]}
    return {split: part for split, part in splits.items() if part}


def _plan_shards(split: str, keys: list[str], source: Source) -> list[_ShardPlan]:
    """Cut a split's keys into row groups and those into shards, powers of two of each.

    Row groups that are a power of two in number, and equal within one row, deal evenly to any number of streams.
    """
    num_groups = MIN_ROW_GROUPS
    while len(keys) > ROW_GROUP_IMAGES * num_groups:
        num_groups *= 2
    num_groups = min(num_groups, 2 ** int(math.log2(len(keys))))
    bounds = [index * len(keys) // num_groups for index in range(num_groups + 1)]
    groups = [keys[start:end] for start, end in pairwise(bounds)]

    probe = [len(source.read(key)) for key in keys[:32]]  # shuffled, hence a fair sample
    num_shards = 1
    while num_shards < num_groups and sum(probe) / len(probe) * len(keys) >= 2 * SHARD_BYTES * num_shards:
        num_shards *= 2
    share = num_groups // num_shards
    return [
        _ShardPlan(f"{split}-{i:05d}-of-{num_shards:05d}.parquet", groups[i * share : (i + 1) * share])
        for i in range(num_shards)
    ]


def _write_shard(output: str, shard: _ShardPlan, source: Source) -> None:
    """Write one shard, the same bytes every time; what cannot be decoded goes into its footer's quarantine."""
    quarantine: list[dict[str, str]] = []
    sizes: list[tuple[int, int]] = []
    with storage.open_output(storage.join(output, shard.path)) as file:
        writer = pq.ParquetWriter(file, _SCHEMA, compression="none", use_dictionary=False)
        for keys in shard.row_groups:
            rows = []
            for key in keys:
                data = source.read(key)
                try:
                    width, height = decode(data).size
                except ValueError as error:
                    quarantine.append({"key": key, "reason": str(error)})
                    continue
                sizes.append((width, height))
                rows.append({"key": key, "label": source.labels[key], "image": data, "width": width, "height": height})
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), row_group_size=len(rows))
        widths, heights = zip(*sizes, strict=True) if sizes else ((), ())
        facts = {"quarantine": quarantine, "width": _span([widths]), "height": _span([heights])}
        writer.add_key_value_metadata({_METADATA_KEY.decode(): json.dumps(facts)})
        writer.close()


def _read_footer(output: str, path: str) -> tuple[Shard, dict[str, Any]]:
    """What a finished shard says of itself."""
    with storage.open_input(storage.join(output, path)) as file:
        footer = pq.read_metadata(file)
        size = file.seek(0, io.SEEK_END)
    row_groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    shard = Shard(path=path, bytes=size, rows=footer.num_rows, row_groups=row_groups)
    return shard, json.loads(footer.metadata[_METADATA_KEY])


def _check_quarantine(quarantine: list[dict[str, str]], allowed: int) -> None:
    if len(quarantine) > allowed:
        named = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in quarantine[:3])
        raise RuntimeError(
            f"{len(quarantine)} images cannot be decoded, more than the {allowed} that max_corrupt_fraction allows: "
            f"{named}"
        )


def _span(values: Iterable[Iterable[int]]) -> tuple[int, int]:
    """Smallest and largest of all; (0, 0) of nothing."""
    found = [value for part in values for value in part if value]
    return (min(found), max(found)) if found else (0, 0)


# ------------------------------------------------------------------------------------------- decoding and crops


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB image, by the published code's rule: Pillow's conversion.

    Grey is repeated, palettes are looked up, CMYK is converted without a profile, alpha is dropped, the EXIF
    orientation is not applied.

    Raises:
        ValueError: they cannot be decoded to the end.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more pixels than Pillow takes: {error}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's training crop, uint8 [size, size, 3]: the shorter side to `size`, then the middle."""
    pixels = np.asarray(_shrink(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """The crop of ADM's classifier, uint8 [size, size, 3]: the shorter side uniform in [size, ceil(size / 0.8)],
    then anywhere."""
    pixels = np.asarray(_shrink(image, int(rng.integers(size, math.ceil(size / 0.8), endpoint=True))))
    top = rng.integers(0, pixels.shape[0] - size, endpoint=True)
    left = rng.integers(0, pixels.shape[1] - size, endpoint=True)
    return pixels[top : top + size, left : left + size]


def _shrink(image: Image.Image, shorter: int) -> Image.Image:
    """Halve by BOX while the shorter side is at least twice `shorter`, then BICUBIC until it is `shorter`."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------- microbatches


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One stream's share of a global batch, n = B/P rows."""

    stream: int
    epoch: int
    images: np.ndarray  # uint8 [n, H, W, 3], cropped and flipped
    labels: np.ndarray  # int64 [n]; -1 where the dataset has no classes
    samples: np.ndarray  # int64 [n], global row numbers: with the epoch, the keys of all randomness
    flips: np.ndarray  # bool [n], which rows are mirrored
    replaced: np.ndarray  # bool [n], which rows show another row's image since their own cannot be decoded


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
) -> Iterator[list[Microbatch]]:
    """This worker's share of every global batch from `position` (images seen) to `end` (None: without end).

    Each list holds one microbatch for each of the worker's streams, in stream order. `flip` mirrors half of the
    images. Flips and crops depend on (seed, epoch, sample) alone. With `use_ray` a Ray Data pipeline fetches and
    decodes ahead; without, the same happens in this process.

    Raises:
        ValueError: the plan was not made for this split, or rank, world_size or position do not fit it.
        RuntimeError, OSError: data could not be read; the message names the shard.
    """
    if order.row_group_sizes != manifest.row_group_sizes(split):
        raise ValueError(f"the order plan was made for other row groups than those of split={split!r}")
    order.locate(position)  # refuse it here rather than at the first batch
    read = _Reader(manifest, split, order.config.seed, image_size, crop, flip)
    units = order.units(rank, world_size, position)
    if end is not None:
        last_epoch, _ = order.locate(end)
        units = takewhile(lambda unit: unit.epoch <= last_epoch, units)
    if use_ray:
        rows = min(READ_AHEAD_ROWS, READ_AHEAD_BYTES // (image_size**2 * 3))
        blocks = stream(units, read, chunk=max(2, rows // (order.config.window * max(order.row_group_sizes))))
    else:
        blocks = (block for unit in units for block in read(unit))
    steps = takewhile(lambda step: end is None or step[1] < end, order.steps(position))
    return _assemble(blocks, order, order.streams(rank, world_size), steps)


def _assemble(
    blocks: Iterator[Block], order: OrderPlan, streams: range, steps: Iterator[tuple[int, int]]
) -> Iterator[list[Microbatch]]:
    """Deal blocks to their streams, and take every step's rows from each; `steps` gives their epochs."""
    waiting = {number: _Waiting() for number in streams}
    for epoch, _ in steps:
        microbatches = []
        for number, rows in waiting.items():
            while rows.count < order.rows_per_stream:
                block = next(blocks)
                waiting[int(block["stream"][0])].add(block)
            taken = rows.take(order.rows_per_stream)
            microbatches.append(
                Microbatch(
                    stream=number,
                    epoch=epoch,
                    images=taken["image"],
                    labels=taken["label"],
                    samples=taken["sample"],
                    flips=taken["flip"],
                    replaced=taken["replaced"],
                )
            )
        yield microbatches


def read_images(manifest: Manifest, split: str, begin: int, end: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [begin, end) of a split, centre-cropped: uint8 [n, H, W, 3], and their labels int64 [n].

    Raises:
        ValueError: the split has no such rows.
    """
    if not 0 <= begin < end <= manifest.num_samples(split):
        raise ValueError(f"split {split!r} has {manifest.num_samples(split)} rows, and no range [{begin}, {end})")
    read = _Reader(manifest, split, seed=0, image_size=image_size, crop="center", flip=False)
    blocks: list[Block] = []
    first = 0
    for group, size in enumerate(manifest.row_group_sizes(split)):
        rows = np.arange(max(begin - first, 0), min(end - first, size))
        if len(rows):
            pairs = np.stack([np.full(len(rows), group), rows], axis=1)
            blocks += read(Unit(epoch=0, stream=0, first=0, rows=pairs))
        first += size
    images, labels = (np.concatenate([block[name] for block in blocks]) for name in ("image", "label"))
    return images, labels


class _Waiting:
    """Decoded rows of one stream that no batch has taken yet."""

    def __init__(self) -> None:
        self.count = 0
        self._blocks: list[Block] = []

    def add(self, block: Block) -> None:
        self._blocks.append(block)
        self.count += len(block["sample"])

    def take(self, count: int) -> Block:
        """The first `count` rows."""
        taken: list[Block] = []
        missing = count
        while missing:
            block = self._blocks.pop(0)
            if len(block["sample"]) > missing:
                self._blocks.insert(0, {name: column[missing:] for name, column in block.items()})
                block = {name: column[:missing] for name, column in block.items()}
            missing -= len(block["sample"])
            taken.append(block)
        self.count -= count
        return {name: np.concatenate([block[name] for block in taken]) for name in taken[0]}


class _Reader:
    """Unit -> decoded blocks. It travels to the tasks that read, hence holds locations only."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        seed: int,
        image_size: int,
        crop: Literal["center", "random"],
        flip: bool,
    ) -> None:
        shards = manifest.shards(split)
        sizes = np.array(manifest.row_group_sizes(split), dtype=np.int64)
        self._uris = [storage.join(manifest.folder, shard.path) for shard in shards]
        self._places = np.array([(i, j) for i, shard in enumerate(shards) for j in range(len(shard.row_groups))])
        self._first_samples = np.cumsum(sizes) - sizes
        self._num_classes = len(manifest.classes)
        self._seed, self._image_size, self._crop, self._flip = seed, image_size, crop, flip

    def __call__(self, unit: Unit) -> Iterator[Block]:
        groups = {group: self._read_row_group(group) for group in unit.row_groups}
        for start in range(0, len(unit.rows), BLOCK_ROWS):
            rows = [
                self._row(groups[int(group)], int(group), int(row), unit)
                for group, row in unit.rows[start : start + BLOCK_ROWS]
            ]
            columns = zip(*rows, strict=True)
            names = ("image", "label", "sample", "flip", "replaced")
            block = {name: np.stack(column) for name, column in zip(names, columns, strict=True)}
            yield block | {"stream": np.full(len(rows), unit.stream)}

    def _read_row_group(self, group: int) -> pa.Table:
        shard, place = self._places[group]
        uri = self._uris[shard]
        try:
            with storage.open_input(uri) as file:
                return pq.ParquetFile(file, pre_buffer=True).read_row_group(int(place), columns=["label", "image"])
        except pa.ArrowInvalid as error:
            raise ValueError(f"{uri} is not a sound Parquet shard: {error}") from error

    def _row(
        self, table: pa.Table, group: int, row: int, unit: Unit
    ) -> tuple[np.ndarray, np.int64, np.int64, np.bool_, np.bool_]:
        """One sample, under its own id even where the image is the next good one of its row group."""
        sample = int(self._first_samples[group]) + row
        image, found = self._next_good(table, group, row)
        label = table["label"][found].as_py()
        if self._num_classes and not 0 <= label < self._num_classes:
            raise ValueError(
                f"label {label} of row {found} in row group {self._places[group][1]} of "
                f"{self._uris[self._places[group][0]]} is not in [0, {self._num_classes})"
            )
        if self._crop == "random":
            pixels = random_crop(image, self._image_size, sample_rng(self._seed, unit.epoch, sample, Purpose.CROP))
        else:
            pixels = center_crop(image, self._image_size)
        mirrored = self._flip and sample_rng(self._seed, unit.epoch, sample, Purpose.FLIP).random() < 0.5
        if mirrored:
            pixels = pixels[:, ::-1]
        return pixels, np.int64(label), np.int64(sample), np.bool_(mirrored), np.bool_(found != row)

    def _next_good(self, table: pa.Table, group: int, row: int) -> tuple[Image.Image, int]:
        """The first image from `row` on, around the row group, that can be decoded, and its row."""
        for step in range(len(table)):
            found = (row + step) % len(table)
            try:
                return decode(table["image"][found].as_py()), found
            except ValueError:
                continue  # counted by the caller: the row is marked as replaced
        shard, place = self._places[group]
        raise ValueError(f"no image of row group {place} of {self._uris[shard]} can be decoded")
