"""Prepare a dataset: write images from any common layout into shuffled Parquet shards with a manifest.

The job first prints its interpretation of the source, and stops if that is suspicious. It shuffles all images by the
seed before it assigns them to shards, so that every row group is a random sample. Parquet files may instead be
registered in place: they stay where they are, and the job only writes a manifest.
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
from orchestrator.data.sources.index import EXAMPLES, Finding, Findings, Listing, Source, finding, list_source
from orchestrator.data.sources.parquet import open_parquet
from orchestrator.data.sources.staging import staged
from orchestrator.data.understanding import Understanding, finding_text, understand, understand_registered
from orchestrator.order import Purpose, keyed_rng
from orchestrator.pictures import captioned_grid_png
from orchestrator.progress import counted, progress_line
from orchestrator.redaction import redact_tree
from orchestrator.tracking import tracked

SMALL_CLASS = 20  # a class with fewer images in a split is reported as small
MAX_SMALL_CLASSES = 10  # small classes that are reported for each split, the smallest first
CONTACT_SHEET_IMAGES = 100  # images in the picture that shows a prepared dataset
CONTACT_SHEET_PIXELS = 64  # height and width of each image in that picture
DRY_SCAN_BYTES = 1 << 30  # a dry run does not read the tars if they have more bytes in total

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Manifest:
    """Shuffle, split and shard the source, or register it in place. Return the manifest, which is written last.

    A second call resumes: it keeps finished shards, and returns the manifest of a finished dataset. `quarantine.json`
    lists the images that cannot be decoded, with the reasons. `report.json` contains the interpretation of the source
    and the findings about it.

    Raises:
        ValueError: the source cannot be used, its interpretation is suspicious, or the folder holds another dataset.
        RuntimeError: more than `max_corrupt_fraction` of the images cannot be decoded.
        ItemsFailed: some shards failed on workers; all others are written.
    """
    output = config.path(config.output)
    if not storage.exists(storage.join(output, "manifest.json")):
        listing = list_source(config)
        if _registers_in_place(config, listing):
            manifest, understanding = _understand_registered(config, listing)
            check_or_write_config(output, config, finished=False)
            _finish(output, manifest, understanding, understanding.findings)
        else:
            with session(config.num_workers, shared=(config.path(""),)):
                plan = _load_or_write_plan(config, output, listing)
                shard_facts = _write_shards(config, output, plan)
            _summarize(config, output, plan, shard_facts)
    check_or_write_config(output, config, finished=True)
    staged_folder = storage.join(output, "staged")
    if storage.exists(staged_folder):
        storage.delete(f"{staged_folder}/")
    return load_manifest(output)


def prepare_and_track(config: PrepareConfig) -> str:
    """Prepare a dataset and track it in MLflow, write a contact sheet, and return the dataset's URI.

    Raises what `prepare` raises.
    """
    output = config.path(config.output)
    with tracked("prepare", config, output) as tracker:
        manifest = prepare(config)
        counts = {split: manifest.num_samples(split) for split in manifest.splits}
        tracker.metrics({**counts, "quarantined": manifest.quarantined})
        sheet = contact_sheet(manifest)
        storage.write_bytes(storage.join(output, "contact-sheet.png"), sheet)
        tracker.picture("contact-sheet.png", sheet)
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{output}: {sizes} images of {counted(len(manifest.classes), 'class')}, {manifest.quarantined} quarantined")
    report = storage.read_json(storage.join(output, "report.json"))
    for split, class_counts in report.get("splits", {}).items():  # absent if Parquet files are registered in place
        if small := class_counts.get("small_classes"):
            names = ", ".join(f"{name} ({count})" for name, count in small.items())
            print(f"  classes of {split} with fewer than {SMALL_CLASS} images: {names}")
    for kind, fields in report["findings"].items():
        print(f"  {finding_text(kind, Finding.model_validate(fields))}")
    command = next_command("train_adm", dataset=config.output)
    print_closing([storage.join(output, "contact-sheet.png")], [command])
    return output


def plan(config: PrepareConfig) -> tuple[PrepareConfig, str]:
    """Return the config, and the text of a dry run: what `prepare` would read and write.

    Raises:
        ValueError: the source cannot be used, or its interpretation is suspicious.
    """
    output = config.path(config.output)
    if storage.exists(storage.join(output, "manifest.json")):
        return config, f"{output} is already prepared"
    try:
        listing = list_source(config)
    except FileNotFoundError:
        return config, "\n".join([f"reads   {config.source}", f"writes  {output}", *not_there_yet([config.source])])
    if _registers_in_place(config, listing):
        manifest, _ = _understand_registered(config, listing)
        return config, f"registers {manifest.registered}\nwrites    {output}: a manifest"
    # A tar has no central directory: to list its files, all of it must be read. A zip has one.
    is_tar = pc.ends_with(listing.names, ".tar", ignore_case=True).to_numpy()
    tar_bytes = int(listing.sizes[is_tar].sum())
    if tar_bytes > DRY_SCAN_BYTES:
        return config, (
            f"reads   {config.source}: {len(listing.names):,} objects, {tar_bytes / 2**30:,.1f} GiB, whose images will "
            f"be counted when the job runs\nwrites  {output}"
        )
    source, _, rows_by_split = _understand(config.model_copy(update={"num_workers": 0}), listing)
    lines = [f"reads   {config.source}: {len(source.index):,} images, {listing.sizes.sum() / 2**20:,.1f} MiB"]
    shards = plan_shards(source, rows_by_split, config.resolution)
    for split, rows in rows_by_split.items():
        split_shards = [shard for shard in shards if shard.split == split]
        num_groups = sum(len(shard.row_groups) for shard in split_shards)
        lines.append(
            f"writes  {output}: {split}: {counted(len(rows), 'image')}, {counted(num_groups, 'row group')}, "
            f"{counted(len(split_shards), 'shard')}"
        )
    return config, "\n".join(lines)


# ------------------------------------------------------------------------------------------------- planning


def _registers_in_place(config: PrepareConfig, listing: Listing) -> bool:
    """Return whether the source consists of Parquet files that stay where they are.

    Raises:
        ValueError: it does, but another option needs a copy of them.
    """
    if detect(listing, config) != "parquet" or config.copy_parquet:
        return False
    for option, value, disabled in (
        ("--resolution", config.resolution, "none"),
        ("--validation-fraction", config.validation_fraction, "0"),
    ):
        if value:
            raise ValueError(
                f"{option} {value} needs a copy of the Parquet files of --source {config.source}: pass --copy-parquet, "
                f"or {option} {disabled}"
            )
    return True


def _understand_registered(config: PrepareConfig, listing: Listing) -> tuple[Manifest, Understanding]:
    """Return the manifest of Parquet files that stay where they are, and print their interpretation.

    Raises what `_print_understanding` raises.
    """
    source = open_parquet(listing, config)
    manifest, findings = source.register(config.name)
    understanding = understand_registered(source, manifest, findings)
    _print_understanding(config, understanding)
    decoding = {"background": config.background, "exif_orientation": config.exif_orientation}
    return manifest.model_copy(update=decoding), understanding


def _understand(config: PrepareConfig, listing: Listing) -> tuple[Source, Understanding, dict[str, np.ndarray]]:
    """Return the source, its interpretation, and the shuffled rows of its index by split; print the interpretation.

    Raises what `_print_understanding` and `_shuffled_rows` raise.
    """
    source = read_source(listing, config)
    understanding = understand(source)
    _print_understanding(config, understanding)
    return source, understanding, _shuffled_rows(source, config)


def _print_understanding(config: PrepareConfig, understanding: Understanding) -> None:
    """Print the interpretation of the source.

    Raises:
        ValueError: it is suspicious, and the user has not accepted it with --accept-classes.
    """
    print(understanding.text(config.background, config.exif_orientation), flush=True)
    if understanding.suspicions and not config.accept_classes:
        raise ValueError(
            f"--source {understanding.source} looks suspicious: {'; '.join(understanding.suspicions.values())}"
        )


def _load_or_write_plan(config: PrepareConfig, output: str, listing: Listing) -> Plan:
    """Return the plan of an earlier attempt if config and source are unchanged, else write a new one."""
    staged_folder = storage.join(output, "staged")
    existing = read_plan(output)
    if existing is not None and _keep_plan(config, output, listing, existing):
        if existing.source.startswith(staged_folder) and not storage.exists(existing.source):  # the user deleted it
            staged(read_source(listing, config), existing.source, config.num_workers)
        return existing
    if listing.uri == storage.resolve(output):
        raise ValueError(f"--output {output} is the folder of --source; pass another folder for the shards")
    source, understanding, rows_by_split = _understand(config, listing)
    check_or_write_config(output, config, finished=False)
    if source.reading.images is not None:  # the images cannot be read by ranges of bytes
        # An earlier attempt may have staged other images: from another column, or before the source changed.
        digest = hashlib.sha256(f"{listing.digest()} {source.reading.layout}".encode()).hexdigest()
        source = staged(source, storage.join(staged_folder, digest[:16]), config.num_workers)
    new_plan = Plan(
        source=source.uri,
        digest=listing.digest(),
        classes=source.classes,
        shards=plan_shards(source, rows_by_split, config.resolution),
        background=config.background,
        exif_orientation=config.exif_orientation,
        understanding=understanding,
    )
    write_plan(output, new_plan, source, rows_by_split)
    return new_plan


def _keep_plan(config: PrepareConfig, output: str, listing: Listing, plan: Plan) -> bool:
    """Return True if a plan belongs to this config and source. Otherwise delete the plan and return False.

    Raises:
        ValueError: the plan belongs to another config or source, and some of its shards are finished.
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


