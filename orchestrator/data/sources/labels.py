"""Label maps: files that give the classes of images. The meaning of their columns follows from their content."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.sources.index import known_split

FORMS = (
    "rows of an image's name and its label, separated by commas, semicolons, tabs or spaces, with or without a header; "
    'JSON {"NAME": LABEL, ...}, {"labels": [["NAME", LABEL], ...]} or records; or one class number a line for images '
    "sorted by name"
)
_KEYS = ("key", "file", "filename", "file_name", "image", "image_id", "imageid", "path", "name", "id", "img")
_LABELS = ("label", "labels", "class", "class_id", "class_name", "category", "target", "wnid", "cls", "y")
_PREDICTION = "predictionstring"  # Kaggle's ImageNet: a class and a box for each object; the first class is used
_GROUND_TRUTH_CLASSES = tuple(str(number) for number in range(1, 1001))  # numbers of ILSVRC2012

Label = str | int


@dataclass(eq=False)
class LabelMap:
    """The labels of images, by name or for the images sorted by name. `find` records the keys that were used."""

    uri: str
    base: str = ""  # the folder that keys may be relative to, with a slash at the end
    labels: dict[str, tuple[Label, str]] = field(default_factory=dict)  # by path or file name: label, split
    in_order: dict[int, int] = field(default_factory=dict)  # labels of the images sorted by name, from 0 on
    classes: tuple[str, ...] | None = None  # None: sorted names, or numbers
    null: bool = False  # the file says that images have no labels
    used: set[str] = field(default_factory=set)
    _by_name: dict[str, str] = field(default_factory=dict)  # key that is only a file name -> its image

    @property
    def names(self) -> set[Label]:
        """Return all labels in the map."""
        return {label for label, _ in self.labels.values()} | set(self.in_order.values())

    def find(self, path: str) -> tuple[Label | None, str]:
        """Return the label (or None) and the split (or "") of an image.

        Raises:
            ValueError: a key matches several images.
        """
        within = path.removeprefix(self.base)
        name = path.rpartition("/")[2]
        for key in (path, within, _stem(within), name, _stem(name)):
            if key in self.labels:
                if "/" not in key and "/" in within and self._by_name.setdefault(key, path) != path:
                    raise ValueError(
                        f"label map {self.uri} has the file name {key}, but {self._by_name[key]} and {path} have this "
                        "name: write the paths of the images"
                    )
                self.used.add(key)
                return self.labels[key]
        return None, ""

    def unused(self) -> list[str]:
        """Return the keys that match no image."""
        return [key for key in self.labels if key not in self.used]


def _stem(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.rpartition(".")[0] if "." in last else name


def parse_label_map(uri: str, data: bytes, base: str = "") -> LabelMap:
    """Return the label map in the bytes of a file. Its labels are all integers, or all class names.

    base: the folder that its keys may be relative to, with a slash at the end.

    Raises:
        ValueError: it has no known form, an image has two labels, or a label is neither an integer nor a name.
    """
    text = _text(uri, data)
    if text.lstrip()[:1] in ("{", "["):
        rows = list(_json_rows(uri, text))
        if rows == [("labels", None, "")]:
            return LabelMap(uri, base, null=True)
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and all(re.fullmatch(r"\s*\d+\s*", line) for line in lines):
            return _in_order(uri, base, [int(line) for line in lines])
        rows = list(_table_rows(uri, lines))
    entries: dict[str, tuple[Any, str]] = {}
    for key, label, split in rows:
        if split and not known_split(split):
            raise ValueError(f"label map {uri}: split {split!r} of {key}; accepted: train, validation, test")
        if entries.setdefault(key, (label, known_split(split))) != (label, known_split(split)):
            raise ValueError(f"label map {uri} has two labels for {key}: {entries[key][0]} and {label}; keep one")
    if not entries:
        raise ValueError(f"label map {uri} names no images; accepted: {FORMS}")
    return LabelMap(uri, base, _typed(uri, entries))


def _text(uri: str, data: bytes) -> str:
    """Return the text of a file in UTF-8, in UTF-16 with a byte order mark, or else in Latin-1."""
    for encoding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252", "latin-1"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"label map {uri} is not text; accepted: {FORMS}")


def _in_order(uri: str, base: str, numbers: list[int]) -> LabelMap:
    """Return the map of a file with one number a line. ILSVRC2012's ground truth numbers its classes from 1."""
    if "ground_truth" not in uri.lower():
        return LabelMap(uri, base, in_order=dict(enumerate(numbers)))
    if min(numbers) < 1 or max(numbers) > len(_GROUND_TRUTH_CLASSES):
        raise ValueError(f"label map {uri}: numbers are {min(numbers)} to {max(numbers)}; accepted: 1 to 1000")
    return LabelMap(uri, base, in_order=dict(enumerate(n - 1 for n in numbers)), classes=_GROUND_TRUTH_CLASSES)


