"""Preparing: from images as people have them to shuffled Parquet shards and a manifest.

All keys are shuffled by seed before they are dealt to shards, so that any row group is a fair sample. Parquet in the
public ImageNet layout may instead be registered in place: it stays where it is, and only gets a manifest.
"""

import logging
import math
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.session import session
from cluster.workers import map_items
from orchestrator import storage
from orchestrator.config import check_or_write_config
from orchestrator.data.config import PrepareConfig
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import Manifest, load_manifest
from orchestrator.data.images import decode
from orchestrator.data.shards import Facts, Plan, make_plan, make_shard_writer, read_plan, write_plan
from orchestrator.data.sources import (
    UNLABELLED,
    Findings,
    Layout,
    Listing,
    Source,
    detect,
    finding,
    list_source,
    open_source,
    read_label_map,
)
from orchestrator.data.sources.registration import register
from orchestrator.data.sources.staging import staged_source
from orchestrator.order import Purpose, keyed_rng
from orchestrator.pictures import captioned_grid_png
from orchestrator.progress import progress_line
from orchestrator.tracking import tracked

CONTACT_SHEET_IMAGES = 100  # of the picture that shows a prepared dataset
CONTACT_SHEET_PIXELS = 64  # of each
DRY_SCAN_BYTES = 1 << 30  # of tars: a dry run does not read through larger ones

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Manifest:
    """Shuffle, split and shard the source, or register it in place; return the manifest, which is written last.

    Finished shards are kept and a finished dataset is found, so that the same command goes on where it stopped.
    Images that cannot be decoded go to `quarantine.json` with their key and the reason; what else is odd about the
    source, and what came of it, to `report.json`.

    Raises:
        ValueError: the source is unfit, or the folder holds another dataset.
        RuntimeError: more than `max_corrupt_fraction` of the images cannot be decoded.
        ItemsFailed: some shards failed on workers; all others are written.
    """
    output = config.path(config.output)
    if not storage.exists(storage.join(output, "manifest.json")):
        listing, layout = _find(config)
        if config.registers(layout):
            manifest, findings = register(listing, config.name)
            check_or_write_config(output, config)
            _finish(output, manifest, {"findings": _plain(findings)})
        else:
            with session(config.num_workers, shared=(config.path(""),)):
                plan = _agree_on_plan(config, output, listing, layout)
                facts = _write_shards(config, output, plan)
            _summarize(config, output, plan, facts)
    check_or_write_config(output, config)
    if storage.exists(staged := storage.join(output, "staged")):
        storage.delete(f"{staged}/")
    return load_manifest(output)


def prepare_and_track(config: PrepareConfig) -> str:
    """`prepare` with its MLflow run and a contact sheet; return the dataset's URI. Raises what `prepare` does."""
    output = config.path(config.output)
    with tracked("prepare", config, output) as tracker:
        manifest = prepare(config)
        counts = {split: manifest.num_samples(split) for split in manifest.splits}
        tracker.metrics({**counts, "quarantined": manifest.quarantined})
        sheet = contact_sheet(manifest)
        storage.write_bytes(storage.join(output, "contact-sheet.png"), sheet)
        tracker.picture("contact-sheet.png", sheet)
    described = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{output}: {described} images of {len(manifest.classes)} classes, {manifest.quarantined} quarantined")
    for kind, found in storage.read_json(storage.join(output, "report.json"))["findings"].items():
        print(f"  {kind.replace('_', ' ')}: {found['count']:,} ({', '.join(found['examples'])})")
    return output


def plan(config: PrepareConfig) -> str:
    """What preparing would read and write."""
    output = config.path(config.output)
    if storage.exists(storage.join(output, "manifest.json")):
        return f"{output} is prepared already"
    listing, layout = _find(config)
    if layout == "parquet":
        manifest, _ = register(listing, config.name)
        counts = ", ".join(f"{split} {manifest.num_samples(split):,}" for split in manifest.splits)
        found = f"{manifest.registered}: {counts} images in {len(manifest.classes)} classes"
        if config.registers(layout):
            return f"registers {found}\nwrites  {output}: a manifest"
        return f"reads   {found}\nwrites  {output}: all of them, shuffled; for the time being, a copy in order"
    total = int(listing.sizes.sum())
    if layout in ("tars", "webdataset") and total > DRY_SCAN_BYTES:
        objects = f"{len(listing.names):,} objects, {total / 2**30:,.1f} GiB"
        return f"reads   {config.source} ({layout}): {objects}, whose images are counted when it runs\nwrites  {output}"
    source = _open_source(config.model_copy(update={"num_workers": 0}), listing, layout, output)
    size = int(source.index["size"].to_numpy().sum())
    images = f"{len(source.index):,} images in {len(source.classes)} classes"
    lines = [f"reads   {config.source} ({layout}): {images}, {size / 2**20:,.1f} MiB in at most as many requests"]
    order = _order(source, config)
    planned = make_plan(source, listing.digest(), order, config.resolution)
    for split, rows in order.items():
        shards = [shard for shard in planned.shards if shard.split == split]
        groups = sum(len(shard.row_groups) for shard in shards)
        lines.append(f"writes  {output}: {split}: {len(rows):,} images, {groups} row groups, {len(shards)} shards")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- what to write


