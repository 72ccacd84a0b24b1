"""Preparing a dataset: images in any common layout become shuffled Parquet shards and a manifest.

The job first prints what it understood of the source, and stops if that is suspicious. All images are shuffled by seed
before they are assigned to shards, so that every row group is a random sample. Parquet files may instead be registered
in place: they stay where they are, and the job only writes a manifest.
"""

import hashlib
import logging
import math
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.session import session
from cluster.workers import map_items
from orchestrator import storage
from orchestrator.closing import next_command, print_closing
from orchestrator.config import check_config, check_or_write_config
from orchestrator.cost import not_there_yet
from orchestrator.data.config import PrepareConfig
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import Manifest, load_manifest
from orchestrator.data.shards import Facts, Plan, make_shard_writer, plan_shards, read_plan, write_plan
from orchestrator.data.sources import detect, read_source
from orchestrator.data.sources.index import Finding, Findings, Listing, Source, finding, list_source
from orchestrator.data.sources.parquet import open_parquet
from orchestrator.data.sources.staging import staged
from orchestrator.data.understanding import Understanding, finding_text, understand, understand_registered
from orchestrator.order import Purpose, keyed_rng
from orchestrator.pictures import captioned_grid_png
from orchestrator.progress import counted, progress_line
from orchestrator.redaction import redact_tree
from orchestrator.tracking import tracked

SMALL_CLASS = 20  # a class with fewer images in a split is printed
SHOWN_SMALL = 10  # at most so many of these classes are printed, the smallest first
CONTACT_SHEET_IMAGES = 100  # in the picture that shows a prepared dataset
CONTACT_SHEET_PIXELS = 64  # height and width of each
DRY_SCAN_BYTES = 1 << 30  # a dry run does not read tars that are larger in total

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Manifest:
    """Shuffle, split and shard the source, or register it in place. Return the manifest, which is written last.

    The same command resumes: finished shards are kept, and a finished dataset is returned. `quarantine.json` lists the
    images that cannot be decoded, with the reasons. `report.json` contains what was understood of the source, and the
    findings about it.

    Raises:
        ValueError: the source cannot be used, its reading is suspicious, or the folder holds another dataset.
        RuntimeError: more than `max_corrupt_fraction` of the images cannot be decoded.
        ItemsFailed: some shards failed on workers; all others are written.
    """
    output = config.path(config.output)
    if not storage.exists(storage.join(output, "manifest.json")):
        listing = list_source(config)
        if _registers(config, listing):
            manifest, understanding = _understand_registered(config, listing)
            check_or_write_config(output, config, finished=False)
            _finish(output, manifest, understanding, understanding.findings)
        else:
            with session(config.num_workers, shared=(config.path(""),)):
                plan = _agree_on_plan(config, output, listing)
                facts = _write_shards(config, output, plan)
            _summarize(config, output, plan, facts)
    check_or_write_config(output, config, finished=True)
    if storage.exists(staged_folder := storage.join(output, "staged")):
        storage.delete(f"{staged_folder}/")
    return load_manifest(output)


def prepare_and_track(config: PrepareConfig) -> str:
    """Prepare a dataset, with an MLflow run and a contact sheet; return its URI. Raises what `prepare` raises."""
    output = config.path(config.output)
    with tracked("prepare", config, output) as tracker:
        manifest = prepare(config)
        counts = {split: manifest.num_samples(split) for split in manifest.splits}
        tracker.metrics({**counts, "quarantined": manifest.quarantined})
        sheet = contact_sheet(manifest)
        storage.write_bytes(storage.join(output, "contact-sheet.png"), sheet)
        tracker.picture("contact-sheet.png", sheet)
    described = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(
        f"{output}: {described} images of {counted(len(manifest.classes), 'class')}, {manifest.quarantined} quarantined"
    )
    report = storage.read_json(storage.join(output, "report.json"))
    for split, entry in report.get("splits", {}).items():  # classes of registered files are not counted
        if small := entry.get("small_classes"):
            names = ", ".join(f"{name} ({count})" for name, count in small.items())
            print(f"  classes of {split} with fewer than {SMALL_CLASS} images: {names}")
    for kind, entry in report["findings"].items():
        print(f"  {finding_text(kind, Finding.model_validate(entry))}")
    command = next_command("train_adm", dataset=config.output)
    print_closing([storage.join(output, "contact-sheet.png")], [command])
    return output


