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
EXAMPLES = 5  # most examples of a finding
MAX_GAPS = 1000  # class numbers that may lack images, in addition to one for each class that has some
_CHUNK = 1 << 16  # images that are packed at a time

INDEX = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),  # -1: none
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),  # empty: unknown
        pa.field("object", pa.dictionary(pa.int32(), pa.string())),  # relative to the source; null: equal to the key
        pa.field("start", pa.int64(), nullable=False),  # of the image's bytes in the object; see `Reading.images`
        pa.field("size", pa.int64(), nullable=False),  # in bytes; 0 until the image is staged
    ]
)
_OBJECTS = pa.schema([("name", pa.large_string()), ("size", pa.int64())])


class Entry(NamedTuple):
    """One image, as every layout yields it."""

    key: str
    label: str | int | None  # the name or the number of its class; None: no label
    split: str  # train, validation or test; empty: unknown
    # The object with the image's bytes [start, start + size), relative to the source; None: its name is the key.
    object: str | None
    start: int = 0
    size: int = 0


class Finding(BaseModel, frozen=True, extra="forbid"):
    """A kind of irregularity in a source: the number of cases and the first few of them."""

    count: int
    examples: tuple[str, ...]


Findings = dict[str, Finding]


def finding(cases: Sequence[str], count: int | None = None) -> Finding:
    """Return a finding with these cases. `count` is the number of all cases if `cases` has only the first of them."""
    return Finding(count=len(cases) if count is None else count, examples=tuple(cases[:EXAMPLES]))