def _find(config: PrepareConfig) -> tuple[Listing, Layout]:
    """The source's objects and its layout."""
    if config.source == "digits":
        return Listing("digits", pa.array([], pa.string()), np.array([], np.int64)), "digits"
    listing = list_source(config.path(config.source))
    layout = detect(listing, labelled=config.labels is not None) if config.layout == "auto" else config.layout
    if config.labels and layout not in UNLABELLED:
        raise ValueError(f"layout={layout} has labels of its own, and labels={config.labels} would be others")
    return listing, layout


def _open_source(config: PrepareConfig, listing: Listing, layout: Layout, output: str) -> Source:
    labels = read_label_map(config.path(config.labels)) if config.labels else None
    if layout == "parquet":
        manifest, _ = register(listing, config.name)
        check_or_write_config(output, config)
        source = staged_source(listing, manifest, storage.join(output, "staged"), config.num_workers)
    else:
        source = open_source(layout, listing, labels, config.num_workers)
    return source


def _agree_on_plan(config: PrepareConfig, output: str, listing: Listing, layout: Layout) -> Plan:
    """The plan of an earlier attempt, if the source is still what it was; else a new one."""
    digest = listing.digest()
    if (found := read_plan(output)) is None:
        source = _open_source(config, listing, layout, output)
        check_or_write_config(output, config)
        order = _order(source, config)
        found = make_plan(source, digest, order, config.resolution)
        write_plan(output, found, source, order)
    check_or_write_config(output, config)
    if found.digest != digest:
        raise ValueError(
            f"{output} was begun from a source that has changed since ({len(listing.names):,} objects now, of other "
            "names or sizes): choose another output"
        )
    return found


def _order(source: Source, config: PrepareConfig) -> dict[str, np.ndarray]:
    """Rows of the source's index in their shuffled order, by split.

    Where the source has no validation images of its own, the first of its training images become these.
    """
    shuffled = keyed_rng(Purpose.SHARDS, config.seed).permutation(len(source.index))
    given = np.array([split or "train" for split in source.index["split"].to_pylist()])[shuffled]
    order = {split: shuffled[given == split] for split in ("train", "validation", "test")}
    if config.validation_fraction:
        if len(order["validation"]):
            raise ValueError(
                f"validation_fraction={config.validation_fraction}, but source={config.source} has validation images "
                "of its own: pass 0"
            )
        held_out = math.ceil(round(config.validation_fraction * len(order["train"]), 6))
        order |= {"train": order["train"][held_out:], "validation": order["train"][:held_out]}
    return {split: rows for split, rows in order.items() if len(rows)}


# ------------------------------------------------------------------------------------------------- what was written


def _write_shards(config: PrepareConfig, output: str, plan: Plan) -> list[Facts]:
    """Write the shards that are missing; the facts of all, in the plan's order."""
    allowed = math.floor(config.max_corrupt_fraction * plan.num_images)
    found: dict[int, Facts] = {}
    quarantine: list[dict[str, str]] = []
    done = 0
    with progress_line(plan.num_images, "images") as progress:
        make_writer = partial(make_shard_writer, output, config.resolution)
        for number, facts in map_items(make_writer, range(len(plan.shards)), config.num_workers):
            found[number] = facts
            quarantine += facts.quarantine
            if len(quarantine) > allowed:
                named = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in quarantine[:3])
                raise RuntimeError(
                    f"{len(quarantine)} images cannot be decoded, more than the {allowed} that max_corrupt_fraction="
                    f"{config.max_corrupt_fraction} allows: {named}"
                )
            done += plan.shards[number].num_images
            progress.update_to(done, quarantined=len(quarantine))
    return [found[number] for number in range(len(plan.shards))]


