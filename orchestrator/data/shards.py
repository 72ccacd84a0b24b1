"""Write shards: a plan assigns every image to a shard, and each worker writes one shard at a time.

The plan lies beside the shards. `index.parquet` has one row group for each shard, whose rows say where the bytes of the
images are in the source. `index.json` has the rest. A worker reads only the row groups of its shards, and holds the
images of at most two row groups.
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

ROW_GROUP_IMAGES = 128  # most images in a row group; row groups of large splits have at least half as many
SHARD_BYTES = 64 << 20  # smallest shard of a large split; the largest has less than twice as many bytes
MIN_ROW_GROUPS = 16  # row groups of a split that has at least as many images: four for each of four streams
_METADATA_KEY = b"admiral"  # key of the facts in a shard's footer
_FACTS_BUFFER = 64 << 10  # bytes that are fetched at a time from a finished shard; the columns are small

# The columns of all datasets, and the SHA-256 of the original bytes of each image.
SHARD_SCHEMA = SCHEMA.append(pa.field("sha256", pa.binary(32), nullable=False))


class ShardPlan(BaseModel, frozen=True, extra="forbid"):
    """One shard to write: consecutive images, divided into row groups."""

    path: str  # relative to the dataset's folder
    split: str
    row_groups: tuple[int, ...]  # number of images in each

    @property
    def num_images(self) -> int:
        return sum(self.row_groups)


class Plan(BaseModel, frozen=True, extra="forbid"):
    """All shards to write, and their source."""

    source: str  # URI of the folder that the objects of index.parquet are relative to
    digest: str  # hash of the source's listing, see `Listing.digest`
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
    quarantine: list[dict[str, str]]  # key of each image that cannot be decoded, and the reason
    width: tuple[int, int]  # smallest and largest in pixels; (0, 0) if the shard has no images
    height: tuple[int, int]
    findings: Findings  # transparent and rotated images
    rows: pa.Table  # columns key, label and sha256


# ------------------------------------------------------------------------------------------------- the plan


def plan_shards(source: Source, rows_by_split: dict[str, np.ndarray], resolution: int | None) -> tuple[ShardPlan, ...]:
    """Divide every split into row groups, and these into shards. Both numbers are powers of two.

    The sizes of a split's row groups differ by at most one row, so row groups can be dealt evenly to any number of
    streams.

    rows_by_split: the rows of the source's index in shuffled order, int64 [n] for each split.
    """
    sizes = source.index["size"].to_numpy()
    shards: list[ShardPlan] = []
    for split, rows in rows_by_split.items():
        count, num_groups, num_shards = len(rows), MIN_ROW_GROUPS, 1
        while count > ROW_GROUP_IMAGES * num_groups:
            num_groups *= 2
        num_groups = min(num_groups, 2 ** int(math.log2(count)))
        bounds = [index * count // num_groups for index in range(num_groups + 1)]
        group_sizes = [end - start for start, end in pairwise(bounds)]
        # A PNG has about two thirds of the bytes of its pixels.
        image_bytes = 2 * resolution**2 if resolution else float(sizes[rows].mean())
        if not image_bytes:  # sizes are unknown until the images are staged
            image_bytes = source.listing.sizes.sum() / len(source.index)
        while num_shards < num_groups and image_bytes * count >= 2 * SHARD_BYTES * num_shards:
            num_shards *= 2
        groups_per_shard = num_groups // num_shards
        for number in range(num_shards):
            path = f"{split}-{number:05d}-of-{num_shards:05d}.parquet"
            row_groups = tuple(group_sizes[number * groups_per_shard : (number + 1) * groups_per_shard])
            shards.append(ShardPlan(path=path, split=split, row_groups=row_groups))
    return tuple(shards)


def write_plan(output: str, plan: Plan, source: Source, rows_by_split: dict[str, np.ndarray]) -> None:
    """Write the plan into the dataset's folder, `index.json` last."""
    rows, begin = np.concatenate(list(rows_by_split.values())), 0
    with storage.open_output(storage.join(output, "index.parquet")) as file, pq.ParquetWriter(file, INDEX) as writer:
        for shard in plan.shards:
            shard_rows = rows[begin : begin + shard.num_images]
            writer.write_table(source.index.take(shard_rows), row_group_size=len(shard_rows))
            begin += len(shard_rows)
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
    index = pq.ParquetFile(storage.open_input(storage.join(output, "index.parquet")))

    def write(number: int) -> Facts:
        shard = plan.shards[number]
        if not storage.exists(storage.join(output, shard.path)):
            _write_shard(output, plan, shard, index.read_row_group(number), resolution)
        return read_facts(output, shard.path)

    return write


def _write_shard(output: str, plan: Plan, shard: ShardPlan, index: pa.Table, resolution: int | None) -> None:
    """Write one shard, with the same bytes on every call. Its footer lists the images that cannot be decoded.

    index: the rows of index.parquet for this shard.
    """
    quarantine: list[dict[str, str]] = []
    keys_by_kind: dict[str, list[str]] = {"transparent_images": [], "rotated_images": []}
    widths: list[int] = []
    heights: list[int] = []
    with storage.open_output(storage.join(output, shard.path)) as file:
        writer = pq.ParquetWriter(file, SHARD_SCHEMA, compression="none", use_dictionary=False)
        for entries, images in ahead(_read_row_groups(plan.source, shard, index)):
            rows = []
            for entry, data in zip(entries.to_pylist(), images, strict=True):
                try:
                    row, transparent, rotated = _row(plan, resolution, entry, data)
                except ValueError as error:
                    quarantine.append({"key": entry["key"], "reason": str(error)})
                    continue
                rows.append(row)
                widths.append(row["width"])
                heights.append(row["height"])
                if transparent:
                    keys_by_kind["transparent_images"].append(entry["key"])
                if rotated:
                    keys_by_kind["rotated_images"].append(entry["key"])
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), row_group_size=len(rows))
        facts = {
            "quarantine": quarantine,
            "width": (min(widths, default=0), max(widths, default=0)),
            "height": (min(heights, default=0), max(heights, default=0)),
            "findings": {kind: finding(keys).model_dump() for kind, keys in keys_by_kind.items() if keys},
        }
        writer.add_key_value_metadata({_METADATA_KEY.decode(): json.dumps(facts)})
        writer.close()


def _read_row_groups(source: str, shard: ShardPlan, index: pa.Table) -> Iterator[tuple[pa.Table, list[bytes]]]:
    """Yield, for each row group, its rows of the index and its encoded images."""
    begin = 0
    for count in shard.row_groups:
        entries = index.slice(begin, count)
        columns = (entries[name].to_pylist() for name in ("key", "object", "start", "size"))
        ranges = [storage.Range(name or key, start, size) for key, name, start, size in zip(*columns, strict=True)]
        yield entries, read_ranges(source, ranges)
        begin += count


def _row(plan: Plan, resolution: int | None, entry: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bool, bool]:
    """Return one row of a shard, whether its image is transparent, and whether it is rotated by EXIF.

    Raises:
        ValueError: the image cannot be decoded.
    """
    image, transparent, rotated = decode_and_describe(data, plan.background, plan.exif_orientation)
    row = {"key": entry["key"], "label": entry["label"], "sha256": hashlib.sha256(data).digest()}
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
