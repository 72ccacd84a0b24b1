"""Label maps: which image is of which class, in a file of one's own."""

import csv
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator import storage
from orchestrator.data.sources.index import Findings, finding, numbered, split_folder

FORMS = (
    'a CSV with the columns key, label and, if it gives splits, split; JSON {"KEY": LABEL, ...}; or JSON '
    '{"labels": [["KEY", LABEL], ...]}'
)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Keys (paths or file names), their labels int64 [n] and, where it gives them, their splits."""

    classes: tuple[str, ...]
    keys: pa.StringArray
    labels: np.ndarray
    splits: pa.StringArray

    def apply(self, index: pa.Table) -> tuple[pa.Table, Findings]:
        """The index of the images that the map names, labelled; what has no counterpart is left out and reported."""
        keys = index["key"].combine_chunks()
        by_path = pc.index_in(keys, self.keys)
        by_name = pc.index_in(pc.replace_substring_regex(keys, r"^.*/", ""), self.keys)
        shared = pc.value_counts(by_name.filter(by_path.is_null()).drop_null())
        if len(shared) and (most := max(shared.to_pylist(), key=lambda case: case["counts"]))["counts"] > 1:
            raise ValueError(
                f"the label map names {self.keys[most['values']]}, but {most['counts']} images have this file name: "
                "name them by their paths"
            )
        rows = pc.coalesce(by_path, by_name)
        named = rows.is_valid()
        findings: Findings = {}
        if pc.any(pc.invert(named)).as_py():
            findings["images_without_label"] = finding(keys.filter(pc.invert(named)).to_pylist())
        used = np.zeros(len(self.keys), bool)
        used[rows.drop_null().to_numpy()] = True
        if not used.all():
            findings["labels_without_image"] = finding(self.keys.filter(pa.array(~used)).to_pylist())
        index, chosen = index.filter(named), rows.drop_null()
        for name, column in (("label", pa.array(self.labels)), ("split", self.splits)):
            index = index.set_column(index.schema.get_field_index(name), index.schema.field(name), column.take(chosen))
        return index, findings


def read_label_map(uri: str) -> LabelMap:
    """The label map in a CSV or JSON file. Labels are integers, or class names that are numbered in sorted order.

    Raises:
        ValueError: it has none of the known forms, or gives a key two labels.
    """
    rows = _csv_rows(uri) if uri.lower().endswith(".csv") else _json_rows(uri)
    found: dict[str, tuple[Any, str]] = {}
    for key, label, split in rows:
        if found.setdefault(key, (label, split)) != (label, split):
            raise ValueError(f"labels={uri} gives {key} two labels: {found[key][0]} and {label}")
    if not found:
        raise ValueError(f"labels={uri} names no images; wanted {FORMS}")
    values = [label for label, _ in found.values()]
    if all(isinstance(value, int) for value in values):
        labels = np.array(values, np.int64)
        classes = tuple(map(str, range(int(labels.max()) + 1)))
    else:
        classes, labels = numbered(pa.array(list(map(str, values)), pa.string()))
    splits = pa.array([split for _, split in found.values()], pa.string())
    return LabelMap(classes, pa.array(list(found), pa.string()), labels, splits)


def _csv_rows(uri: str) -> list[tuple[str, int | str, str]]:
    table = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"), newline=""))
    if not {"key", "label"} <= set(table.fieldnames or ()):
        raise ValueError(f"labels={uri} has the columns {table.fieldnames}; wanted {FORMS}")
    rows = [(row["key"], (row["label"] or "").strip(), _split(uri, row.get("split") or "")) for row in table]
    if missing := [key for key, label, _ in rows if not label]:
        raise ValueError(f"labels={uri} gives no label to {missing[0]} and {len(missing) - 1} others")
    if all(re.fullmatch(r"-?\d+", label) for _, label, _ in rows):
        return [(key, int(label), split) for key, label, split in rows]
    return list(rows)


def _json_rows(uri: str) -> list[tuple[str, int | str, str]]:
    found = storage.read_json(uri)
    pairs = found.get("labels", list(found.items())) if isinstance(found, dict) else None
    try:
        rows = [(key, label, "") for key, label in pairs or ()]
    except (TypeError, ValueError):
        rows = []
    whole = all(isinstance(key, str) and type(label) in (int, str) for key, label, _ in rows)
    if not rows or not whole or len({type(label) for _, label, _ in rows}) > 1:
        raise ValueError(f"labels={uri} is no label map: wanted {FORMS}, labels all integers or all class names")
    return rows


def _split(uri: str, name: str) -> str:
    if name and not split_folder(name):
        raise ValueError(f"labels={uri} names the split {name!r}; wanted train, validation or test")
    return split_folder(name)