def _shuffled_rows(source: Source, config: PrepareConfig) -> dict[str, np.ndarray]:
    """Return the rows of the source's index in shuffled order, by split, int64 [n] each.

    With `validation_fraction`, the first of the shuffled training images become the validation split.

    Raises:
        ValueError: `validation_fraction` is set, but the source has validation images of its own.
    """
    shuffled = keyed_rng(Purpose.SHARDS, config.seed).permutation(len(source.index))
    splits = source.index["split"].to_numpy()[shuffled]
    splits[splits == ""] = "train"
    rows_by_split = {split: shuffled[splits == split] for split in ("train", "validation", "test")}
    if config.validation_fraction:
        if len(rows_by_split["validation"]):
            raise ValueError(
                f"--validation-fraction {config.validation_fraction}: --source {config.source} has validation images "
                "of its own: pass --validation-fraction 0"
            )
        training = rows_by_split["train"]
        # Round first: 0.07 * 100 is 7.000000000000001, whose ceiling would be 8.
        num_validation = math.ceil(round(config.validation_fraction * len(training), 6))
        rows_by_split |= {"train": training[num_validation:], "validation": training[:num_validation]}
    return {split: rows for split, rows in rows_by_split.items() if len(rows)}


# ------------------------------------------------------------------------------------------------- writing


