"""Parquet files as the Hugging Face library writes them, which are registered in place or copied."""

import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.data.config import PrepareConfig
from orchestrator.data.dataset import Manifest, Shard
from orchestrator.data.sources.index import ACCEPTED, Entry, Findings, Listing, Reading, Splits, finding

PARQUET = r"(^|/)[^./][^/]*\.parquet$"
FAIR_SPREAD = 0.5  # share of the spread of random labels, below which the labels of a row group count as sorted
JUDGED_ROWS = 8  # row groups with fewer rows may have a small spread by chance (with more: less than one in a hundred)
_FOOTERS_AT_ONCE = 16
_FOOTER_BYTES = 256 << 10  # fetched at a time
_BATCH_ROWS = 256  # of images, read at a time
_LABELS = ("label", "labels", "fine_label", "class", "class_id", "cls", "category", "target")  # the first one is used

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Footer:
    """The footer of one file."""

    uri: str
    shard: Shard
    schema: pa.Schema
    columns: dict[str, list[Any]]  # statistics of every row group, by the path of the column
    features: dict[str, Any]  # the Hugging Face library's description of the columns


@dataclass(frozen=True)
class ParquetSource:
    """The Parquet files of a source, with their footers."""

    listing: Listing
    footers: dict[str, _Footer]
    image_column: str
    label_column: str | None  # None: the images have no labels
    splits: dict[str, str]  # split of every file; train if its name has none
    guesses: tuple[str, ...]  # columns that were chosen by their names, as text
    odd: tuple[str, ...]  # files without a split in their names, if other names have one

    def reading(self) -> Reading:
        """Return the files as a reading with keys <file>/<row>, whose images are staged."""
        layout = f"Parquet, images in {self.image_column}, labels in {self.label_column or 'no column'}"
        images = partial(_images, self.image_column)
        reading = Reading(layout, self._entries(), self._names(), images, guesses=self.guesses)
        if self.odd:
            reading.suspicions["names_like_splits"] = finding(self.odd)
        return reading

    def _entries(self) -> Iterator[Entry]:
        for name, footer in self.footers.items():
            labels = self._labels(footer) if self.label_column else [None] * footer.shard.rows
            for row, label in enumerate(labels):
                key = f"{name.removesuffix('.parquet')}/{row:08d}"
                yield Entry(key, None if label == -1 else label, self.splits[name], name, row)

    def _labels(self, footer: _Footer) -> list[Any]:
        with storage.open_input(footer.uri) as file:
            return pq.ParquetFile(file).read(columns=[self.label_column]).column(0).to_pylist()

    def _labelled(self) -> list[_Footer]:
        """Return the footers of the files whose labels are not all -1."""
        return [footer for footer in self.footers.values() if not self._is_unlabelled(footer)]

    def _is_unlabelled(self, footer: _Footer) -> bool:
        return self.label_column is None or all(s.max == -1 for s in footer.columns[self.label_column])

    def _names(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the files' metadata, or None."""
        label = self.label_column or ""
        named = {tuple(map(str, footer.features.get(label, {}).get("names") or ())) for footer in self._labelled()}
        if len(named) > 1:
            raise ValueError(f"--source {self.listing.named}: its files have different classes")
        return (named.pop() if named else ()) or None

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
        unlabelled = tuple(split for split, footers in by_split.items() if all(map(self._is_unlabelled, footers)))
        classes = self._classes()
        manifest = Manifest(
            name=name,
            classes=classes,
            splits={split: tuple(footer.shard for footer in footers) for split, footers in by_split.items()},
            unlabelled=unlabelled if classes else (),
            width=None,
            height=None,
            quarantined=0,
            registered=storage.resolve(self.listing.uri),
            image_column=self.image_column,
            label_column=self.label_column,
        )
        findings: Findings = {}
        for split, footers in by_split.items():
            if split in unlabelled:
                findings[f"{split}_images_without_labels"] = finding((), manifest.num_samples(split))
            elif odd := [group for footer in footers for group in self._sorted_row_groups(footer, len(classes))]:
                findings[f"{split}_row_groups_sorted_by_class"] = finding(odd)
                log.warning(
                    "%d of %d row groups of %s are sorted by class: batches would hold few classes, whatever the seed; "
                    "pass --copy-parquet, which shuffles, or train with a larger --order.shuffle-row-groups",
                    len(odd),
                    len(manifest.row_group_sizes(split)),
                    split,
                )
        return manifest, findings

    def _sorted_row_groups(self, footer: _Footer, num_classes: int) -> list[str]:
        low, high = self._spans(footer)
        if num_classes < 2 or low.dtype.kind == "U":
            return []
        return [
            f"{footer.shard.path} row group {i}: labels {low[i]} to {high[i]}"
            for i in narrow_row_groups(np.array(footer.shard.row_groups), low, high, num_classes)
        ]

    def _spans(self, footer: _Footer) -> list[np.ndarray]:
        """Return the smallest and the largest label of every row group: two arrays of numbers or of names."""
        row_groups = footer.columns[self.label_column or ""]
        return [np.array([getattr(statistics, end) for statistics in row_groups]) for end in ("min", "max")]

    def _classes(self) -> tuple[str, ...]:
        """Return the classes of all files with labels, or none if there is no such file.

        Raises:
            ValueError: labels are not in [0, C).
        """
        labelled = self._labelled()
        spans = [self._spans(footer) for footer in labelled]
        if not labelled:
            return ()
        if any(low.dtype.kind == "U" for low, _ in spans):
            return tuple(sorted({name for footer in labelled for name in self._labels(footer)}))
        classes = self._names() or tuple(map(str, range(max(high.max() for _, high in spans) + 1)))
        for footer, (low, high) in zip(labelled, spans, strict=True):
            if low.min() < 0 or high.max() >= len(classes):
                raise ValueError(
                    f"{footer.uri} has labels from {low.min()} to {high.max()}; accepted: 0 to {len(classes) - 1}, or "
                    "-1 throughout a split that has none"
                )
        return classes


def narrow_row_groups(rows: np.ndarray, lowest: np.ndarray, highest: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the row groups whose labels spread over less than FAIR_SPREAD of the spread of n random labels.

    The expected range of n uniform draws from [0, C - 1] is (C - 1) (n - 1) / (n + 1).
    """
    fair = (num_classes - 1) * (rows - 1) / (rows + 1)
    return np.flatnonzero((highest - lowest < FAIR_SPREAD * fair) & (rows >= JUDGED_ROWS))


# ------------------------------------------------------------------------------------------------------------ footers


def open_parquet(listing: Listing, config: PrepareConfig) -> ParquetSource:
    """Read the footers of the Parquet files beneath a source, and find the columns of images and labels.

    Raises:
        ValueError: there are no files, one is damaged, or no column has images; the message names the file.
    """
    names, splits = listing.matching(PARQUET), Splits(config.split)
    if not names:
        raise ValueError(f"--source {listing.named} contains no Parquet files; accepted: {ACCEPTED}")
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        footers = list(threads.map(lambda name: _read_footer(storage.join(listing.uri, name), name), names))
    images = {_image_column(footer, config.image_column) for footer in footers}
    labels = {_label_column(footer, config.label_column) for footer in footers}
    if len(images) > 1 or len(labels) > 1:
        raise ValueError(
            f"--source {listing.named}: its files have different columns: {sorted(map(str, images | labels))}"
        )
    image, label = images.pop(), labels.pop()
    guesses = []
    if config.image_column is None and image != "image.bytes":
        guesses.append(f"column {image} as images (--image-column)")
    if config.label_column is None and label != "label":
        guesses.append(f"column {label} as labels (--label-column)" if label else "no column as labels")
    of_file = {name: splits.of_shard(name) for name in names}
    odd = [name for name, split in of_file.items() if not split] if any(of_file.values()) else []
    of_file = {name: split or "train" for name, split in of_file.items()}
    by_name = dict(zip(names, footers, strict=True))
    return ParquetSource(listing, by_name, image, label, of_file, tuple(guesses), tuple(odd))


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
    features = features if isinstance(features, dict) else {}
    return _Footer(uri, shard, footer.schema.to_arrow_schema(), columns, features)


def _image_column(footer: _Footer, option: str | None) -> str:
    """Return the path of the column with encoded images: a binary column, or the field bytes of a struct."""
    columns = {}
    for field in footer.schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            columns[field.name] = f"{field.name}.bytes"
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            columns[field.name] = field.name
    names = ", ".join(footer.schema.names)
    if option is not None and option.removesuffix(".bytes") not in columns:
        raise ValueError(f"--image-column {option}: {footer.uri} has no such column of encoded images; it has {names}")
    usual = [name for name in ("image", "img") if name in columns]
    choices = [option.removesuffix(".bytes")] if option else usual or list(columns)
    if len(choices) != 1:
        images = [field.name for field in footer.schema if pa.types.is_struct(field.type)]
        why = (
            f"its column {images[0]} has the paths of the images and not their bytes" if images and not columns else ""
        )
        why = why or f"{'several' if choices else 'none'} of its columns may be encoded images: it has {names}"
        raise ValueError(f"{footer.uri}: {why}; pass --image-column NAME for a column of encoded images")
    path = columns[choices[0]]
    statistics = footer.columns.get(path, [])
    rows = footer.shard.row_groups
    if rows and all(s is not None and s.null_count == n for s, n in zip(statistics, rows, strict=True)):
        raise ValueError(
            f"{footer.uri}: column {path} is empty: the file has the paths of the images and not their bytes"
        )
    return path


def _label_column(footer: _Footer, option: str | None) -> str | None:
    names = footer.schema.names
    if option is not None and option not in names:
        raise ValueError(f"--label-column {option}: {footer.uri} has no such column; it has {', '.join(names)}")
    column = option or next((name for name in _LABELS if name in names), None)
    if column is None:
        return None
    kind = footer.schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{footer.uri}: column {column} is {kind}; accepted as labels: integers or names")
    if any(s is None or not s.has_min_max or s.null_count for s in footer.columns[column]):
        raise ValueError(
            f"{footer.uri} has null labels, or its footer lacks the smallest and largest label: write it again"
        )
    return column


def _images(column: str, uri: str) -> Iterator[bytes]:
    """Yield all images of a file in order. A missing image yields no bytes, and is quarantined later."""
    with storage.open_input(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=[column]):
            column_of_bytes = pa.Table.from_batches([batch]).flatten().column(0)
            yield from (data or b"" for data in column_of_bytes.to_pylist())
