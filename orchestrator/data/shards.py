"""Writing shards: a plan that says which image goes where, and the worker that follows it.

The plan lies beside the shards: `index.parquet` with the place of every image in the source, one row group for each
shard, and `index.json`. So a worker reads what concerns it, and no process holds more than one shard's images.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from orchestrator import storage
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import SCHEMA, Shard
from orchestrator.data.images import ExifOrientation, decode_and_describe
from orchestrator.data.sources import Findings, Source, finding, read_ranges
from orchestrator.data.sources.index import INDEX, Finding
from orchestrator.data.understanding import Understanding
from orchestrator.pictures import png

ROW_GROUP_IMAGES = 128  # at most, at least half of it
SHARD_BYTES = 64 << 20  # at least where there is so much, at most twice
MIN_ROW_GROUPS = 16  # of a split with that many images: four for each of four streams
FETCH_BYTES = 64 << 20  # of encoded images that a worker reads at once; it holds two such
_METADATA_KEY = b"admiral"  # in a shard's footer: what the manifest gathers from it
_FACTS_BUFFER = 64 << 10  # bytes fetched at a time of columns that are small

# The readers' columns, and which bytes an image was made from.
SHARD_SCHEMA = SCHEMA.append(pa.field("sha256", pa.binary(32), nullable=False))


class ShardPlan(BaseModel, frozen=True, extra="forbid"):
    """One shard to write: a run of images, cut into row groups."""

    path: str
    split: str
    row_groups: tuple[int, ...]  # images of each

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All shards to write, and what they are made from."""

    source: str  # URI
    digest: str  # of the source's listing
    classes: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    background: str  # how images are decoded
    exif_orientation: ExifOrientation
    understanding: Understanding

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))


class Facts(NamedTuple):
    """What a finished shard says of itself."""

    shard: Shard
    quarantine: list[dict[str, str]]  # key and reason
    width: tuple[int, int]  # smallest and largest
    height: tuple[int, int]
    findings: Findings  # transparent and rotated images
    rows: pa.Table  # key, label and sha256


# ------------------------------------------------------------------------------------------------- the plan


def plan_split(split: str, count: int, image_bytes: float) -> list[ShardPlan]:
    """Cut a split into row groups and those into shards, powers of two of each.

    Row groups that are a power of two in number, and equal within one row, deal evenly to any number of streams.
    """
    num_groups = MIN_ROW_GROUPS
    while count > ROW_GROUP_IMAGES * num_groups:
        num_groups *= 2
    num_groups = min(num_groups, 2 ** int(math.log2(count)))
    bounds = [index * count // num_groups for index in range(num_groups + 1)]
    groups = [end - start for start, end in pairwise(bounds)]
    num_shards = 1
    while num_shards < num_groups and image_bytes * count >= 2 * SHARD_BYTES * num_shards:
        num_shards *= 2
    share = num_groups // num_shards
    return [
        ShardPlan(
            path=f"{split}-{i:05d}-of-{num_shards:05d}.parquet",
            split=split,
            row_groups=tuple(groups[i * share : (i + 1) * share]),
        )
        for i in range(num_shards)
    ]


def plan_shards(source: Source, order: dict[str, np.ndarray], resolution: int | None) -> tuple[ShardPlan, ...]:
    """Return the shards of every split, given the rows of the source's index in their order."""
    sizes, shards = source.index["size"].to_numpy(), []
    for split, rows in order.items():
        stored = 2 * resolution**2 if resolution else float(sizes[rows].mean())  # a PNG takes two thirds of its pixels
        shards += plan_split(split, len(rows), stored or source.size / len(source.index))
    return tuple(shards)


def write_plan(output: str, plan: Plan, source: Source, order: dict[str, np.ndarray]) -> None:
    """Put the plan beside the shards that it is for: `index.json` comes last."""
    rows, begin = np.concatenate(list(order.values())), 0
    with storage.open_output(storage.join(output, "index.parquet")) as file, pq.ParquetWriter(file, INDEX) as writer:
        for shard in plan.shards:
            chosen = rows[begin : begin + shard.num_images]
            writer.write_table(source.index.take(chosen), row_group_size=len(chosen))
            begin += len(chosen)
    storage.put_if_absent(storage.join(output, "index.json"), storage.json_bytes(plan.model_dump(mode="json")))


def read_plan(output: str) -> Plan | None:
    """The plan that an earlier attempt made; None if it made none."""
    uri = storage.join(output, "index.json")
    return Plan.model_validate(storage.read_json(uri)) if storage.exists(uri) else None


# ------------------------------------------------------------------------------------------------- in every worker


def make_shard_writer(output: str, resolution: int | None) -> Callable[[int], Facts]:
    """A worker: from the number of a shard to its facts; a shard that is there already is not written again."""
    plan = read_plan(output)
    assert plan is not None
    places = pq.ParquetFile(storage.open_input(storage.join(output, "index.parquet")))
    read = partial(read_ranges, plan.source)

    def row(place: dict[str, Any], data: bytes) -> _Row:
        return _row(plan.background, plan.exif_orientation, resolution, place, data)

    def write(number: int) -> Facts:
        shard = plan.shards[number]
        if not storage.exists(storage.join(output, shard.path)):
            _write_shard(output, shard, places.read_row_group(number), read, row)
        return read_facts(output, shard.path)

    return write


def _write_shard(
    output: str,
    shard: ShardPlan,
    places: pa.Table,
    read: Callable[[Sequence[storage.Range]], list[bytes]],
    row: Callable[[dict[str, Any], bytes], "_Row"],
) -> None:
    """Write one shard, the same bytes every time; what cannot be decoded goes into its footer's quarantine."""
    quarantine: list[dict[str, str]] = []
    found: dict[str, list[str]] = {"transparent_images": [], "rotated_images": []}
    sizes: list[tuple[int, int]] = []
    with storage.open_output(storage.join(output, shard.path)) as file:
        writer = pq.ParquetWriter(file, SHARD_SCHEMA, compression="none", use_dictionary=False)
        for group, images in _row_groups(shard, places, read):
            rows = []
            for place, data in zip(group.to_pylist(), images, strict=True):
                try:
                    made = row(place, data)
                except ValueError as error:
                    quarantine.append({"key": place["key"], "reason": str(error)})
                    continue
                sizes.append((made.columns["width"], made.columns["height"]))
                rows.append(made.columns)
                for kind, here in zip(found, (made.transparent, made.rotated), strict=True):
                    found[kind] += [place["key"]] if here else []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), row_group_size=len(rows))
        smallest, largest = ((min(n), max(n)) for n in zip(*sizes, strict=True)) if sizes else ((0, 0), (0, 0))
        findings = {kind: finding(keys).model_dump() for kind, keys in found.items() if keys}
        facts = {"quarantine": quarantine, "width": smallest, "height": largest, "findings": findings}
        writer.add_key_value_metadata({_METADATA_KEY.decode(): json.dumps(facts)})
        writer.close()


