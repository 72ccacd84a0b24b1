"""Parquet files as the Hugging Face library writes them, which are registered in place or copied."""

import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.data.dataset import Manifest, Shard
from orchestrator.data.sources.index import Entry, Finding, Findings, Listing, Reading, Splits, finding

PARQUET = r"(^|/)[^./][^/]*\.parquet$"
FAIR_SPREAD = 0.5  # share of the spread of random labels, below which the labels of a row group count as sorted
JUDGED_ROWS = 8  # row groups with fewer rows may have a small spread by chance (with more: less than one in a hundred)
_FOOTERS_AT_ONCE = 16
_FOOTER_BYTES = 256 << 10  # fetched at a time
_BATCH_ROWS = 256  # of images, read at a time
_LABELS = ("label", "labels", "fine_label", "class", "class_id", "cls", "category", "target")  # the first one is used

log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """The paths of the columns with images and labels."""

    image: str
    label: str | None  # None: the images have no labels


@dataclass(frozen=True)
class _Footer:
    """The footer of one file."""

    shard: Shard
    schema: pa.Schema
    columns: dict[str, list[Any]]  # statistics of every row group, by the path of the column
    features: dict[str, Any]  # the Hugging Face library's description of the columns


@dataclass(frozen=True)
class ParquetSource:
    """The Parquet files of a source, with their footers."""

    listing: Listing
    footers: dict[str, _Footer]
    columns: Columns
    splits: dict[str, str]  # split of every file; train if its name has none
    guessed: tuple[str, ...]  # columns that were chosen by their names, as text
    odd: tuple[str, ...]  # files without a split in their names, if other names have one

    def reading(self) -> Reading:
        """Return the files as a reading with keys <file>/<row>, whose images are staged."""
        layout = f"Parquet, images in {self.columns.image}, labels in {self.columns.label or 'no column'}"
        images = partial(_images, self.columns.image)
        reading = Reading(
            layout, self.listing.named, self.listing.uri, self._entries(), self._names(), images, guesses=self.guessed
        )
        if self.odd:
            reading.suspicions["names_like_splits"] = finding(self.odd)
        return reading

    def _entries(self) -> Iterator[Entry]:
        for name, footer in self.footers.items():
            labels = self._labels(name) or [None] * footer.shard.rows
            for row, label in enumerate(labels):
                key = f"{name.removesuffix('.parquet')}/{row:08d}"
                yield Entry(key, None if label == -1 else label, self.splits[name], name, row)

    def _labels(self, name: str) -> list[Any] | None:
        if self.columns.label is None:
            return None
        with storage.open_input(storage.join(self.listing.uri, name)) as file:
            return pq.ParquetFile(file).read(columns=[self.columns.label]).column(0).to_pylist()

    def _names(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the files' metadata, or None."""
        label = self.columns.label or ""
        named = {tuple(map(str, footer.features.get(label, {}).get("names") or ())) for footer in self._labelled()}
        if len(named) > 1:
            raise ValueError(f"--source {self.listing.named}: its files have different classes")
        return (named.pop() if named else ()) or None

    def _labelled(self) -> list[_Footer]:
        """Return the footers of the files whose labels are not all -1."""
        return [footer for footer in self.footers.values() if not self._is_unlabelled(footer)]

    def _is_unlabelled(self, footer: _Footer) -> bool:
        return self.columns.label is None or all(found.max == -1 for found in footer.columns[self.columns.label])

    def register(self, name: str) -> tuple[Manifest, Findings]:
        """Return a manifest of the files, which stay where they are, and the findings about them.

        Row groups that are sorted by class are found by the smallest and the largest label in their footers. The labels
        of rows in random order spread over almost all classes.

        Raises:
            ValueError: the labels of a file are not valid; the message names the file.
        """
        order = [split for split in ("train", "validation", "test") if split in self.splits.values()]
        by_split = {
            split: [footer for file, footer in self.footers.items() if self.splits[file] == split] for split in order
        }
        unlabelled = tuple(split for split, found in by_split.items() if all(map(self._is_unlabelled, found)))
        manifest = Manifest(
            name=name,
            classes=(classes := self._classes()),
            splits={split: tuple(footer.shard for footer in found) for split, found in by_split.items()},
            unlabelled=unlabelled if classes else (),
            width=None,
            height=None,
            quarantined=0,
            registered=storage.resolve(self.listing.uri),
            image_column=self.columns.image,
            label_column=self.columns.label,
        )
        findings: Findings = {}
        for split, found in by_split.items():
            if split in unlabelled:
                findings[f"{split}_images_without_labels"] = Finding(count=manifest.num_samples(split), examples=())
            elif len(classes) > 1 and (odd := self._sorted_row_groups(found, len(classes))):
                findings[f"{split}_row_groups_sorted_by_class"] = finding(odd)
                log.warning(
                    "%d of %d row groups of %s are sorted by class: batches would hold few classes, whatever the seed; "
                    "pass --copy-parquet, which shuffles, or train with a larger --order.shuffle-row-groups",
                    len(odd),
                    len(manifest.row_group_sizes(split)),
                    split,
                )
        return manifest, findings

    def _sorted_row_groups(self, footers: list[_Footer], num_classes: int) -> list[str]:
        odd = []
        for footer in footers:
            spans = self._spans(footer)
            if spans is not None:
                odd += [
                    f"{footer.shard.path} row group {i}: labels {spans[0][i]} to {spans[1][i]}"
                    for i in narrow_row_groups(np.array(footer.shard.row_groups), *spans, num_classes)
                ]
        return odd

    def _spans(self, footer: _Footer) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the smallest and the largest label of every row group, or None if labels are names."""
        found = footer.columns[self.columns.label or ""]
        if any(isinstance(statistics.min, str) for statistics in found):
            return None
        lows, highs = ([getattr(statistics, end) for statistics in found] for end in ("min", "max"))
        return np.array(lows, np.int64), np.array(highs, np.int64)

    def _classes(self) -> tuple[str, ...]:
        """Return the classes of all files with labels, or none if there is no such file.

        Raises:
            ValueError: labels are not in [0, C).
        """
        labelled = self._labelled()
        spans = [(footer, self._spans(footer)) for footer in labelled]
        if not labelled:
            return ()
        if any(span is None for _, span in spans):
            names = (set(self._labels(footer.shard.path) or ()) for footer in labelled)
            return tuple(sorted(set[str]().union(*names)))
        classes = self._names() or tuple(map(str, range(max(int(span[1].max()) for _, span in spans if span) + 1)))
        for footer, span in spans:
            if span and (span[0].min() < 0 or span[1].max() >= len(classes)):
                raise ValueError(
                    f"{storage.join(self.listing.uri, footer.shard.path)} has labels from {span[0].min()} to "
                    f"{span[1].max()}; accepted: 0 to {len(classes) - 1}, or -1 throughout a split that has none"
                )
        return classes


def narrow_row_groups(rows: np.ndarray, lowest: np.ndarray, highest: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the row groups whose labels spread over less than FAIR_SPREAD of the spread of n random labels.

    The expected range of n uniform draws from [0, C - 1] is (C - 1) (n - 1) / (n + 1).
    """
    fair = (num_classes - 1) * (rows - 1) / (rows + 1)
    return np.flatnonzero((highest - lowest < FAIR_SPREAD * fair) & (rows >= JUDGED_ROWS))


# ------------------------------------------------------------------------------------------------------------ footers


def open_parquet(listing: Listing, image_column: str | None, label_column: str | None, splits: Splits) -> ParquetSource:
    """Read the footers of the Parquet files beneath a source, and find the columns of images and labels.

    Raises:
        ValueError: a file is damaged, or no column has images; the message names the file.
    """
    names = listing.matching(PARQUET)
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        footers = dict(
            zip(
                names, threads.map(lambda name: _read_footer(storage.join(listing.uri, name), name), names), strict=True
            )
        )
    images = {_image_column(storage.join(listing.uri, name), f, image_column) for name, f in footers.items()}
    labels = {_label_column(storage.join(listing.uri, name), f, label_column) for name, f in footers.items()}
    if len(images) > 1 or len(labels) > 1:
        raise ValueError(
            f"--source {listing.named}: its files have different columns: {sorted(map(str, images | labels))}"
        )
    columns = Columns(images.pop(), labels.pop())
    guessed = []
    if image_column is None and columns.image != "image.bytes":
        guessed.append(f"column {columns.image} as images (--image-column)")
    if label_column is None and columns.label != "label":
        guessed.append(f"column {columns.label} as labels (--label-column)" if columns.label else "no column as labels")
    of_file = {name: splits.of_shard(name) for name in names}
    odd = [name for name, split in of_file.items() if not split] if any(of_file.values()) else []
    of_file = {name: split or "train" for name, split in of_file.items()}
    return ParquetSource(listing, footers, columns, of_file, tuple(guessed), tuple(odd))


def _read_footer(uri: str, name: str) -> _Footer:
    try:
        with storage.open_input(uri, _FOOTER_BYTES) as file:
            size = file.seek(0, io.SEEK_END)
            footer = pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not a valid Parquet file: {error}") from error
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    shard = Shard(path=name, bytes=size, rows=footer.num_rows, row_groups=tuple(group.num_rows for group in groups))
    columns = {
        footer.schema.column(i).path: [g.column(i).statistics for g in groups] for i in range(footer.num_columns)
    }
    try:
        features = json.loads((footer.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        features = {}
    return _Footer(shard, footer.schema.to_arrow_schema(), columns, features if isinstance(features, dict) else {})


def _image_column(uri: str, footer: _Footer, option: str | None) -> str:
    """Return the path of the column with encoded images: a binary column, or the field bytes of a struct."""
    found = {}
    for field in footer.schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            found[field.name] = f"{field.name}.bytes"
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            found[field.name] = field.name
    names = ", ".join(footer.schema.names)
    if option is not None and option.removesuffix(".bytes") not in found:
        raise ValueError(f"--image-column {option}: {uri} has no such column of encoded images; it has {names}")
    choices = [option.removesuffix(".bytes")] if option else [n for n in ("image", "img") if n in found] or list(found)
    if len(choices) != 1:
        images = [field.name for field in footer.schema if pa.types.is_struct(field.type)]
        why = f"its column {images[0]} has the paths of the images and not their bytes" if images and not found else ""
        why = why or f"{'several' if choices else 'none'} of its columns may be encoded images: it has {names}"
        raise ValueError(f"{uri}: {why}; pass --image-column NAME for a column of encoded images")
    path = found[choices[0]]
    statistics = footer.columns.get(path, [])
    rows = footer.shard.row_groups
    if rows and all(s is not None and s.null_count == n for s, n in zip(statistics, rows, strict=True)):
        raise ValueError(f"{uri}: column {path} is empty: the file has the paths of the images and not their bytes")
    return path


def _label_column(uri: str, footer: _Footer, option: str | None) -> str | None:
    names = footer.schema.names
    if option is not None and option not in names:
        raise ValueError(f"--label-column {option}: {uri} has no such column; it has {', '.join(names)}")
    found = option or next((name for name in _LABELS if name in names), None)
    if found is None:
        return None
    kind = footer.schema.field(found).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{uri}: column {found} is {kind}; accepted as labels: integers or names")
    if any(s is None or not s.has_min_max or s.null_count for s in footer.columns[found]):
        raise ValueError(f"{uri} has null labels, or its footer lacks the smallest and largest label: write it again")
    return found


def _images(column: str, uri: str) -> Iterator[bytes]:
    """Yield all images of a file in order. A missing image yields no bytes, and is quarantined later."""
    with storage.open_input(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=[column]):
            yield from (data or b"" for data in first_column(pa.Table.from_batches([batch])).to_pylist())


def first_column(table: pa.Table) -> pa.ChunkedArray:
    """Return the only column of a table, or the innermost field if it is a struct."""
    while pa.types.is_struct(table.schema.field(0).type):
        table = table.flatten()
    return table.column(0)