def plan(config: PrepareConfig) -> tuple[PrepareConfig, str]:
    """Return the config, and a description of what `prepare` would read and write.

    Raises:
        ValueError: the source cannot be used, or its reading is suspicious.
    """
    output = config.path(config.output)
    if storage.exists(storage.join(output, "manifest.json")):
        return config, f"{output} is already prepared"
    try:
        listing = list_source(config)
    except FileNotFoundError:
        return config, "\n".join([f"reads   {config.source}", f"writes  {output}", *not_there_yet([config.source])])
    if _registers(config, listing):
        manifest, _ = _understand_registered(config, listing)
        return config, f"registers {manifest.registered}\nwrites    {output}: a manifest"
    # Unlike a zip, a tar must be read through to list its files.
    tars = pc.ends_with(listing.names, ".tar", ignore_case=True).to_numpy()
    if (total := int(listing.sizes[tars].sum())) > DRY_SCAN_BYTES:
        return config, (
            f"reads   {config.source}: {len(listing.names):,} objects, {total / 2**30:,.1f} GiB, whose images will be "
            f"counted when the job runs\nwrites  {output}"
        )
    source, _, order = _understand(config.model_copy(update={"num_workers": 0}), listing)
    lines = [f"reads   {config.source}: {len(source.index):,} images, {listing.sizes.sum() / 2**20:,.1f} MiB"]
    planned = plan_shards(source, order, config.resolution)
    for split, rows in order.items():
        shards = [shard for shard in planned if shard.split == split]
        groups = sum(len(shard.row_groups) for shard in shards)
        lines.append(
            f"writes  {output}: {split}: {counted(len(rows), 'image')}, {counted(groups, 'row group')}, "
            f"{counted(len(shards), 'shard')}"
        )
    return config, "\n".join(lines)


# ------------------------------------------------------------------------------------------------- what to write


def _registers(config: PrepareConfig, listing: Listing) -> bool:
    """Return whether the source consists of Parquet files that stay where they are.

    Raises:
        ValueError: it does, but an option needs a copy of them.
    """
    if detect(listing, config) != "parquet" or config.copy_parquet:
        return False
    for name, unused in (("resolution", "none"), ("validation_fraction", "0")):
        if value := getattr(config, name):
            raise ValueError(
                f"{name}={value} needs a copy of source={config.source}: pass --copy-parquet, or {name}={unused}"
            )
    return True


def _understand_registered(config: PrepareConfig, listing: Listing) -> tuple[Manifest, Understanding]:
    """Return the manifest of Parquet files that stay where they are, and print what was understood of them."""
    source = open_parquet(listing, config)
    manifest, findings = source.register(config.name)
    understanding = understand_registered(source, manifest, findings)
    _show(config, understanding)
    decoding = {"background": config.background, "exif_orientation": config.exif_orientation}
    return manifest.model_copy(update=decoding), understanding


def _understand(config: PrepareConfig, listing: Listing) -> tuple[Source, Understanding, dict[str, np.ndarray]]:
    """Return the images of a source and their shuffled order by split, and print what was understood of it."""
    source = read_source(listing, config)
    understanding = understand(source)
    _show(config, understanding)
    return source, understanding, _order(source, config)


def _show(config: PrepareConfig, understanding: Understanding) -> None:
    """Print what was understood of the source.

    Raises:
        ValueError: it is suspicious, and the user has not accepted it.
    """
    print(understanding.text(config.background, config.exif_orientation), flush=True)
    if understanding.suspicions and not config.accept_classes:
        raise ValueError(
            f"--source {understanding.source} looks suspicious: {'; '.join(understanding.suspicions.values())}"
        )


def _agree_on_plan(config: PrepareConfig, output: str, listing: Listing) -> Plan:
    """Return the plan of an earlier attempt if config and source are unchanged, else write a new one."""
    folder, existing = storage.join(output, "staged"), read_plan(output)
    if existing is not None and _holds(config, output, listing, existing):
        if existing.source == folder and not storage.exists(folder):  # it was deleted
            staged(read_source(listing, config), folder, config.num_workers)
        return existing
    source, understanding, order = _understand(config, listing)
    check_or_write_config(output, config, finished=False)
    if source.reading.images is not None:
        source = staged(source, folder, config.num_workers)
    new_plan = Plan(
        source=source.uri,
        digest=listing.digest(),
        classes=source.classes,
        shards=plan_shards(source, order, config.resolution),
        background=config.background,
        exif_orientation=config.exif_orientation,
        understanding=understanding,
    )
    write_plan(output, new_plan, source, order)
    return new_plan


