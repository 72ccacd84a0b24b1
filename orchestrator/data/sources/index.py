"""The objects of a source, and the index of its images, which is built from the entries that a layout yields."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from orchestrator import storage
from orchestrator.data.config import PrepareConfig

ACCEPTED = (
    "class folders <class>/<image>, files <class>_<anything>, tars or zips of these, WebDataset, Parquet, CIFAR's "
    "binary version, downsampled ImageNet's .npz, LSUN's LMDB, or images with a label map (--labels FILE) or none "
    "(--layout unlabelled)"
)
EXAMPLES = 5  # number of examples that a finding has
MAX_GAPS = 1000  # class numbers that may be missing, in addition to as many as there are classes
_CHUNK = 1 << 16  # images that are packed at a time

INDEX = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),  # -1: none
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),  # empty: unknown
        pa.field("object", pa.dictionary(pa.int32(), pa.string())),  # relative to the source; null: the key
        pa.field("start", pa.int64(), nullable=False),  # of the image's bytes in the object
        pa.field("size", pa.int64(), nullable=False),
    ]
)
_OBJECTS = pa.schema([("name", pa.large_string()), ("size", pa.int64())])


class Entry(NamedTuple):
    """One image, as every layout yields it."""

    key: str
    label: str | int | None  # the name or the number of its class; None: no label
    split: str  # train, validation or test; empty: unknown
    object: str | None  # object with the image's bytes [start, start + size), relative to the source; None: the key
    start: int = 0
    size: int = 0


class Finding(BaseModel, frozen=True, extra="forbid"):
    """A kind of irregularity in a source: the number of cases and the first few of them."""

    count: int
    examples: tuple[str, ...]


Findings = dict[str, Finding]


def finding(cases: Sequence[str], count: int | None = None) -> Finding:
    """Return a finding with these cases. `count` is their number if only the first are given."""
    return Finding(count=len(cases) if count is None else count, examples=tuple(cases[:EXAMPLES]))


@dataclass(eq=False)
class Listing:
    """The objects beneath a source, sorted by their names."""

    named: str  # the source as the user wrote it: a folder or an object
    uri: str  # the folder
    names: pa.ChunkedArray  # of large strings, relative to `uri`
    sizes: np.ndarray  # int64 [n], in bytes

    def digest(self) -> str:
        """Return a hash of names and sizes, which differs if the source has changed."""
        joined = hashlib.sha256(self.sizes.tobytes())
        for begin in range(0, len(self.names), _CHUNK):
            joined.update("\0".join(self.names[begin : begin + _CHUNK].to_pylist()).encode())
        return joined.hexdigest()

    def matching(self, pattern: str) -> list[str]:
        """Return the names that match a regular expression."""
        return self.names.filter(pc.match_substring_regex(self.names, pattern)).to_pylist()

    def has(self, pattern: str) -> bool:
        """Return whether any name matches a regular expression."""
        return bool(pc.any(pc.match_substring_regex(self.names, pattern)).as_py())

    def size(self, name: str) -> int:
        """Return the size of an object in bytes."""
        return int(self.sizes[pc.index(self.names, name).as_py()])


def list_source(config: PrepareConfig) -> Listing:
    """List the objects beneath the source. If it is an object itself, list that object beneath its folder.

    Raises:
        FileNotFoundError: there is neither an object nor a folder.
    """
    if config.source == "digits":
        return _listing("digits", "digits", iter(()))
    uri = config.path(config.source)
    try:
        size = storage.size_of(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--source {uri} does not exist") from error
    if size is None:
        return _listing(uri, uri.rstrip("/"), (entry for listed in storage.list_tree(uri) for entry in listed))
    folder, name = uri.rsplit("/", 1)
    return _listing(uri, folder, iter([(name, size)]))


def _listing(named: str, uri: str, objects: Iterator[tuple[str, int]]) -> Listing:
    chunks = []
    while chunk := list(islice(objects, _CHUNK)):
        chunks.append(pa.record_batch(list(zip(*chunk, strict=True)), schema=_OBJECTS))
    table = pa.Table.from_batches(chunks, _OBJECTS).sort_by("name")
    return Listing(named, uri, table["name"], table["size"].to_numpy())


# ------------------------------------------------------------------------------------------------------------- source


@dataclass(eq=False)
class Reading:
    """The interpretation of a source by a layout: an iterator of entries, and everything else that was found."""

    layout: str  # description for the user
    entries: Iterable[Entry] = ()
    classes: tuple[str, ...] | None = None  # in the order of the labels; None: sorted names, or numbers
    # Yields all images of an object (by its URI) in order, if they cannot be read by byte ranges. Then `start` of an
    # entry is its number in the object, and the images are staged.
    images: Callable[[str], Iterator[bytes]] | None = None
    companions: dict[str, str] = field(default_factory=dict)  # files beside the images, and how they are used
    flat: bool = False  # the class of an image is the first part of its file name
    guesses: tuple[str, ...] = ()  # choices that were made by names, for the user to check
    suspicions: Findings = field(default_factory=dict)  # by the names in `orchestrator.data.suspicions`
    findings: Findings = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # number of files that are no images, by kind


@dataclass(frozen=True, eq=False)
class Source:
    """The images to prepare: the index has their places, and their bytes are read on demand."""

    listing: Listing
    reading: Reading
    uri: str  # the folder that the objects of the index are relative to
    classes: tuple[str, ...]  # in the order of the labels; empty: all labels are -1
    index: pa.Table  # of INDEX, sorted by key, each key once
    findings: Findings

    def counts(self) -> dict[str, np.ndarray]:
        """Return the number of images of every class by split, int64 [classes], or [1] if there are no classes."""
        labels, counts = self.index["label"].to_numpy(), {}
        for split in pc.unique(self.index["split"]).to_pylist():
            mask = pc.equal(self.index["split"], split).to_numpy()
            counts[split] = np.bincount(np.maximum(labels[mask], 0), minlength=max(1, len(self.classes)))
        return counts

    def total(self) -> np.ndarray:
        """Return the number of images of every class over all splits, int64 [classes]."""
        return np.sum(list(self.counts().values()), axis=0)


def make_source(reading: Reading, listing: Listing) -> Source:
    """Build the index from the entries of a reading. If several images have one key, keep the first of them.

    Raises:
        ValueError: there are no images, or their labels are not valid.
    """
    names, index = _pack(reading.entries)
    if not len(index):
        raise ValueError(f"--source {listing.named} holds no images")
    classes, labels = _classes(listing.named, reading.classes, names, index["label"].to_numpy())
    index = index.set_column(1, INDEX.field("label"), pa.array(labels, pa.int32()))
    findings = dict(reading.findings)
    if classes and (labels < 0).any():
        index = _drop_unlabelled(index, findings)
    index, repeated = _sorted_once(index)
    if repeated:
        findings["duplicate_keys"] = finding(repeated)
    if classes:
        absent = np.setdiff1d(np.arange(len(classes)), index["label"].to_numpy())
        if len(absent):
            findings["classes_without_images"] = finding([classes[label] for label in absent])
    return Source(listing, reading, listing.uri, classes, index, findings)


def _pack(entries: Iterable[Entry]) -> tuple[list[str | int | None], pa.Table]:
    """Return the distinct labels in order of first use, and a table of INDEX with labels as places in that list."""
    numbers: dict[str | int | None, int] = {}
    chunks, entries = [], iter(entries)
    while rows := list(islice(entries, _CHUNK)):
        columns: list[Any] = list(zip(*rows, strict=True))
        columns[1] = [numbers.setdefault(label, len(numbers)) for label in columns[1]]
        chunks.append(pa.table(columns, schema=INDEX))
    table = pa.concat_tables(chunks or [INDEX.empty_table()])
    return list(numbers), table.unify_dictionaries().combine_chunks()


def _classes(
    source: str, class_names: tuple[str, ...] | None, names: list[str | int | None], codes: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes, and the label of each image, int64 [n]. `codes` are places in `names`.

    given: the classes in the order of the labels; None means the sorted names, or the numbers from 0 on.
    """
    kinds = {type(name) for name in names} - {type(None)}
    if kinds == {str, int}:
        raise ValueError(
            f"--source {source}: some images have class names and others class numbers; "
            "pass --labels with names for all of them"
        )
    if not kinds:
        return (), np.full(len(codes), -1)
    if kinds == {str}:
        classes = class_names or tuple(sorted(str(name) for name in names if name is not None))
        number = {name: label for label, name in enumerate(classes)}
        labels = [-1 if name is None else number[name] for name in names]  # type: ignore[index]
        return classes, np.array(labels)[codes]
    numbers = [name for name in names if isinstance(name, int)]
    span = f"{min(numbers)} to {max(numbers)}"
    if class_names is None and (min(numbers) < 0 or max(numbers) >= 2 * len(numbers) + MAX_GAPS):
        raise ValueError(
            f"--source {source}: labels are {span}, but only {len(numbers)} of them occur; accepted: numbers from 0 "
            "without large gaps, or class names"
        )
    classes = class_names or tuple(map(str, range(max(numbers) + 1)))
    if min(numbers) < 0 or max(numbers) >= len(classes):
        raise ValueError(f"--source {source}: labels are {span}; accepted: 0 to {len(classes) - 1}")
    return classes, np.array([-1 if name is None else name for name in names])[codes]


