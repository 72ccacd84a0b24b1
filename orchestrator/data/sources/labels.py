"""Label maps: files that give the classes of images. The format of a file follows from its content."""

import csv
import io
import json
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.sources.index import known_split

FORMS = (
    "rows of an image's name and its label, separated by commas, semicolons, tabs or spaces, with or without a header; "
    'JSON {"NAME": LABEL, ...}, {"labels": [["NAME", LABEL], ...]} or records; or one class number a line for images '
    "sorted by name"
)
# Names of columns or fields, in lower case; the first one that a file has is used.
_KEY_COLUMNS = ("key", "file", "filename", "file_name", "image", "image_id", "imageid", "path", "name", "id", "img")
_LABEL_COLUMNS = ("label", "labels", "class", "class_id", "class_name", "category", "target", "wnid", "cls", "y")
_PREDICTION = "predictionstring"  # Kaggle's ImageNet: a class and a box for each object; the first class is used
_GROUND_TRUTH_CLASSES = tuple(str(number) for number in range(1, 1001))  # numbers of ILSVRC2012

Label = str | int


@dataclass(eq=False)
class LabelMap:
    """The labels of images: by the names of the images, or by their position in the order of the names."""

    uri: str
    base: str = ""  # the folder that keys may be relative to, with a slash at the end
    labels: dict[str, tuple[Label, str]] = field(default_factory=dict)  # path or name of an image -> label, split or ""
    in_order: dict[int, int] = field(default_factory=dict)  # position of an image, from 0 on -> label
    classes: tuple[str, ...] | None = None  # in the order of the labels; None: sorted names, or numbers
    no_labels: bool = False  # the file says that the images have no labels
    used: dict[str, str] = field(default_factory=dict)  # key that `find` has returned a label for -> path of its image

    def find(self, path: str) -> tuple[Label | None, str]:
        """Return the label (or None) and the split (or "") of an image.

        Raises:
            ValueError: a key matches several images.
        """
        relative = path.removeprefix(self.base)
        name = path.rpartition("/")[2]
        for key in (path, relative, _stem(relative), name, _stem(name)):
            if key in self.labels:
                if self.used.setdefault(key, path) != path:
                    raise ValueError(
                        f"label map {self.uri} has the name {key}, but {self.used[key]} and {path} have this name: "
                        "write the paths of the images"
                    )
                return self.labels[key]
        return None, ""


