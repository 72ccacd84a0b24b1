"""Writing of shards: a plan that assigns every image to a shard, and the worker that writes one shard.

The plan lies beside the shards. `index.parquet` has the place of every image in the source, with one row group for each
shard, and `index.json` has the rest. A worker reads only its part, and no process holds more than one shard's images.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from orchestrator import storage
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import SCHEMA, Shard, ahead
from orchestrator.data.images import ExifOrientation, decode_and_describe
from orchestrator.data.sources.archives import read_ranges
from orchestrator.data.sources.index import INDEX, Finding, Findings, Source, finding
from orchestrator.data.understanding import Understanding
from orchestrator.pictures import png

ROW_GROUP_IMAGES = 128  # at most; row groups of large splits have at least half of it
SHARD_BYTES = 64 << 20  # shards of large splits have at least this size, and at most twice
MIN_ROW_GROUPS = 16  # of a split with at least as many images: four for each of four streams
_METADATA_KEY = b"admiral"  # in a shard's footer: facts for the manifest
_FACTS_BUFFER = 64 << 10  # bytes that are fetched at a time, because the columns are small

# The columns of all datasets, and the hash of the bytes that an image was made from.
SHARD_SCHEMA = SCHEMA.append(pa.field("sha256", pa.binary(32), nullable=False))


class ShardPlan(BaseModel, frozen=True, extra="forbid"):
    """One shard to write: consecutive images, divided into row groups."""

    path: str
    split: str
    row_groups: tuple[int, ...]  # images of each

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All shards to write, and their source."""

    source: str  # URI
    digest: str  # of the source's listing
    classes: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    background: str  # how images are decoded, as in the manifest
    exif_orientation: ExifOrientation
    understanding: Understanding

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)


class Facts(NamedTuple):
    """What the manifest needs to know about a finished shard."""

    shard: Shard
    quarantine: list[dict[str, str]]  # key and reason
    width: tuple[int, int]  # smallest and largest
    height: tuple[int, int]
    findings: Findings  # transparent and rotated images
    rows: pa.Table  # key, label and sha256


# ------------------------------------------------------------------------------------------------- the plan