@dataclass(eq=False)
class Listing:
    """The objects beneath a source, sorted by their names."""

    source: str  # URI of the source: a folder or an object
    uri: str  # URI of the folder: the source, or the folder of the object
    names: pa.ChunkedArray  # of large strings, relative to `uri`
    sizes: np.ndarray  # int64 [n], in bytes

    def digest(self) -> str:
        """Return a hash of names and sizes, which differs if the source has changed."""
        sha256 = hashlib.sha256(self.sizes.tobytes())
        for begin in range(0, len(self.names), _CHUNK):
            sha256.update("\0".join(self.names[begin : begin + _CHUNK].to_pylist()).encode())
        return sha256.hexdigest()

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
        ValueError: the name of a file is not UTF-8.
    """
    if config.source == "digits":
        return _listing("digits", "digits", iter(()))
    uri = config.path(config.source)
    try:
        size = storage.size_of(uri)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--source {uri} does not exist") from error
    if size is None:
        entries = (entry for listed in storage.list_tree(uri) for entry in listed)
        source, output = f"{storage.resolve(uri)}/", f"{storage.resolve(config.path(config.output))}/"
        if output.startswith(source) and output != source:  # the shards in it are not images of the source
            folder = output.removeprefix(source)
            entries = (entry for entry in entries if not entry[0].startswith(folder))
        return _listing(uri, uri.rstrip("/"), entries)
    folder, name = uri.rsplit("/", 1)
    return _listing(uri, folder, iter([(name, size)]))  # the source is an object


def _listing(source: str, uri: str, objects: Iterator[tuple[str, int]]) -> Listing:
    """Return a listing of (name, size) pairs, of which only a chunk are Python objects at the same time."""
    chunks = []
    while chunk := list(islice(objects, _CHUNK)):
        try:
            chunks.append(pa.record_batch(list(zip(*chunk, strict=True)), schema=_OBJECTS))
        except UnicodeEncodeError as error:
            raise ValueError(f"--source {source}: the file name {error.object!a} is not UTF-8; rename it") from error
    table = pa.Table.from_batches(chunks, _OBJECTS).sort_by("name")
    return Listing(source, uri, table["name"], table["size"].to_numpy())


# ------------------------------------------------------------------------------------------------------------- source


@dataclass(eq=False)
class Reading:
    """The interpretation of a source by a layout.

    `classes`, `findings` and `left_out` are complete only after an iteration over `entries`.
    """

    layout: str  # description for the user
    entries: Iterable[Entry] = ()
    classes: tuple[str, ...] | None = None  # in the order of the labels; None: sorted names, or numbers
    # None if images can be read by ranges of bytes. Otherwise a function that yields all images of the object at a URI
    # in order; then `start` of an entry is the number of the image in its object, and the images are staged.
    images: Callable[[str], Iterator[bytes]] | None = None
    companions: dict[str, str] = field(default_factory=dict)  # label files beside the images, and how they are used
    flat: bool = False  # the class of an image is the first part of its file name
    guesses: tuple[str, ...] = ()  # choices that were made by names, for the user to check
    suspicions: Findings = field(default_factory=dict)  # by the names in `orchestrator.data.suspicions`
    findings: Findings = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # number of files that are not used, by kind


@dataclass(frozen=True, eq=False)
class Source:
    """The images to prepare. The index says where their bytes are, and they are read on demand."""

    listing: Listing
    reading: Reading
    uri: str  # the folder that the objects of the index are relative to
    classes: tuple[str, ...]  # in the order of the labels; empty: all labels are -1
    index: pa.Table  # with schema INDEX, sorted by key, each key once
    findings: Findings

    def counts(self) -> dict[str, np.ndarray]:
        """Return the number of images of every class by split, int64 [classes], or [1] if there are no classes."""
        labels = self.index["label"].to_numpy()
        counts: dict[str, np.ndarray] = {}
        for split in pc.unique(self.index["split"]).to_pylist():
            mask = pc.equal(self.index["split"], split).to_numpy()
            added = np.bincount(np.maximum(labels[mask], 0), minlength=max(1, len(self.classes)))
            counts[split or "train"] = counts.get(split or "train", 0) + added
        return counts

    def total(self) -> np.ndarray:
        """Return the number of images of every class over all splits, int64 [classes]."""
        return np.sum(list(self.counts().values()), axis=0)


def make_source(reading: Reading, listing: Listing) -> Source:
    """Build the index from the entries of a reading. If several images have one key, keep the first of them.

    Raises:
        ValueError: there are no images, or their labels are not valid.
    """
    distinct_labels, index = _pack(_kept(reading))
    if not len(index):
        raise ValueError(f"--source {listing.source} holds no images; accepted: {ACCEPTED}")
    classes, labels = _classes(listing.source, reading.classes, distinct_labels, index["label"].to_numpy())
    index = index.set_column(1, INDEX.field("label"), pa.array(labels, pa.int32()))
    findings = dict(reading.findings)
    if classes and (labels < 0).any():
        index = _drop_unlabelled(index, findings)
    index, repeated = _sort_and_deduplicate(index)
    if repeated:
        findings["duplicate_keys"] = finding(repeated)
    if classes:
        unused = np.setdiff1d(np.arange(len(classes)), index["label"].to_numpy())
        if len(unused):
            findings["classes_without_images"] = finding([classes[label] for label in unused])
    return Source(listing, reading, listing.uri, classes, index, findings)


def _kept(reading: Reading) -> Iterator[Entry]:
    """Yield the entries of a reading except those that --split leaves out, which are counted."""
    kind = "images that --split leaves out"
    for entry in reading.entries:
        if entry.split == OUT:
            reading.left_out[kind] = reading.left_out.get(kind, 0) + 1
        else:
            yield entry


def _pack(entries: Iterable[Entry]) -> tuple[list[str | int | None], pa.Table]:
    """Return the distinct labels in order of first use, and the table of entries, whose labels index that list."""
    codes: dict[str | int | None, int] = {}
    chunks, entries = [], iter(entries)
    while rows := list(islice(entries, _CHUNK)):
        columns: list[Any] = list(zip(*rows, strict=True))
        columns[1] = [codes.setdefault(label, len(codes)) for label in columns[1]]
        chunks.append(pa.table(columns, schema=INDEX))
    table = pa.concat_tables(chunks or [INDEX.empty_table()])
    return list(codes), table.unify_dictionaries().combine_chunks()


def _classes(
    source: str, class_names: tuple[str, ...] | None, distinct_labels: list[str | int | None], codes: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes in the order of their numbers, and the number of each image's class, int64 [n]; -1 = none.

    class_names: the classes that the source lists; None = the sorted names, or the numbers from 0 on.
    distinct_labels: the labels as the layout yields them: names or numbers of classes, and None.
    codes: int64 [n], for each image the index of its label in `distinct_labels`.

    Raises:
        ValueError: there are both names and numbers, or numbers that are not in range.
    """
    kinds = {type(label) for label in distinct_labels} - {type(None)}
    if kinds == {str, int}:
        raise ValueError(
            f"--source {source}: some images have class names and others class numbers; "
            "pass --labels with names for all of them"
        )
    if not kinds:
        return (), np.full(len(codes), -1)
    if kinds == {str}:
        classes = class_names or tuple(sorted(str(name) for name in distinct_labels if name is not None))
        number_of = {name: number for number, name in enumerate(classes)}
        if unknown := sorted(set(distinct_labels) - {None, *classes}):  # type: ignore[type-var]
            raise ValueError(
                f"--source {source}: {unknown[0]} is not one of the classes that it lists, which are "
                f"{', '.join(classes[:EXAMPLES])}{', ...' if len(classes) > EXAMPLES else ''}"
            )
        labels = [-1 if name is None else number_of[name] for name in distinct_labels]  # type: ignore[index]
        return classes, np.array(labels)[codes]
    numbers = [label for label in distinct_labels if isinstance(label, int)]
    lowest, highest = min(numbers), max(numbers)
    if class_names is None and (lowest < 0 or highest >= 2 * len(numbers) + MAX_GAPS):
        raise ValueError(
            f"--source {source}: labels are {lowest} to {highest}, but only {len(numbers)} of them occur; accepted: "
            "numbers from 0 without large gaps, or class names"
        )
    classes = class_names or tuple(map(str, range(highest + 1)))
    if lowest < 0 or highest >= len(classes):
        raise ValueError(f"--source {source}: labels are {lowest} to {highest}; accepted: 0 to {len(classes) - 1}")
    return classes, np.array([-1 if label is None else label for label in distinct_labels])[codes]