def _holds(config: PrepareConfig, output: str, listing: Listing, plan: Plan) -> bool:
    """Return whether a plan belongs to this config and source. If not, and no shard is finished, delete the plan.

    Raises:
        ValueError: some shards are finished, by a plan for another config or source.
    """
    try:
        check_config(output, config, finished=True)
        if plan.digest != listing.digest():
            raise ValueError(
                f"the source of {output} has changed since the first attempt; now it has {len(listing.names):,} "
                "objects with other names or sizes: pass another --output"
            )
    except ValueError:
        if {shard.path for shard in plan.shards} & set(storage.list_names(output, recursive=True)):
            raise
        for name in ("index.json", "staged/"):
            storage.delete(storage.join(output, name))
        return False
    return True


def _order(source: Source, config: PrepareConfig) -> dict[str, np.ndarray]:
    """Return the rows of the source's index in shuffled order, by split.

    With `validation_fraction`, the first of the training images become the validation split.

    Raises:
        ValueError: the source already has validation images.
    """
    shuffled = keyed_rng(Purpose.SHARDS, config.seed).permutation(len(source.index))
    splits = source.index["split"].to_numpy()[shuffled]
    splits[splits == ""] = "train"
    order = {split: shuffled[splits == split] for split in ("train", "validation", "test")}
    if config.validation_fraction:
        if len(order["validation"]):
            raise ValueError(
                f"validation_fraction={config.validation_fraction}, but source={config.source} has validation images "
                "of its own: pass --validation-fraction 0"
            )
        held_out = math.ceil(round(config.validation_fraction * len(order["train"]), 6))
        order |= {"train": order["train"][held_out:], "validation": order["train"][:held_out]}
    return {split: rows for split, rows in order.items() if len(rows)}


# ------------------------------------------------------------------------------------------------- what was written


def _write_shards(config: PrepareConfig, output: str, plan: Plan) -> list[Facts]:
    """Write the missing shards, and return the facts about all shards in the order of the plan."""
    allowed = math.floor(config.max_corrupt_fraction * plan.num_images)
    written: dict[int, Facts] = {}
    quarantine: list[dict[str, str]] = []
    done = 0
    with progress_line(plan.num_images, "images") as progress:
        make_writer = partial(make_shard_writer, output, config.resolution)
        for number, facts in map_items(make_writer, range(len(plan.shards)), config.num_workers):
            written[number] = facts
            quarantine += facts.quarantine
            if len(quarantine) > allowed:
                named = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in quarantine[:3])
                raise RuntimeError(
                    f"{len(quarantine)} images cannot be decoded, more than the {allowed} that max_corrupt_fraction="
                    f"{config.max_corrupt_fraction} allows: {named}; repair or remove them, or pass a larger "
                    "--max-corrupt-fraction"
                )
            done += plan.shards[number].num_images
            progress.update_to(done, quarantined=len(quarantine))
    return [written[number] for number in range(len(plan.shards))]


def _summarize(config: PrepareConfig, output: str, plan: Plan, facts: list[Facts]) -> None:
    """Write quarantine.json, report.json and the manifest from the facts about the shards."""
    by_split: dict[str, list[Facts]] = {}
    for shard, fact in zip(plan.shards, facts, strict=True):
        by_split.setdefault(shard.split, []).append(fact)
    quarantine = [entry for fact in facts for entry in fact.quarantine]
    storage.write_json(storage.join(output, "quarantine.json"), redact_tree(quarantine))
    findings = dict(plan.understanding.findings)
    for fact in facts:
        for kind, more in fact.findings.items():
            known = findings.get(kind, finding([]))
            findings[kind] = finding([*known.examples, *more.examples], known.count + more.count)
    if quarantine:
        findings["quarantined_images"] = finding([f"{entry['key']}: {entry['reason']}" for entry in quarantine])
    findings |= _copies(by_split)
    manifest = Manifest(
        name=config.name,
        classes=plan.classes,
        splits={split: tuple(fact.shard for fact in split_facts) for split, split_facts in by_split.items()},
        width=_span([fact.width for fact in facts]),
        height=_span([fact.height for fact in facts]),
        quarantined=len(quarantine),
        resolution=config.resolution,
        background=config.background,
        exif_orientation=config.exif_orientation,
        content=_content(facts),
    )
    splits = {split: _class_counts(plan.classes, split_facts) for split, split_facts in by_split.items()}
    _finish(output, manifest, plan.understanding, findings, splits=splits)


