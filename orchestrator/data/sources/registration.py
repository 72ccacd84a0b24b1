"""Parquet in the public ImageNet layout, registered in place: only footers are read, nothing is copied."""

import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.data.dataset import Manifest, Shard
from orchestrator.data.sources.index import Finding, Findings, Listing, finding, split_of_each

PARQUET_NAME = r"(^|/)[^./][^/]*\.parquet$"
IMAGE_COLUMN = "image.bytes"
FAIR_SPREAD = 0.5  # of what fair row groups spread: below it, the labels count as sorted
JUDGED_ROWS = 8  # fewer may lie close together by chance: less than one time in a hundred from here on
_FOOTERS_AT_ONCE = 16
_FOOTER_BYTES = 256 << 10  # fetched at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Footer:
    """What the footer of one file says."""

    shard: Shard
    lowest: np.ndarray  # int64 [row groups], smallest label of each
    highest: np.ndarray
    classes: tuple[str, ...]  # names, where the file's own metadata gives them


def register(listing: Listing, name: str) -> tuple[Manifest, Findings]:
    """A manifest of the Parquet files beneath a source, whose images stay where they are.

    Splits are those that the files' names speak of (else all is train). How sorted by class the row groups are is
    measured from the smallest and largest label of each, which footers hold: rows in random order spread their labels
    almost as far as there are classes.

    Raises:
        ValueError: a file is damaged, lacks the columns, or its labels are not what they must be; it is named.
    """
    files = listing.matching(PARQUET_NAME)
    if not len(files.names):
        raise ValueError(f"source={listing.uri} holds no Parquet files")
    names = files.names.to_pylist()
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        footers = dict(zip(names, threads.map(lambda path: _read_footer(listing.uri, path), names), strict=True))
    split_of_file = split_of_each(names)
    splits = {
        split: tuple(footers[path] for path in names if (split_of_file[path] or "train") == split)
        for split in ("train", "validation", "test")
    }
    splits = {split: found for split, found in splits.items() if found}
    unlabelled = tuple(split for split, found in splits.items() if all((f.highest < 0).all() for f in found))
    classes = _classes(listing.uri, [f for split, found in splits.items() if split not in unlabelled for f in found])
    manifest = Manifest(
        name=name,
        classes=classes,
        splits={split: tuple(f.shard for f in found) for split, found in splits.items()},
        unlabelled=unlabelled if classes else (),
        width=None,
        height=None,
        quarantined=0,
        registered=storage.resolve(listing.uri),
        image_column=IMAGE_COLUMN,
    )
    findings: Findings = {}
    for split, found in splits.items():
        if split in unlabelled:
            findings[f"{split}_images_without_labels"] = Finding(count=manifest.num_samples(split), examples=())
        elif len(classes) > 1 and (odd := _sorted_row_groups(found, len(classes))):
            kind = f"{split}_row_groups_sorted_by_class"
            findings[kind] = finding(odd)
            log.warning(
                "%d of %d row groups of %s are sorted by class: batches would hold few classes, whatever the seed; "
                "pass --copy-parquet, which shuffles, or train with a larger order.shuffle_row_groups",
                len(odd),
                len(manifest.row_group_sizes(split)),
                split,
            )
    return manifest, findings


def _sorted_row_groups(footers: tuple[_Footer, ...], num_classes: int) -> list[str]:
    """The row groups whose labels spread over less than FAIR_SPREAD of what n labels drawn at random would.

    The largest minus the smallest of n uniform draws from [0, C - 1] is (C - 1) (n - 1) / (n + 1) on average.
    """
    odd = []
    for footer in footers:
        rows = np.array(footer.shard.row_groups)
        fair = (num_classes - 1) * (rows - 1) / (rows + 1)
        few = np.flatnonzero((footer.highest - footer.lowest < FAIR_SPREAD * fair) & (rows >= JUDGED_ROWS))
        odd += [f"{footer.shard.path} row group {i}: labels {footer.lowest[i]} to {footer.highest[i]}" for i in few]
    return odd


def _read_footer(uri: str, path: str) -> _Footer:
    place = storage.join(uri, path)
    try:
        with storage.open_input(place, _FOOTER_BYTES) as file:
            size = file.seek(0, io.SEEK_END)
            footer = pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{place} is not a sound Parquet file: {error}") from error
    columns = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
    if missing := {IMAGE_COLUMN, "label"} - set(columns):
        raise ValueError(f"{place} lacks the column {' and '.join(sorted(missing))}; it has {', '.join(columns)}")
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    statistics = [group.column(columns["label"]).statistics for group in groups]
    if any(found is None or not found.has_min_max or found.null_count for found in statistics):
        raise ValueError(f"{place} has null labels, or no smallest and largest label in its footer: write it anew")
    return _Footer(
        shard=Shard(path=path, bytes=size, rows=footer.num_rows, row_groups=tuple(group.num_rows for group in groups)),
        lowest=np.array([found.min for found in statistics], np.int64),
        highest=np.array([found.max for found in statistics], np.int64),
        classes=_class_names(footer.metadata or {}),
    )


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...]:
    """The names of the classes in the metadata that the Hugging Face library writes; empty without it."""
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _classes(uri: str, footers: list[_Footer]) -> tuple[str, ...]:
    """The classes of all labelled files; empty where there are none.

    Raises:
        ValueError: files disagree, or labels are not in [0, C).
    """
    if not footers:
        return ()
    count = max(int(footer.highest.max()) for footer in footers) + 1
    named = {footer.classes for footer in footers}
    if len(named) > 1:
        raise ValueError(f"source={uri}: its files name different classes")
    classes = named.pop() or tuple(map(str, range(count)))
    for footer in footers:
        if footer.lowest.min() < 0 or footer.highest.max() >= len(classes):
            raise ValueError(
                f"{storage.join(uri, footer.shard.path)} has labels from {footer.lowest.min()} to "
                f"{footer.highest.max()}; wanted [0, {len(classes)}), or -1 throughout a split that has none"
            )
    return classes
