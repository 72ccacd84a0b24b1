"""Parquet files as the Hugging Face library writes them. They are registered in place or copied."""

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
from orchestrator.data.sources.index import ACCEPTED, OUT, Entry, Findings, Listing, Reading, Splits, finding

PARQUET = r"(^|/)[^./][^/]*\.parquet$"
FAIR_SPREAD = 0.5  # a row group counts as sorted if its labels spread over less than this fraction of random labels
MIN_JUDGED_ROWS = 8  # with at least as many rows, less than 1% of random row groups spread so little; fewer: not judged
_FOOTERS_AT_ONCE = 16
_FOOTER_BYTES = 256 << 10  # fetched at a time
_BATCH_ROWS = 256  # rows with images that are read at a time
# Names of columns with labels; the first one that a file has is used.
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "class_id", "cls", "category", "target")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Footer:
    """The footer of one file."""

    uri: str
    shard: Shard
    schema: pa.Schema
    statistics: dict[str, list[Any]]  # path of a column -> its statistics in every row group
    features: dict[str, Any]  # the Hugging Face library's description of the columns


@dataclass(frozen=True)
class ParquetSource:
    """The Parquet files of a source, with their footers."""

    listing: Listing
    footers: dict[str, _Footer]  # of every file, by its name relative to the source
    image_column: str
    label_column: str | None  # None: the images have no labels
    splits: dict[str, str]  # split of every file; train if its name contains none
    guesses: tuple[str, ...]  # columns that were chosen by their names, as text
    suspicions: Findings
    left_out: dict[str, int]  # files that are not used, by kind

    def reading(self) -> Reading:
        """Return the files as a reading with keys <file>/<row>, whose images are staged.

        Raises:
            ValueError: the files name different classes.
        """
        layout = f"Parquet, images in {self.image_column}, labels in {self.label_column or 'no column'}"
        images = partial(_read_images, self.image_column)
        entries, names = self._entries(), self._class_names()
        return Reading(
            layout, entries, names, images, guesses=self.guesses, suspicions=self.suspicions, left_out=self.left_out
        )

    def _entries(self) -> Iterator[Entry]:
        for name, footer in self.footers.items():
            labels = self._read_labels(footer) if self.label_column else [None] * footer.shard.rows
            for row, label in enumerate(labels):
                key = f"{name.removesuffix('.parquet')}/{row:08d}"
                yield Entry(key, None if label == -1 else label, self.splits[name], name, row)

    def _read_labels(self, footer: _Footer) -> list[Any]:
        with storage.open_input(footer.uri) as file:
            return pq.ParquetFile(file).read(columns=[self.label_column]).column(0).to_pylist()

    def _labelled_footers(self) -> list[_Footer]:
        return [footer for footer in self.footers.values() if not self._is_unlabelled(footer)]

    def _is_unlabelled(self, footer: _Footer) -> bool:
        """Return whether all labels of a file are -1, or there is no column of labels."""
        return self.label_column is None or all(s.max == -1 for s in footer.statistics[self.label_column])

    def _class_names(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the files' metadata, or None.

        Raises:
            ValueError: the files name different classes.
        """
        label = self.label_column or ""
        names_of_files = {
            tuple(map(str, footer.features.get(label, {}).get("names") or ())) for footer in self._labelled_footers()
        }
        if len(names_of_files) > 1:
            raise ValueError(
                f"--source {self.listing.source}: its files name different classes; prepare a dataset from each part "
                "with the same classes"
            )
        return (names_of_files.pop() if names_of_files else ()) or None

    def register(self, name: str) -> tuple[Manifest, Findings]:
        """Return a manifest of the files, which stay where they are, and the findings about them.

        A warning says which splits have row groups that are sorted by class. Such row groups are found by the smallest
        and the largest label in the footers: the labels of rows in random order spread over almost all classes.

        Raises:
            ValueError: the labels of a file are not valid; the message names the file.
        """
        by_split: dict[str, list[_Footer]] = {}
        for split in ("train", "validation", "test"):
            if footers := [footer for file, footer in self.footers.items() if self.splits[file] == split]:
                by_split[split] = footers
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
                continue
            sorted_groups = [text for footer in footers for text in self._sorted_row_groups(footer, len(classes))]
            if sorted_groups:
                findings[f"{split}_row_groups_sorted_by_class"] = finding(sorted_groups)
                log.warning(
                    "%d of %d row groups of %s are sorted by class, so batches would hold few classes, whatever the "
                    "seed; the job continues. Pass --copy-parquet, which shuffles, or train with a larger "
                    "--order.shuffle-row-groups",
                    len(sorted_groups),
                    len(manifest.row_group_sizes(split)),
                    split,
                )
        return manifest, findings

    def _sorted_row_groups(self, footer: _Footer, num_classes: int) -> list[str]:
        """Return a description of each row group of a file that is sorted by class; none if labels are names."""
        low, high = self._label_ranges(footer)
        if num_classes < 2 or low.dtype.kind == "U":
            return []
        return [
            f"{footer.shard.path} row group {i}: labels {low[i]} to {high[i]}"
            for i in narrow_row_groups(np.array(footer.shard.row_groups), low, high, num_classes)
        ]

    def _label_ranges(self, footer: _Footer) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and the largest label of every row group: two arrays of numbers or of names."""
        statistics = footer.statistics[self.label_column or ""]
        return np.array([s.min for s in statistics]), np.array([s.max for s in statistics])

    def _classes(self) -> tuple[str, ...]:
        """Return the classes of all files with labels, or none if there is no such file.

        Raises:
            ValueError: labels are not in [0, C), or files name different classes.
        """
        labelled = self._labelled_footers()
        if not labelled:
            return ()
        ranges = [self._label_ranges(footer) for footer in labelled]
        have_names = {low.dtype.kind == "U" for low, _ in ranges}
        if True in have_names:
            if False in have_names:
                raise ValueError(f"--source {self.listing.source}: some files have class names and others numbers")
            return tuple(sorted({name for footer in labelled for name in self._read_labels(footer)}))
        classes = self._class_names() or tuple(map(str, range(max(high.max() for _, high in ranges) + 1)))
        for footer, (low, high) in zip(labelled, ranges, strict=True):
            if low.min() < 0 or high.max() >= len(classes):
                raise ValueError(
                    f"{footer.uri} has labels from {low.min()} to {high.max()}; accepted: 0 to {len(classes) - 1}, or "
                    "-1 throughout a file without labels"
                )
        return classes


def narrow_row_groups(rows: np.ndarray, lowest: np.ndarray, highest: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the row groups whose labels spread over less than FAIR_SPREAD of the expected spread of random labels.

    The expected range of n uniform draws from [0, C - 1] is (C - 1) (n - 1) / (n + 1).

    rows, lowest, highest: number of rows, smallest and largest label of every row group, int64 [row groups].
    """
    expected = (num_classes - 1) * (rows - 1) / (rows + 1)
    return np.flatnonzero((highest - lowest < FAIR_SPREAD * expected) & (rows >= MIN_JUDGED_ROWS))


# ------------------------------------------------------------------------------------------------------------ footers


def open_parquet(listing: Listing, config: PrepareConfig) -> ParquetSource:
    """Read the footers of the Parquet files beneath a source, and find the columns of images and labels.

    Raises:
        ValueError: there are no files with rows, one is damaged, or no column has images; the message names the file.
    """
    splits, suspicions = Splits(config.split), Findings()
    split_of_file = splits.of_shards(listing.matching(PARQUET), suspicions)
    names = [name for name, split in split_of_file.items() if split != OUT]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
        footers = list(threads.map(lambda name: _read_footer(storage.join(listing.uri, name), name), names))
    left_out = {
        "files that --split leaves out": len(split_of_file) - len(names),
        "files without rows": sum(not footer.shard.rows for footer in footers),
    }
    footers = [footer for footer in footers if footer.shard.rows]
    if not footers:
        raise ValueError(f"--source {listing.source} contains no Parquet files with rows; accepted: {ACCEPTED}")
    image_columns = {_image_column(footer, config.image_column) for footer in footers}
    label_columns = {_label_column(footer, config.label_column) for footer in footers}
    if len(image_columns) > 1 or len(label_columns) > 1:
        columns = ", ".join(sorted(column or "none" for column in image_columns | label_columns))
        raise ValueError(
            f"--source {listing.source}: its files have different columns of images or labels ({columns}); pass "
            "--image-column and --label-column, or a --source whose files have the same columns"
        )
    image, label = image_columns.pop(), label_columns.pop()
    guesses = []
    if config.image_column is None and image != "image.bytes":
        guesses.append(f"column {image} as images (--image-column)")
    if config.label_column is None and label != "label":
        guesses.append(f"column {label} as labels (--label-column)" if label else "no column as labels")
    return ParquetSource(
        listing=listing,
        footers={footer.shard.path: footer for footer in footers},
        image_column=image,
        label_column=label,
        splits={name: split or "train" for name, split in split_of_file.items()},
        guesses=tuple(guesses),
        suspicions=suspicions,
        left_out={kind: count for kind, count in left_out.items() if count},
    )


def _read_footer(uri: str, name: str) -> _Footer:
    """Read the footer of the file at `uri`, whose name relative to the source is `name`.

    Raises:
        ValueError: it is not a valid Parquet file.
    """
    try:
        with storage.open_input(uri, _FOOTER_BYTES) as file:
            size = file.seek(0, io.SEEK_END)
            footer = pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is not a valid Parquet file: {error}") from error
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    shard = Shard(path=name, bytes=size, rows=footer.num_rows, row_groups=tuple(group.num_rows for group in groups))
    statistics = {
        footer.schema.column(i).path: [group.column(i).statistics for group in groups]
        for i in range(footer.num_columns)
    }
    try:
        features = json.loads((footer.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        features = {}
    features = features if isinstance(features, dict) else {}
    return _Footer(uri, shard, footer.schema.to_arrow_schema(), statistics, features)


def _image_column(footer: _Footer, option: str | None) -> str:
    """Return the path of the column with encoded images: a binary column, or the field bytes of a struct.

    option: the value of --image-column; None = a column named image or img, or else the only possible one.

    Raises:
        ValueError: there is no such column, there are several, or it is empty.
    """
    paths = {}  # of the columns that may have encoded images, by name
    for field in footer.schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            paths[field.name] = f"{field.name}.bytes"
        elif pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            paths[field.name] = field.name
    names = ", ".join(footer.schema.names)
    if option is not None and option.removesuffix(".bytes") not in paths:
        raise ValueError(f"--image-column {option}: {footer.uri} has no such column of encoded images; it has {names}")
    usual = [name for name in ("image", "img") if name in paths]
    choices = [option.removesuffix(".bytes")] if option else usual or list(paths)
    if len(choices) != 1:
        structs = [field.name for field in footer.schema if pa.types.is_struct(field.type)]
        reason = f"{'several' if choices else 'none'} of its columns may be encoded images: it has {names}"
        if structs and not paths:
            reason = f"its column {structs[0]} has the paths of the images and not their bytes"
        raise ValueError(f"{footer.uri}: {reason}; pass --image-column NAME for a column of encoded images")
    path = paths[choices[0]]
    statistics = footer.statistics.get(path, [])
    rows = footer.shard.row_groups
    if rows and all(s is not None and s.null_count == n for s, n in zip(statistics, rows, strict=True)):
        raise ValueError(
            f"{footer.uri}: column {path} is empty: the file has the paths of the images and not their bytes; write "
            "it again with the images embedded"
        )
    return path


def _label_column(footer: _Footer, option: str | None) -> str | None:
    """Return the column with labels, or None if there is none.

    option: the value of --label-column; None = the first of _LABEL_COLUMNS.

    Raises:
        ValueError: there is no column `option`, or the column has null labels, another type or no statistics.
    """
    names = footer.schema.names
    if option is not None and option not in names:
        raise ValueError(f"--label-column {option}: {footer.uri} has no such column; it has {', '.join(names)}")
    column = option or next((name for name in _LABEL_COLUMNS if name in names), None)
    if column is None:
        return None
    dtype = footer.schema.field(column).type
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if not (pa.types.is_integer(dtype) or pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
        raise ValueError(f"{footer.uri}: column {column} is {dtype}; accepted as labels: integers or names")
    if any(s is None or not s.has_min_max or s.null_count for s in footer.statistics[column]):
        raise ValueError(
            f"{footer.uri} has null labels, or its footer lacks the smallest and largest label: write it again"
        )
    return column


def _read_images(column: str, uri: str) -> Iterator[bytes]:
    """Yield all encoded images of a file in order. A null yields no bytes, and is quarantined later."""
    with storage.open_input(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=[column]):
            images = pa.Table.from_batches([batch]).flatten().column(0)
            yield from (data or b"" for data in images.to_pylist())