def _drop_unlabelled(index: pa.Table, findings: Findings) -> pa.Table:
    """Return the images with labels, and add findings about the others.

    Images without a label in a split that has some get one finding, and each split without any labels gets its own.
    """
    has_label = pc.greater_equal(index["label"], 0)
    labelled, unlabelled = index.filter(has_label), index.filter(pc.invert(has_label))
    labelled_splits = labelled["split"].unique().to_pylist()
    for split in unlabelled["split"].unique().to_pylist():
        keys = unlabelled["key"].filter(pc.equal(unlabelled["split"], split))
        kind = "images_without_label" if split in labelled_splits else f"{split or 'other'}_images_without_labels"
        findings[kind] = finding(keys[:EXAMPLES].to_pylist(), len(keys))
    return labelled


def _sort_and_deduplicate(index: pa.Table) -> tuple[pa.Table, list[str]]:
    """Return the index sorted by key, with the first row of each key, and the keys of the other rows."""
    sort_keys = [("key", "ascending"), ("object", "ascending"), ("start", "ascending")]
    sortable = index.set_column(3, "object", index["object"].cast(pa.string()))  # Arrow cannot sort dictionaries
    index = index.take(pc.sort_indices(sortable, sort_keys)).combine_chunks()
    is_repeated = np.zeros(len(index), bool)
    keys = index["key"].chunk(0) if len(index) else pa.array([], pa.large_string())
    is_repeated[1:] = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    return index.filter(pa.array(~is_repeated)).combine_chunks(), keys.filter(pa.array(is_repeated)).to_pylist()