def _content(facts: list[Facts]) -> str:
    """Return a SHA-256 of all images and labels in their order."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(b"".join(fact.rows["sha256"].to_pylist()))
        digest.update(fact.rows["label"].to_numpy().tobytes())
    return digest.hexdigest()


def _copies(by_split: dict[str, list[Facts]]) -> Findings:
    """Return the images whose bytes equal those of an earlier image, in the same split or in another one."""
    rows = pa.concat_tables(fact.rows for facts in by_split.values() for fact in facts)
    counts = [sum(fact.shard.rows for fact in facts) for facts in by_split.values()]
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
            names, earlier = (rows["key"].take(places[:5]).to_pylist() for places in (which, original[which]))
            cases = [f"{name} = {other}" for name, other in zip(names, earlier, strict=True)]
            findings[kind] = finding(cases, len(which))
    return findings


def _class_counts(classes: tuple[str, ...], facts: list[Facts]) -> dict[str, Any]:
    """Count the images of a split, of its smallest and its largest class, and of classes with few images."""
    labels = np.concatenate([fact.rows["label"].to_numpy() for fact in facts])
    if not classes:
        return {"images": len(labels)}
    counts = np.bincount(labels, minlength=len(classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    return {
        "images": len(labels),
        "smallest_class": {"name": classes[smallest], "images": int(counts[smallest])},
        "small_classes": {
            classes[label]: int(counts[label])
            for label in np.argsort(counts, kind="stable")[:SHOWN_SMALL].tolist()
            if counts[label] < SMALL_CLASS
        },
        "largest_class": {"name": classes[largest], "images": int(counts[largest])},
    }


def _finish(output: str, manifest: Manifest, understanding: Understanding, findings: Findings, **counts: Any) -> None:
    """Write the report, then the manifest, which marks the dataset as finished."""
    plain = {kind: entry.model_dump(mode="json") for kind, entry in findings.items()}
    report = {"understanding": understanding.model_dump(mode="json"), **counts, "findings": plain}
    storage.write_json(storage.join(output, "report.json"), redact_tree(report))
    storage.put_if_absent(storage.join(output, "manifest.json"), storage.json_bytes(manifest.model_dump(mode="json")))


def _span(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the smallest and the largest of all values. A shard without images has (0, 0)."""
    lows, highs = zip(*([span for span in spans if span != (0, 0)] or [(0, 0)]), strict=True)
    return min(lows), max(highs)


def contact_sheet(manifest: Manifest) -> bytes:
    """Return a PNG of the first training images, sorted by class, with the names of their classes."""
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    shard = manifest.shards(split)[0]
    with storage.open_input(storage.join(manifest.root, shard.path)) as file:
        groups = pq.ParquetFile(file).iter_batches(CONTACT_SHEET_IMAGES, columns=list(manifest.columns))
        batch = pa.Table.from_batches([next(groups)]).flatten()
    labels = batch[manifest.label_column].to_pylist() if manifest.label_column else [-1] * len(batch)
    rows = []
    for label, data in zip(labels, batch[manifest.image_column].to_pylist(), strict=True):
        try:
            image = manifest.decode(data or b"")
        except ValueError:  # this happens only in registered files
            continue
        number = manifest.classes.index(label) if isinstance(label, str) else label
        caption = manifest.classes[number] if 0 <= number < len(manifest.classes) else ""
        rows.append((number, caption, center_crop(image, CONTACT_SHEET_PIXELS)))
    rows.sort(key=lambda row: row[0])
    return captioned_grid_png(np.stack([row[2] for row in rows]), [row[1] for row in rows], columns=10)