def _write_shards(config: PrepareConfig, output: str, plan: Plan) -> list[Facts]:
    """Write the missing shards, and return the facts about all shards in the order of the plan.

    Raises:
        RuntimeError: more than `max_corrupt_fraction` of the images cannot be decoded.
        ItemsFailed: some shards failed on workers; all others are written.
    """
    max_corrupt = math.floor(config.max_corrupt_fraction * plan.num_images)
    facts_by_number: dict[int, Facts] = {}
    quarantine: list[dict[str, str]] = []
    num_done = 0
    with progress_line(plan.num_images, "images") as progress:
        make_writer = partial(make_shard_writer, output, config.resolution)
        for number, facts in map_items(make_writer, range(len(plan.shards)), config.num_workers):
            facts_by_number[number] = facts
            quarantine += facts.quarantine
            if len(quarantine) > max_corrupt:
                examples = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in quarantine[:3])
                raise RuntimeError(
                    f"{len(quarantine)} images cannot be decoded, more than the {max_corrupt} that "
                    f"--max-corrupt-fraction {config.max_corrupt_fraction} allows: {examples}; repair or remove them, "
                    "or pass a larger --max-corrupt-fraction"
                )
            num_done += plan.shards[number].num_images
            progress.update_to(num_done, quarantined=len(quarantine))
    return [facts_by_number[number] for number in range(len(plan.shards))]