# ------------------------------------------------------------------------------------------------------------- splits

_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
# Words that often name a split, but not one of the three.
_LIKE_SPLITS = {"eval", "evaluation", "dev", "extra", "holdout", "heldout", "trainval", "unlabeled", "unlabelled"}
# Words that may stand beside the word of a split, as in imagenet_train.
_NEUTRAL = {
    "imagenet", "ilsvrc", "cls", "loc", "img", "imgs", "image", "images", "set", "data", "dataset", "split", "x", "of",
    "part", "batch", "lmdb", "bin", "jpeg", "png",
}  # fmt: skip
OUT = "out"  # the split of images that --split omits


class Splits:
    """The rules that give the split of a name: the option --split, and the words in the name."""

    def __init__(self, option: str | None = None) -> None:
        self.ignored = option == "none"  # names do not contain splits
        self._option = option
        self._given: dict[str, str] = {}  # split of a name in lower case, by the option
        self._used: set[str] = set()  # names of the option that have given a split
        if not option or self.ignored:
            return
        for part in option.split(","):
            name, _, split = part.partition("=")
            if not name or _SPLIT_WORDS.get(split, split) not in {*_SPLIT_WORDS.values(), OUT}:
                raise ValueError(
                    f"--split {option}: {part!r} is not NAME=SPLIT with train, validation, test or out; accepted: "
                    "pairs such as extra=train,holdout=out, or none"
                )
            self._given[name.lower()] = _SPLIT_WORDS.get(split, split)

    def of_folder(self, name: str) -> str:
        """Return the split that the name of a folder means, or an empty string if it means none."""
        if self.ignored:
            return ""
        if name.lower() in self._given:
            self._used.add(name.lower())
            return self._given[name.lower()]
        words = set(_words(name)) - _NEUTRAL
        return _SPLIT_WORDS.get(words.pop(), "") if len(words) == 1 else ""

    def of_shard(self, path: str) -> str:
        """Return the split in the path of a shard such as data/train-00000-of-00014.parquet, or an empty string."""
        if self.ignored:
            return ""
        path = path.lower()
        given = [name for name in self._given if re.search(rf"(^|[/_.\-]){re.escape(name)}($|[/_.\-\d])", path)]
        if given:
            name = max(given, key=len)  # test_hard rather than test
            self._used.add(name)
            return self._given[name]
        splits = {_SPLIT_WORDS[word] for word in re.findall(r"[^\W\d_]+", path) if word in _SPLIT_WORDS}
        return splits.pop() if len(splits) == 1 else ""

    def of_shards(self, paths: Sequence[str], suspicions: Findings) -> dict[str, str]:
        """Return the split of every shard; it is suspicious if only some of the paths contain one.

        Raises what `check_used` raises.
        """
        splits = {path: self.of_shard(path) for path in paths}
        self.check_used()
        without_split = [path for path, split in splits.items() if not split]
        if len(without_split) < len(splits) and without_split:
            suspicions["names_like_splits"] = finding(without_split)
        return splits

    def check_used(self) -> None:
        """Raise ValueError if a name of the option has given no split."""
        if unused := self._given.keys() - self._used:
            raise ValueError(
                f"--split {self._option}: {', '.join(sorted(unused))} names no images; accepted: names of folders, or "
                "words in the names of archives and data files"
            )

    def looks_like(self, name: str) -> bool:
        """Return whether a folder's name looks like a split, even if `of_folder` finds none."""
        words = {word for word in _words(name) if len(word) > 1} - _NEUTRAL
        return not self.ignored and bool(words) and words <= {*_SPLIT_WORDS, *_LIKE_SPLITS}


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, without numbers."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def known_split(name: str) -> str:
    """Return the split of exactly this name (train, val, test, ...), or an empty string."""
    return _SPLIT_WORDS.get(name.lower(), "")