def _stem(path: str) -> str:
    """Return a path without the extension of its file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.rpartition(".")[0] if "." in name else path


def parse_label_map(uri: str, data: bytes, base: str = "") -> LabelMap:
    """Parse the content of a label map. Its labels are all integers, or all class names.

    base: the folder that its keys may be relative to, with a slash at the end.

    Raises:
        ValueError: it has no known form, an image has two labels, or a label is neither an integer nor a name.
    """
    text = _decode_text(uri, data)
    if text.lstrip()[:1] in ("{", "["):
        rows = list(_json_rows(uri, text))
        if rows == [("labels", None, "")]:
            return LabelMap(uri, base, no_labels=True)
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and all(re.fullmatch(r"\s*\d+\s*", line) for line in lines):
            return _map_in_order(uri, base, [int(line) for line in lines])
        rows = list(_table_rows(uri, lines))
    entries: dict[str, tuple[Any, str]] = {}
    for key, label, split_name in rows:
        split = known_split(split_name)
        if split_name and not split:
            raise ValueError(f"label map {uri}: split {split_name!r} of {key}; accepted: train, validation, test")
        if entries.setdefault(key, (label, split)) != (label, split):
            raise ValueError(f"label map {uri} has two labels for {key}: {entries[key][0]} and {label}; keep one")
    if not entries:
        raise ValueError(f"label map {uri} names no images; accepted: {FORMS}")
    return LabelMap(uri, base, _convert_labels(uri, entries))


def _decode_text(uri: str, data: bytes) -> str:
    """Return the text of a file in UTF-16 with a byte order mark, in UTF-8, or else in Windows-1252 or Latin-1."""
    has_utf16_mark = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16",) if has_utf16_mark else ("utf-8-sig", "cp1252", "latin-1"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"label map {uri} is not text; accepted: {FORMS}")


def _map_in_order(uri: str, base: str, numbers: list[int]) -> LabelMap:
    """Return the map of a file with one number a line. ILSVRC2012's ground truth numbers its classes from 1.

    Raises:
        ValueError: a number is not one of ILSVRC2012, but the file has the name of its ground truth.
    """
    if "ground_truth" not in uri.lower():
        return LabelMap(uri, base, in_order=dict(enumerate(numbers)))
    if min(numbers) < 1 or max(numbers) > len(_GROUND_TRUTH_CLASSES):
        raise ValueError(f"label map {uri}: numbers are {min(numbers)} to {max(numbers)}; accepted: 1 to 1000")
    return LabelMap(uri, base, in_order=dict(enumerate(n - 1 for n in numbers)), classes=_GROUND_TRUTH_CLASSES)


def _convert_labels(uri: str, entries: dict[str, tuple[Any, str]]) -> dict[str, tuple[Label, str]]:
    """Return the entries with integers as labels if all labels are integers, and otherwise with names.

    Raises:
        ValueError: a label is neither an integer nor a name, or there are both.
    """
    labels = [label for label, _ in entries.values()]
    for key, (label, _) in entries.items():
        if isinstance(label, bool | list | dict | None) or label == "":
            raise ValueError(f"label map {uri}: {key} has the label {json.dumps(label)}; accepted: integers or names")
    is_number = [isinstance(label, int | float) or re.fullmatch(r"-?\d+(\.\d*)?", label.strip()) for label in labels]
    if not all(is_number):
        if any(isinstance(label, int | float) for label in labels):
            raise ValueError(f"label map {uri} has numbers and names as labels; accepted: all integers, or all names")
        return {key: (label.strip(), split) for key, (label, split) in entries.items()}
    converted: dict[str, tuple[Label, str]] = {}
    for key, (label, split) in entries.items():
        number = float(label)
        if not number.is_integer():
            raise ValueError(f"label map {uri}: {key} has the label {label}; accepted: integers or names")
        converted[key] = int(number), split
    return converted


# -------------------------------------------------------------------------------------------------------------- forms


def _json_rows(uri: str, text: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, label, split or "") of each image in a JSON file.

    EDM writes {"labels": null} for images without labels, which is yielded as the only row ("labels", None, "").

    Raises:
        ValueError: it is not valid JSON, or has none of the accepted forms.
    """
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
            key, label = _first_of(_KEY_COLUMNS, names), _first_of(_LABEL_COLUMNS, names)
            if key is None or label is None:
                raise ValueError(f"label map {uri}: records have the fields {', '.join(row)}; accepted: {FORMS}")
            yield str(row[names[key]]), row[names[label]], str(row.get(names.get("split"), "") or "")
        else:
            raise ValueError(f"label map {uri} is not a label map; accepted: {FORMS}")


def _table_rows(uri: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (key, label, split or "") of each image in a table.

    Raises:
        ValueError: it has no known columns, or an image has no label.
    """
    rows = _split_lines(uri, lines)
    if not rows:
        raise ValueError(f"label map {uri} names no images; accepted: {FORMS}")
    header = [name.strip().lower() for name in rows[0]]
    key_name, label_name = _first_of(_KEY_COLUMNS, header), _first_of((*_LABEL_COLUMNS, _PREDICTION), header)
    key_column, label_column, split_column = 0, 1, None
    if key_name is not None and label_name is not None:
        key_column, label_column = header.index(key_name), header.index(label_name)
        split_column = header.index("split") if "split" in header else None
        rows = rows[1:]
    elif len(rows[0]) < 2 or not re.search(r"[./\\\d]", rows[0][0]):  # not an image's name: a header of other names
        raise ValueError(f"label map {uri} has the columns {', '.join(rows[0])}; accepted: {FORMS}")
    for row in rows:
        if len(row) <= max(key_column, label_column) or not row[label_column].strip():
            key = row[key_column] if key_column < len(row) else "an image"
            raise ValueError(f"label map {uri} has no label for {key}; add it")
        label = row[label_column].strip()
        if label_name == _PREDICTION:
            label = label.split()[0]
        split = row[split_column].strip() if split_column is not None and split_column < len(row) else ""
        yield row[key_column].strip(), label, split


def _split_lines(uri: str, lines: list[str]) -> list[list[str]]:
    """Split lines into columns at the separator that occurs in the first line.

    Raises:
        ValueError: a quotation mark is not closed, so that one column contains the rest of the file.
    """
    for separator in "\t;,":
        if lines and separator in lines[0]:
            try:
                return list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, strict=True))
            except csv.Error as error:
                raise ValueError(f"label map {uri} has invalid quotation marks: {error}; correct them") from error
    return [line.split() for line in lines]


def _first_of(candidates: tuple[str, ...], names: Container[str]) -> str | None:
    """Return the first of the candidates that is in `names`, or None."""
    return next((name for name in candidates if name in names), None)