def plan_shards(source: Source, order: dict[str, np.ndarray], resolution: int | None) -> tuple[ShardPlan, ...]:
    """Divide every split into row groups, and these into shards. Both numbers are powers of two.

    The row groups of a split are equal within one row, so they can be dealt evenly to any number of streams.

    order: the rows of the source's index in their shuffled order, by split.
    """
    sizes, shards = source.index["size"].to_numpy(), list[ShardPlan]()
    for split, rows in order.items():
        count, num_groups, num_shards = len(rows), MIN_ROW_GROUPS, 1
        while count > ROW_GROUP_IMAGES * num_groups:
            num_groups *= 2
        num_groups = min(num_groups, 2 ** int(math.log2(count)))
        bounds = [index * count // num_groups for index in range(num_groups + 1)]
        groups = [end - start for start, end in pairwise(bounds)]
        # A PNG has about two thirds of the bytes of its pixels.
        image_bytes = 2 * resolution**2 if resolution else float(sizes[rows].mean())
        image_bytes = image_bytes or source.listing.sizes.sum() / len(source.index)  # before the images are staged
        while num_shards < num_groups and image_bytes * count >= 2 * SHARD_BYTES * num_shards:
            num_shards *= 2
        share = num_groups // num_shards
        for number in range(num_shards):
            path = f"{split}-{number:05d}-of-{num_shards:05d}.parquet"
            shard_groups = tuple(groups[number * share : (number + 1) * share])
            shards.append(ShardPlan(path=path, split=split, row_groups=shard_groups))
    return tuple(shards)


def write_plan(output: str, plan: Plan, source: Source, order: dict[str, np.ndarray]) -> None:
    """Write the plan into the dataset's folder, `index.json` last."""
    rows, begin = np.concatenate(list(order.values())), 0
    with storage.open_output(storage.join(output, "index.parquet")) as file, pq.ParquetWriter(file, INDEX) as writer:
        for shard in plan.shards:
            chosen = rows[begin : begin + shard.num_images]
            writer.write_table(source.index.take(chosen), row_group_size=len(chosen))
            begin += len(chosen)
    storage.put_if_absent(storage.join(output, "index.json"), storage.json_bytes(plan.model_dump(mode="json")))


def read_plan(output: str) -> Plan | None:
    """Return the plan that an earlier attempt wrote, or None."""
    uri = storage.join(output, "index.json")
    return Plan.model_validate(storage.read_json(uri)) if storage.exists(uri) else None


# ------------------------------------------------------------------------------------------------- in every worker


def make_shard_writer(output: str, resolution: int | None) -> Callable[[int], Facts]:
    """Return a function that writes the shard of a number, unless it exists, and returns its facts."""
    plan = read_plan(output)
    assert plan is not None
    places = pq.ParquetFile(storage.open_input(storage.join(output, "index.parquet")))

    def write(number: int) -> Facts:
        shard = plan.shards[number]
        if not storage.exists(storage.join(output, shard.path)):
            _write_shard(output, plan, shard, places.read_row_group(number), resolution)
        return read_facts(output, shard.path)

    return write


def _write_shard(output: str, plan: Plan, shard: ShardPlan, places: pa.Table, resolution: int | None) -> None:
    """Write one shard, equal to the byte every time. Images that cannot be decoded are listed in its footer."""
    quarantine: list[dict[str, str]] = []
    keys_by_kind: dict[str, list[str]] = {"transparent_images": [], "rotated_images": []}
    sizes: list[tuple[int, int]] = []
    with storage.open_output(storage.join(output, shard.path)) as file:
        writer = pq.ParquetWriter(file, SHARD_SCHEMA, compression="none", use_dictionary=False)
        for group, images in ahead(_row_groups(plan.source, shard, places)):
            rows = []
            for place, data in zip(group.to_pylist(), images, strict=True):
                try:
                    row, *kinds = _row(plan, resolution, place, data)
                except ValueError as error:
                    quarantine.append({"key": place["key"], "reason": str(error)})
                    continue
                rows.append(row)
                for kind, applies in zip(keys_by_kind, kinds, strict=True):
                    keys_by_kind[kind] += [place["key"]] if applies else []
            sizes += [(row["width"], row["height"]) for row in rows]
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), row_group_size=len(rows))
        width, height = ((min(n), max(n)) for n in zip(*(sizes or [(0, 0)]), strict=True))
        findings = {kind: finding(keys).model_dump() for kind, keys in keys_by_kind.items() if keys}
        facts = {"quarantine": quarantine, "width": width, "height": height, "findings": findings}
        writer.add_key_value_metadata({_METADATA_KEY.decode(): json.dumps(facts)})
        writer.close()


def _row_groups(source: str, shard: ShardPlan, places: pa.Table) -> Iterator[tuple[pa.Table, list[bytes]]]:
    """Yield the places and the encoded images of every row group."""
    begin = 0
    for count in shard.row_groups:
        group = places.slice(begin, count)
        columns = (group[name].to_pylist() for name in ("key", "object", "start", "size"))
        ranges = [storage.Range(name or key, start, size) for key, name, start, size in zip(*columns, strict=True)]
        yield group, read_ranges(source, ranges)
        begin += count


def _row(plan: Plan, resolution: int | None, place: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bool, bool]:
    """Return one row of a shard, whether its image is transparent, and whether it is rotated.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image, transparent, rotated = decode_and_describe(data, plan.background, plan.exif_orientation)
    row = {"key": place["key"], "label": place["label"], "sha256": hashlib.sha256(data).digest()}
    if resolution is None:
        row |= {"image": data, "width": image.width, "height": image.height}
    else:
        row |= {"image": png(center_crop(image, resolution)), "width": resolution, "height": resolution}
    return row, transparent, rotated


def read_facts(output: str, path: str) -> Facts:
    """Return the facts about a finished shard, without reading its images."""
    with storage.open_input(storage.join(output, path), _FACTS_BUFFER) as file:
        size = file.seek(0, io.SEEK_END)
        shard_file = pq.ParquetFile(file)
        footer = shard_file.metadata
        rows = shard_file.read(columns=["key", "label", "sha256"])
    row_groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
    shard = Shard(path=path, bytes=size, rows=footer.num_rows, row_groups=row_groups)
    facts = json.loads(footer.metadata[_METADATA_KEY])
    findings = {kind: Finding.model_validate(entry) for kind, entry in facts["findings"].items()}
    return Facts(shard, facts["quarantine"], tuple(facts["width"]), tuple(facts["height"]), findings, rows)
