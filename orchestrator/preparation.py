"""Preparing: from images as people have them to shuffled Parquet shards and a manifest.

All keys are shuffled by seed before they are dealt to shards, so that any row group is a fair sample.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from orchestrator import storage
from orchestrator.config import JobConfig, claim
from orchestrator.dataset import SCHEMA, Manifest, Shard, load_manifest, read_images
from orchestrator.images import decode
from orchestrator.order import Purpose, keyed_rng
from orchestrator.pictures import grid_png
from orchestrator.progress import progress_line
from orchestrator.sources import Source, digits_source, folder_source
from orchestrator.tracking import tracked

ROW_GROUP_IMAGES = 128  # at most, at least half of it
SHARD_BYTES = 64 << 20  # at least where there is so much, at most twice
MIN_ROW_GROUPS = 16  # of a split with that many images: four for each of four streams
CONTACT_SHEET_PIXELS = 64  # largest size of an image on the sheet that shows a prepared dataset
_METADATA_KEY = b"admiral"  # in a shard's footer: what the manifest gathers from it


class PrepareConfig(JobConfig):
    """Preparing a dataset."""

    source: str  # folder or URI of a tree <class>/<image>; or digits, scikit-learn's 1,797 scanned digits
    output: str  # the dataset's folder
    name: str  # what reports call the dataset
    seed: int = Field(0, ge=0, lt=2**64)  # of the shuffle and of the split
    validation_fraction: float = Field(0.0, ge=0, lt=1)  # share of the images kept from training
    max_corrupt_fraction: float = Field(0.001, ge=0, le=1)  # stop where a larger share cannot be decoded


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
        writer = pq.ParquetWriter(file, SCHEMA, compression="none", use_dictionary=False)
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
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=len(rows))
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