def _summarize(config: PrepareConfig, output: str, plan: Plan, facts: list[Facts]) -> None:
    """Quarantine, report and manifest out of the shards' facts."""
    by_split = {
        split: [fact for shard, fact in zip(plan.shards, facts, strict=True) if shard.split == split]
        for split in plan.splits
    }
    quarantine = [entry for fact in facts for entry in fact.quarantine]
    storage.write_json(storage.join(output, "quarantine.json"), quarantine)
    findings = dict(plan.findings)
    if quarantine:
        findings["quarantined_images"] = finding([f"{entry['key']}: {entry['reason']}" for entry in quarantine])
    findings |= _copies(by_split)
    manifest = Manifest(
        name=config.name,
        classes=plan.classes,
        splits={split: tuple(fact.shard for fact in found) for split, found in by_split.items()},
        width=_span([fact.width for fact in facts]),
        height=_span([fact.height for fact in facts]),
        quarantined=len(quarantine),
        resolution=config.resolution,
    )
    splits = {split: _class_counts(plan.classes, found) for split, found in by_split.items()}
    _finish(output, manifest, {"splits": splits, "findings": _plain(findings)})


def _copies(by_split: dict[str, list[Facts]]) -> Findings:
    """Images of the same bytes as an earlier one, told apart by whether that lies in the same split."""
    rows = pa.concat_tables(fact.rows for found in by_split.values() for fact in found)
    counts = [sum(fact.shard.rows for fact in found) for found in by_split.values()]
    split = np.repeat(np.arange(len(counts)), counts)
    digests = np.frombuffer(b"".join(rows["sha256"].to_pylist()), "S32")
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    original = first[group]
    copies = np.flatnonzero(original != np.arange(len(digests)))
    across = copies[split[copies] != split[original[copies]]]
    within = copies[split[copies] == split[original[copies]]]
    findings = {}
    for kind, which in (("duplicate_images", within), ("duplicate_images_across_splits", across)):
        if len(which):
            shown = which[:5]
            pairs = zip(rows["key"].take(shown).to_pylist(), rows["key"].take(original[shown]).to_pylist(), strict=True)
            cases = [f"{key} = {earlier}" for key, earlier in pairs]
            findings[kind] = finding(cases).model_copy(update={"count": len(which)})
    return findings


def _class_counts(classes: tuple[str, ...], facts: list[Facts]) -> dict[str, Any]:
    """Images of a split, and of its smallest and largest class."""
    labels = np.concatenate([fact.rows["label"].to_numpy() for fact in facts])
    if not classes:
        return {"images": len(labels)}
    counts = np.bincount(labels, minlength=len(classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    return {
        "images": len(labels),
        "smallest_class": {"name": classes[smallest], "images": int(counts[smallest])},
        "largest_class": {"name": classes[largest], "images": int(counts[largest])},
    }


def _finish(output: str, manifest: Manifest, report: dict[str, Any]) -> None:
    """The manifest comes last."""
    storage.write_json(storage.join(output, "report.json"), report)
    storage.put_if_absent(storage.join(output, "manifest.json"), storage.json_bytes(manifest.model_dump(mode="json")))


def _plain(findings: Findings) -> dict[str, Any]:
    return {kind: found.model_dump(mode="json") for kind, found in findings.items()}


def _span(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Smallest and largest of all; (0, 0) of nothing."""
    found = [span for span in spans if span != (0, 0)]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else (0, 0)


def contact_sheet(manifest: Manifest) -> bytes:
    """The first training images by class, each with its class's name: a PNG."""
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    shard = manifest.shards(split)[0]
    with storage.open_input(storage.join(manifest.root, shard.path)) as file:
        groups = pq.ParquetFile(file).iter_batches(CONTACT_SHEET_IMAGES, columns=["label", manifest.image_column])
        batch = pa.Table.from_batches([next(groups)]).flatten()
    rows = []
    for label, data in zip(batch["label"].to_pylist(), batch[manifest.image_column].to_pylist(), strict=True):
        try:
            image = decode(data)
        except ValueError:  # only in what was registered in place
            continue
        caption = manifest.classes[label] if 0 <= label < len(manifest.classes) else ""
        rows.append((label, caption, center_crop(image, CONTACT_SHEET_PIXELS)))
    rows.sort(key=lambda row: row[0])
    return captioned_grid_png(np.stack([row[2] for row in rows]), [row[1] for row in rows], columns=10)