def _typed(uri: str, entries: dict[str, tuple[Any, str]]) -> dict[str, tuple[Label, str]]:
    """Return the labels as integers if all of them are integers, else as names."""
    values = [label for label, _ in entries.values()]
    for key, (label, _) in entries.items():
        if isinstance(label, bool | list | dict | None) or label == "":
            raise ValueError(f"label map {uri}: {key} has the label {json.dumps(label)}; accepted: integers or names")
    numeric = [isinstance(value, int | float) or re.fullmatch(r"-?\d+(\.\d*)?", value.strip()) for value in values]
    if not all(numeric):
        if any(isinstance(value, int | float) for value in values):
            raise ValueError(f"label map {uri} has numbers and names as labels; accepted: all integers, or all names")
        return {key: (label.strip(), split) for key, (label, split) in entries.items()}
    whole: dict[str, tuple[Label, str]] = {}
    for key, (label, split) in entries.items():
        if float(label) != int(float(label)):
            raise ValueError(f"label map {uri}: {key} has the label {label}; accepted: integers or names")
        whole[key] = int(float(label)), split
    return whole


# -------------------------------------------------------------------------------------------------------------- forms


def _json_rows(uri: str, text: str) -> Iterator[tuple[str, Any, str]]:
    try:
        content = json.loads(text)
    except ValueError:
        try:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]  # JSON lines
        except ValueError as error:
            raise ValueError(f"label map {uri} is not valid JSON: {error}") from error
    if isinstance(content, dict) and "labels" in content and not isinstance(content["labels"], str | int):
        content = content["labels"]
        if content is None:
            yield "labels", None, ""
            return
    if isinstance(content, dict):
        yield from ((key, label, "") for key, label in content.items())
        return
    for row in content if isinstance(content, list) else [content]:
        if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str):
            yield row[0], row[1], ""
        elif isinstance(row, dict):
            names = {str(name).lower(): name for name in row}
            key, label = _named(names, _KEYS), _named(names, _LABELS)
            if key is None or label is None:
                raise ValueError(f"label map {uri}: records have the fields {', '.join(row)}; accepted: {FORMS}")
            yield str(row[names[key]]), row[names[label]], str(row.get(names.get("split"), "") or "")
        else:
            raise ValueError(f"label map {uri} is no label map; accepted: {FORMS}")


def _table_rows(uri: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    rows = _split_lines(lines)
    if not rows:
        raise ValueError(f"label map {uri} names no images; accepted: {FORMS}")
    header = [name.strip().lower() for name in rows[0]]
    key, label = _named(header, _KEYS), _named(header, (*_LABELS, _PREDICTION))
    if key is not None and label is not None:
        columns = header.index(key), header.index(label)
        split = header.index("split") if "split" in header else None
        rows = rows[1:]
    elif len(rows[0]) < 2 or not re.search(r"[./\\\d]", rows[0][0]):  # a header of other names
        raise ValueError(f"label map {uri} has the columns {', '.join(rows[0])}; accepted: {FORMS}")
    else:
        columns, split = (0, 1), None
    for row in rows:
        if len(row) <= max(columns) or not row[columns[1]].strip():
            raise ValueError(f"label map {uri} has no label for {row[columns[0]] if row else 'an image'}; add it")
        parts = row[columns[1]].split()
        value = parts[0] if label == _PREDICTION else row[columns[1]].strip()
        yield row[columns[0]].strip(), value, row[split].strip() if split is not None and split < len(row) else ""


def _split_lines(lines: list[str]) -> list[list[str]]:
    """Split lines into columns at the separator that occurs in the first line."""
    for separator in "\t;,":
        if lines and separator in lines[0]:
            return list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator))
    return [line.split() for line in lines]


def _named(names: Any, known: tuple[str, ...]) -> str | None:
    """Return the first of the known names that was found."""
    return next((name for name in known if name in names), None)