def _summarize(config: PrepareConfig, output: str, plan: Plan, shard_facts: list[Facts]) -> None:
    """Write quarantine.json, report.json and the manifest from the facts about the shards."""
    by_split: dict[str, list[Facts]] = {}
    for shard, facts in zip(plan.shards, shard_facts, strict=True):
        by_split.setdefault(shard.split, []).append(facts)
    quarantine = [entry for facts in shard_facts for entry in facts.quarantine]
    storage.write_json(storage.join(output, "quarantine.json"), redact_tree(quarantine))
    findings = dict(plan.understanding.findings)
    for facts in shard_facts:
        for kind, added in facts.findings.items():
            previous = findings.get(kind, finding([]))
            findings[kind] = finding([*previous.examples, *added.examples], previous.count + added.count)
    if quarantine:
        findings["quarantined_images"] = finding([f"{entry['key']}: {entry['reason']}" for entry in quarantine])
    findings |= _duplicate_images(by_split)
    manifest = Manifest(
        name=config.name,
        classes=plan.classes,
        splits={split: tuple(facts.shard for facts in split_facts) for split, split_facts in by_split.items()},
        width=_overall_range([facts.width for facts in shard_facts]),
        height=_overall_range([facts.height for facts in shard_facts]),
        quarantined=len(quarantine),
        resolution=config.resolution,
        background=config.background,
        exif_orientation=config.exif_orientation,
        content=_content_hash(shard_facts),
    )
    class_counts = {split: _class_counts(plan.classes, split_facts) for split, split_facts in by_split.items()}
    _finish(output, manifest, plan.understanding, findings, class_counts)


def _content_hash(shard_facts: list[Facts]) -> str:
    """Return a SHA-256 of all images and labels in their order."""
    digest = hashlib.sha256()
    for facts in shard_facts:
        digest.update(b"".join(facts.rows["sha256"].to_pylist()))
        digest.update(facts.rows["label"].to_numpy().tobytes())
    return digest.hexdigest()


def _duplicate_images(by_split: dict[str, list[Facts]]) -> Findings:
    """Return findings about images whose bytes equal those of an earlier image, in the same split or in another one."""
    rows = pa.concat_tables(facts.rows for split_facts in by_split.values() for facts in split_facts)
    split_sizes = [sum(facts.shard.rows for facts in split_facts) for split_facts in by_split.values()]
    split = np.repeat(np.arange(len(split_sizes)), split_sizes)
    digests = np.frombuffer(b"".join(rows["sha256"].to_pylist()), "S32")
    _, first_rows, group = np.unique(digests, return_index=True, return_inverse=True)
    original = first_rows[group]  # for each row, the first row with the same bytes
    duplicates = np.flatnonzero(original != np.arange(len(digests)))
    in_same_split = split[duplicates] == split[original[duplicates]]
    findings = {}
    for kind, selected in (
        ("duplicate_images", duplicates[in_same_split]),
        ("duplicate_images_across_splits", duplicates[~in_same_split]),
    ):
        if len(selected):
            keys = rows["key"].take(selected[:EXAMPLES]).to_pylist()
            original_keys = rows["key"].take(original[selected[:EXAMPLES]]).to_pylist()
            pairs = [f"{key} = {original_key}" for key, original_key in zip(keys, original_keys, strict=True)]
            findings[kind] = finding(pairs, len(selected))
    return findings


