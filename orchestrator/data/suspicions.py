"""Checks for a suspicious interpretation of a source. To add a check, add a row to the table SUSPICIONS.

Every check is a function that returns the cases that make an interpretation suspicious, such as names of classes.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from orchestrator.data.sources.index import Finding, Source, Splits, finding

_NOT_CLASS_NAMES = {
    "image", "images", "img", "imgs", "jpegimages", "pictures", "photos", "data", "dataset", "train", "training", "val",
    "valid", "validation", "test", "testing", "eval", "evaluation", "dev", "all", "raw", "samples", "unlabeled",
    "unlabelled", "thumbnails", "masks", "annotations",
}  # fmt: skip
_MOST = 0.5  # a larger fraction of the images or classes counts as most of them
_MIN_IMAGES_PER_CLASS = 4  # on average: a split with fewer may lack classes by chance


class Suspicion(NamedTuple):
    """One kind of suspicious interpretation."""

    name: str
    test: Callable[[Source], list[str] | Finding] | None  # None: the layout has recorded the cases under this name
    message: str  # {cases} stands for the first cases
    options: str  # what the user may pass to confirm or correct the interpretation
    needs_index: bool = True  # the test needs the index of the images, not only the names of classes


def _one_class(source: Source) -> list[str]:
    return list(source.classes) if len(source.classes) == 1 else []


def _no_class_names(source: Source) -> list[str]:
    """Return class names that usually name a split or a collection of images."""
    if source.reading.classes is not None:  # the source lists its classes, and CIFAR-100 has a class "train"
        return []
    splits = Splits()
    return [name for name in source.classes if name.strip().lower() in _NOT_CLASS_NAMES or splits.looks_like(name)]


def _numbered_folders(source: Source) -> list[str]:
    """Return classes that look like numbered folders of equal size: 00000, 00001, ... or 00000, 01000, ..."""
    names = sorted(source.classes)
    if len(names) < 2 or not all(re.fullmatch(r"\d{2,}", name) and len(name) == len(names[0]) for name in names):
        return []
    counts = source.total()
    steps = set(np.diff([int(name) for name in names]).tolist())
    in_thousands = len(steps) == 1 and steps.pop() > 1
    return names if in_thousands or (counts == counts.max()).mean() > _MOST else []


def _classes_apart(source: Source) -> list[str]:
    """Return classes that occur in other splits but not in the training split."""
    counts = source.counts()
    if "train" not in counts or not source.classes:
        return []
    return [source.classes[i] for i in np.flatnonzero((counts["train"] == 0) & (source.total() > 0))]


def _hollow_splits(source: Source) -> list[str]:
    """Return the splits that lack most classes although they have enough images to contain them."""
    if not source.classes:
        return []
    return [
        f"{split} has {(counts > 0).sum()} of {len(counts)} classes"
        for split, counts in source.counts().items()
        if counts.sum() >= _MIN_IMAGES_PER_CLASS * len(counts) and (counts > 0).mean() < _MOST
    ]


def _names_alike(source: Source) -> list[str]:
    """Return classes whose name equals that of an earlier class except for case, spaces, underscores and hyphens."""
    alike = []
    seen: set[str] = set()
    for name in source.classes:
        normalized = re.sub(r"[\s_-]+", "", name).lower()
        if normalized in seen:
            alike.append(name)
        seen.add(normalized)
    return alike


def _single_images(source: Source) -> list[str]:
    """Return the classes with only one image, if most classes are such."""
    counts = source.total()
    if len(source.classes) < 10 or (counts == 1).mean() <= _MOST:
        return []
    return [source.classes[i] for i in np.flatnonzero(counts == 1)]


def _gaps(source: Source) -> list[str]:
    """Return the class numbers without images, if most numbers have none."""
    if source.reading.classes is not None or not all(re.fullmatch(r"\d+", name) for name in source.classes):
        return []
    total = source.total()
    return [source.classes[i] for i in np.flatnonzero(total == 0)] if (total > 0).mean() < _MOST else []


def _underscores(source: Source) -> list[str]:
    """Return classes that are parts of longer names: american of american_bulldog_1.jpg, american_pit_bull_2.jpg."""
    if not source.reading.flat or len(source.classes) >= len(source.index) / 2:
        return []
    continuations: dict[str, set[str]] = {}  # of the class in file names, such as bulldog and pit_bull; "" if none
    for key in source.index["key"].to_pylist():
        match = re.fullmatch(r"([^_]+)_(?:(.*)_)?\d+\.\w+", key.rpartition("/")[2])
        if match is None:  # the name does not end in a number
            return []
        continuations.setdefault(match[1], set()).add(match[2] or "")
    return [f"{name} of {name}_{min(filter(None, rest))}" for name, rest in continuations.items() if len(rest) > 1]


def _few_labelled(source: Source) -> list[str] | Finding:
    """Return the finding about images without a label, if they are all training images, or more than the others."""
    for kind in ("train_images_without_labels", "other_images_without_labels", "images_without_label"):
        missing = source.findings.get(kind)
        if missing and (missing.count > len(source.index) or kind.startswith("train")):
            return missing
    return []


CLASSES = "--accept-classes, or --labels FILE, --layout unlabelled"
SUSPICIONS = (
    Suspicion("names_like_splits", None,
              "some names look like splits and others beside or beneath them do not: {cases}",
              "--split NAME=SPLIT with train, validation, test or out for each name, or --accept-classes", False),
    Suspicion("unused_label_files", None, "{cases} may contain labels and is not used",
              "--labels FILE to use it, or --accept-classes"),
    Suspicion("folders_within_classes", None,
              "class folders contain further folders; the outermost one is used as the class: {cases}", CLASSES),
    Suspicion("one_class", _one_class, "all images have one class: {cases}", CLASSES, False),
    Suspicion("no_class_names", _no_class_names, "these do not look like names of classes: {cases}", CLASSES, False),
    Suspicion("numbered_folders", _numbered_folders, "the classes look like numbered folders of files: {cases}",
              CLASSES),
    Suspicion("classes_apart", _classes_apart, "other splits have classes that the training split lacks: {cases}",
              "--accept-classes"),
    Suspicion("hollow_splits", _hollow_splits, "a split lacks most classes: {cases}", "--accept-classes"),
    Suspicion("names_alike", _names_alike, "names of classes differ only in case or spaces: {cases}",
              "--accept-classes", False),
    Suspicion("single_images", _single_images, "most classes have only one image: {cases}", CLASSES),
    Suspicion("gaps", _gaps, "most class numbers have no images: {cases}", "--accept-classes, or --labels with names"),
    Suspicion("underscores", _underscores, "the part of a name before the first _ is used as the class: {cases}",
              "--accept-classes, or --labels FILE"),
    Suspicion("few_labelled", _few_labelled, "all training images or most images have no label: {cases}",
              "--accept-classes to leave them out, or --labels FILE"),
)  # fmt: skip


def suspicions(source: Source) -> dict[str, str]:
    """Return the message of every suspicion about a source by its name, with the options that the user may pass."""
    messages = {}
    for suspicion in SUSPICIONS:
        if not len(source.index) and suspicion.needs_index:
            continue
        if suspicion.test is None:
            cases = source.reading.suspicions.get(suspicion.name, finding([]))
        else:
            result = suspicion.test(source)
            cases = result if isinstance(result, Finding) else finding(result)
        if cases.count:
            num_more = cases.count - len(cases.examples)
            examples = ", ".join(cases.examples) + (f" and {num_more:,} more" if num_more else "")
            messages[suspicion.name] = f"{suspicion.message.format(cases=examples)} (pass {suspicion.options})"
    return messages