def _row_groups(
    shard: ShardPlan, places: pa.Table, read: Callable[[Sequence[storage.Range]], list[bytes]]
) -> Iterator[tuple[pa.Table, list[bytes]]]:
    """Every row group's places and encoded images; the next images are fetched while these are decoded."""
    runs: list[list[int]] = [[]]  # row groups that are fetched together
    sizes, begin, fetched = places["size"].to_numpy(), 0, 0
    for count in shard.row_groups:
        size = int(sizes[begin : begin + count].sum())
        if runs[-1] and fetched + size > FETCH_BYTES:
            runs.append([])
            fetched = 0
        runs[-1].append(count)
        begin, fetched = begin + count, fetched + size

    def fetch(begin: int, count: int) -> list[bytes]:
        wanted = places.slice(begin, count)
        columns = (wanted[name].to_pylist() for name in ("key", "object", "start", "size"))
        return read([storage.Range(name or key, *place) for key, name, *place in zip(*columns, strict=True)])

    starts = np.cumsum([0, *map(sum, runs)])
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(fetch, 0, sum(runs[0]))
        for number, run in enumerate(runs):
            images = coming.result()
            if number + 1 < len(runs):
                coming = ahead.submit(fetch, int(starts[number + 1]), sum(runs[number + 1]))
            begin = 0
            for count in run:
                yield places.slice(starts[number] + begin, count), images[begin : begin + count]
                begin += count


class _Row(NamedTuple):
    """One row of a shard, and what was found in the image's file."""

    columns: dict[str, Any]
    transparent: bool
    rotated: bool


def _row(
    background: str, exif_orientation: ExifOrientation, resolution: int | None, place: dict[str, Any], data: bytes
) -> _Row:
    """Return one row of a shard; ValueError where the image cannot be decoded."""
    image, transparent, rotated = decode_and_describe(data, background, exif_orientation)
    digest = hashlib.sha256(data).digest()
    if resolution is not None:
        data = png(center_crop(image, resolution))
    width, height = (resolution, resolution) if resolution is not None else image.size
    columns = {
        "key": place["key"],
        "label": place["label"],
        "image": data,
        "width": width,
        "height": height,
        "sha256": digest,
    }
    return _Row(columns, transparent, rotated)


def read_facts(output: str, path: str) -> Facts:
    """What a finished shard says of itself, without its images."""
    with storage.open_input(storage.join(output, path), _FACTS_BUFFER) as file:
        size = file.seek(0, io.SEEK_END)
        shard_file = pq.ParquetFile(file)
        footer = shard_file.metadata
        rows = shard_file.read(columns=["key", "label", "sha256"])
    row_groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    shard = Shard(path=path, bytes=size, rows=footer.num_rows, row_groups=row_groups)
    facts = json.loads(footer.metadata[_METADATA_KEY])
    findings = {kind: Finding.model_validate(found) for kind, found in facts["findings"].items()}
    return Facts(shard, facts["quarantine"], tuple(facts["width"]), tuple(facts["height"]), findings, rows)