def _drop_unlabelled(index: pa.Table, findings: Findings) -> pa.Table:
    """Return the images with labels. Report the others, and report splits without labels by their names."""
    labelled = pc.greater_equal(index["label"], 0)
    without, index = index.filter(pc.invert(labelled)), index.filter(labelled)
    splits = index["split"].unique().to_pylist()
    for split in without["split"].unique().to_pylist():
        keys = without["key"].filter(pc.equal(without["split"], split))
        kind = "images_without_label" if split in splits else f"{split or 'other'}_images_without_labels"
        findings[kind] = finding(keys[:EXAMPLES].to_pylist(), len(keys))
    return index


def _sorted_once(index: pa.Table) -> tuple[pa.Table, list[str]]:
    """Return the index sorted by key with each key once, and the keys that were repeated."""
    by_place = [("key", "ascending"), ("object", "ascending"), ("start", "ascending")]
    plain = index.set_column(3, "object", index["object"].cast(pa.string()))
    index = index.take(pc.sort_indices(plain, by_place)).combine_chunks()
    again = np.zeros(len(index), bool)
    keys = index["key"].chunk(0) if len(index) else pa.array([], pa.large_string())
    again[1:] = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    return index.filter(pa.array(~again)).combine_chunks(), keys.filter(pa.array(again)).to_pylist()