def _class_counts(classes: tuple[str, ...], shard_facts: list[Facts]) -> dict[str, Any]:
    """Count the images of a split, of its smallest and its largest class, and of classes with few images."""
    labels = np.concatenate([facts.rows["label"].to_numpy() for facts in shard_facts])
    if not classes:
        return {"images": len(labels)}
    counts = np.bincount(labels, minlength=len(classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    return {
        "images": len(labels),
        "smallest_class": {"name": classes[smallest], "images": int(counts[smallest])},
        "small_classes": {
            classes[label]: int(counts[label])
            for label in np.argsort(counts, kind="stable")[:MAX_SMALL_CLASSES].tolist()
            if counts[label] < SMALL_CLASS
        },
        "largest_class": {"name": classes[largest], "images": int(counts[largest])},
    }


def _finish(
    output: str,
    manifest: Manifest,
    understanding: Understanding,
    findings: Findings,
    class_counts: dict[str, Any] | None = None,
) -> None:
    """Write the report, then the manifest, which marks the dataset as finished.

    class_counts: the result of `_class_counts` by split; None if Parquet files are registered in place, because their
        labels are not read.
    """
    report: dict[str, Any] = {"understanding": understanding.model_dump(mode="json")}
    if class_counts is not None:
        report["splits"] = class_counts
    report["findings"] = {kind: entry.model_dump(mode="json") for kind, entry in findings.items()}
    storage.write_json(storage.join(output, "report.json"), redact_tree(report))
    storage.put_if_absent(storage.join(output, "manifest.json"), storage.json_bytes(manifest.model_dump(mode="json")))


def _overall_range(ranges: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the range that covers all (smallest, largest) ranges, without the (0, 0) of shards without images."""
    nonempty = [pair for pair in ranges if pair != (0, 0)] or [(0, 0)]
    return min(low for low, _ in nonempty), max(high for _, high in nonempty)


def contact_sheet(manifest: Manifest) -> bytes:
    """Return a PNG of the first training images, sorted by class, with the names of their classes.

    Raises:
        ValueError: there are no images, or none of the first ones can be decoded.
    """
    split = "train" if "train" in manifest.splits else next(iter(manifest.splits))
    shard = next((shard for shard in manifest.shards(split) if shard.rows), None)
    if shard is None:
        raise ValueError(f"dataset {manifest.folder} has no {split} images; pass --source with images to prepare")
    with storage.open_input(storage.join(manifest.root, shard.path)) as file:
        batches = pq.ParquetFile(file).iter_batches(CONTACT_SHEET_IMAGES, columns=list(manifest.columns))
        batch = pa.Table.from_batches([next(batches)]).flatten()
    labels = batch[manifest.label_column].to_pylist() if manifest.label_column else [-1] * len(batch)
    cells = []
    for label, data in zip(labels, batch[manifest.image_column].to_pylist(), strict=True):
        try:
            image = manifest.decode(data or b"")
        except ValueError:  # only files that are registered in place contain images that cannot be decoded
            continue
        number = manifest.classes.index(label) if isinstance(label, str) else label
        caption = manifest.classes[number] if 0 <= number < len(manifest.classes) else ""
        cells.append((number, caption, center_crop(image, CONTACT_SHEET_PIXELS)))
    if not cells:
        raise ValueError(
            f"none of the first {len(batch)} images of {storage.join(manifest.root, shard.path)} can be decoded; pass "
            f"--copy-parquet with another --output, which leaves out such images, or another --source"
        )
    cells.sort(key=lambda cell: cell[0])  # by class number
    _, captions, images = zip(*cells, strict=True)
    return captioned_grid_png(np.stack(images), list(captions), columns=10)
