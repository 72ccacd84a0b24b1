"""What a source holds: its objects, a table of its images, and what is odd about them."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from orchestrator import storage
from orchestrator.data.images import IMAGE_ENDINGS

EXAMPLES = 5  # of a finding that are named
IMAGE_NAME = rf"(?i)(^|/)[^./][^/]*({'|'.join(map(re.escape, IMAGE_ENDINGS))})$"  # a leading dot hides a file
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}

INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),  # -1: none
        pa.field("split", pa.string(), nullable=False),  # as the source gives it; empty: it gives none
        pa.field("object", pa.string(), nullable=False),  # relative to the source; where the image's bytes lie:
        pa.field("start", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
    ]
)


class Finding(BaseModel, frozen=True, extra="forbid"):
    """Something odd about a source: how often, and the first few cases."""

    count: int
    examples: tuple[str, ...]


Findings = dict[str, Finding]


def finding(cases: Sequence[str]) -> Finding:
    """All cases of one kind."""
    return Finding(count=len(cases), examples=tuple(cases[:EXAMPLES]))


@dataclass(frozen=True, eq=False)
class Listing:
    """The objects beneath a source: names relative to `uri` in sorted order, and bytes int64 [n]."""

    uri: str
    names: pa.StringArray
    sizes: np.ndarray

    def digest(self) -> str:
        """Names and sizes as one hash: another one, another source."""
        joined = hashlib.sha256(self.sizes.tobytes())
        for batch in range(0, len(self.names), 1 << 16):
            joined.update("\0".join(self.names[batch : batch + (1 << 16)].to_pylist()).encode())
        return joined.hexdigest()

    def matching(self, pattern: str) -> "Listing":
        """The objects whose names match."""
        mask = pc.match_substring_regex(self.names, pattern)
        return Listing(self.uri, self.names.filter(mask), self.sizes[mask.to_numpy(zero_copy_only=False)])


def list_source(uri: str) -> Listing:
    """What lies beneath `uri`, or, where it is an object itself, that object beneath its folder.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if (size := storage.size_of(uri)) is not None:
        folder, name = uri.rsplit("/", 1)
        return Listing(folder, pa.array([name]), np.array([size], np.int64))
    names, sizes = [pa.array([], pa.string())], [np.array([], np.int64)]
    for files in storage.list_tree(uri):
        names.append(pa.array([name for name, _ in files], pa.string()))
        sizes.append(np.array([size for _, size in files], np.int64))
    found = pa.concat_arrays(names)
    order = pc.sort_indices(found)
    return Listing(uri.rstrip("/"), found.take(order), np.concatenate(sizes)[order.to_numpy()])


@dataclass(frozen=True, eq=False)
class Source:
    """Encoded images to prepare: where each lies is at hand, their bytes are read on demand."""

    layout: str
    uri: str
    classes: tuple[str, ...]  # in the order of the labels; none: the labels are -1
    index: pa.Table  # of INDEX, by ascending key, each once
    findings: Findings = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels, count = self.index["label"].to_numpy(), len(self.classes)
        if not len(labels):
            raise ValueError(f"source={self.uri} holds no images")
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= count) if count else labels != -1)):
            key = self.index["key"][int(wrong[0])].as_py()
            raise ValueError(
                f"source={self.uri}: label {labels[wrong[0]]} of {key} is not in [0, {count}), "
                f"and {len(wrong) - 1} others are not either"
            )


def make_source(
    layout: str, uri: str, classes: tuple[str, ...], index: pa.Table, findings: Findings | None = None
) -> Source:
    """A source of an index in any order; of images with one key only the first is kept, and the others reported."""
    by_place = index.take(pc.sort_indices(index, [(name, "ascending") for name in ("key", "object", "start")]))
    keys = by_place["key"].combine_chunks() if len(by_place) else pa.array([], pa.string())
    again = np.zeros(len(keys), bool)
    again[1:] = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False) if len(keys) > 1 else False
    found = dict(findings or {})
    if again.any():
        found["duplicate_keys"] = finding(keys.filter(pa.array(again)).to_pylist())
        by_place = by_place.filter(pa.array(~again))
    present = set(pc.unique(by_place["label"]).to_pylist())
    if empty := [name for label, name in enumerate(classes) if label not in present]:
        found["classes_without_images"] = finding(empty)
    return Source(layout, uri, classes, by_place.combine_chunks(), found)


def index_table(
    keys: pa.StringArray,
    labels: np.ndarray,
    objects: pa.StringArray,
    starts: np.ndarray,
    sizes: np.ndarray,
    splits: pa.StringArray | None = None,
) -> pa.Table:
    """An index of these columns."""
    given = pa.array(np.full(len(keys), "", object), pa.string()) if splits is None else splits
    columns = [
        keys,
        pa.array(labels, pa.int64()),
        given,
        objects,
        pa.array(starts, pa.int64()),
        pa.array(sizes, pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=INDEX)


def numbered(names: pa.StringArray) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes in the order of their sorted names, and the label int64 [n] of each name."""
    encoded = names.dictionary_encode()
    found = encoded.dictionary.to_pylist()
    classes = tuple(sorted(found))
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[name] for name in found], np.int64)
    return classes, labels[encoded.indices.to_numpy()] if len(names) else np.array([], np.int64)


def component(names: pa.StringArray, number: int) -> pa.StringArray:
    """The `number`-th of the parts of each name that "/" separates; empty where it has not so many."""
    parts = pc.split_pattern(names, "/", max_splits=number + 1)
    lengths = pc.list_value_length(parts).to_numpy(zero_copy_only=False)
    offsets = parts.offsets.to_numpy()[:-1]
    there = lengths > number
    chosen = pc.take(parts.values, pa.array(np.where(there, offsets + np.where(there, number, 0), 0)))
    return pc.if_else(pa.array(there), chosen, "")


def split_of(name: str) -> str:
    """The split that a name speaks of (train, validation or test), as in data/train-00000-of-00014.parquet; or ""."""
    found = {_SPLIT_WORDS[word] for word in re.split(r"[/_.\-]", name.lower()) if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else ""


def split_folder(name: str) -> str:
    """The split that a folder of exactly this name holds; or ""."""
    return _SPLIT_WORDS.get(name.lower(), "")


def split_of_each(names: Iterable[str], split: Callable[[str], str] = split_of) -> dict[str, str]:
    """The split of every name; all empty where some name speaks of none."""
    found = {name: split(name) for name in names}
    return found if all(found.values()) else dict.fromkeys(found, "")