# ------------------------------------------------------------------------------------------------------------- splits

_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_LIKE_SPLITS = {"eval", "evaluation", "dev", "extra", "holdout", "heldout", "trainval", "unlabeled", "unlabelled"}
_NEUTRAL = {
    "imagenet", "ilsvrc", "cls", "loc", "img", "imgs", "image", "images", "set", "data", "dataset", "split", "x", "of",
    "part", "batch", "lmdb", "bin", "jpeg", "png",
}  # fmt: skip
OUT = "out"  # the split of images that --split omits


class Splits:
    """The splits that names mean: by the words in a name, and by the option --split."""

    def __init__(self, option: str | None = None) -> None:
        self.ignored = option == "none"
        self._given = dict[str, str]()
        for part in option.split(",") if option and not self.ignored else ():
            name, _, split = part.partition("=")
            if not name or _WORDS.get(split, split) not in {*_WORDS.values(), OUT}:
                raise ValueError(
                    f"--split {option}: {part!r} is not NAME=SPLIT with train, validation, test or out; accepted: "
                    "pairs such as extra=train,holdout=out, or none"
                )
            self._given[name.lower()] = _WORDS.get(split, split)

    def of_folder(self, name: str) -> str:
        """Return the split that the name of a folder means, or an empty string if it means none."""
        if self.ignored:
            return ""
        words = set(_tokens(name)) - _NEUTRAL
        return self._given.get(name.lower(), "") or (_WORDS.get(words.pop(), "") if len(words) == 1 else "")

    def of_shard(self, path: str) -> str:
        """Return the split in the path of a shard such as data/train-00000-of-00014.parquet, or an empty string."""
        if self.ignored:
            return ""
        words = re.split(r"[/_.\-]", path.lower())
        by_option = {self._given[word] for word in words if word in self._given}
        splits = by_option or {_WORDS[word] for word in words if word in _WORDS}
        return splits.pop() if len(splits) == 1 else ""

    def looks_like(self, name: str) -> bool:
        """Return whether a folder's name looks like a split, even if `of_folder` finds none."""
        words = {word for word in _tokens(name) if len(word) > 1} - _NEUTRAL
        return not self.ignored and bool(words) and words <= {*_WORDS, *_LIKE_SPLITS}


def _tokens(name: str) -> list[str]:
    """Return the words of a name in lower case, without numbers."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def known_split(name: str) -> str:
    """Return the split of exactly this name (train, val, test, ...), or an empty string."""
    return _WORDS.get(name.lower(), "")
