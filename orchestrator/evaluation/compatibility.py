"""Checks that samples and reference fit together: class names, image size and colours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.evaluation.extractors import RESIZING
from orchestrator.evaluation.inputs import ImageSet

NUM_COMPARED = 64  # first images of each set whose colours are compared
MIN_COLOUR = 12  # mean difference between the channels of a pixel (0..255), above which a set counts as coloured


@dataclass(frozen=True)
class Side:
    """One of the two sets that are compared, with its first images."""

    name: str  # as the user typed it, such as "--samples digits/samples"
    images: ImageSet
    pixels: np.ndarray  # uint8 [n, H, W, 3], the first images
    labels: np.ndarray  # int64 [n], -1 = no label

    @classmethod
    def of(cls, name: str, images: ImageSet) -> "Side":
        """Read the first images of a set."""
        return cls(name, images, *images.read(0, min(NUM_COMPARED, images.count)))

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height."""
        return self.pixels.shape[2], self.pixels.shape[1]

    @property
    def colour(self) -> float:
        """Return the mean difference between the channels of a pixel; it is 0 for grey images."""
        return float((self.pixels.max(axis=3) - self.pixels.min(axis=3)).mean())

    @property
    def classes(self) -> "Classes":
        """Return the classes of the labels; their number is estimated from the first images if it is not known."""
        names = self.images.classes
        if self.labels[0] < 0:
            return Classes(self.name, names, 0)
        return Classes(self.name, names, len(names) or self.images.num_classes or int(self.labels.max()) + 1)


@dataclass(frozen=True)
class Classes:
    """The classes of samples or of a reference."""

    owner: str  # the set, as the user typed it
    names: tuple[str, ...]  # in the order of the labels, if they are known
    count: int  # 0 = there are no labels

    @property
    def are_numbers(self) -> bool:
        """Return whether the names of the classes are their numbers, as for an .npz and for released weights."""
        return self.names == tuple(map(str, range(len(self.names))))


def check_compatible(samples: Side, reference: Side, extractor: str) -> tuple[list[str], str]:
    """Return warnings, and the reason why the labels of the two sets cannot be matched ("" = they can).

    Raises:
        ValueError: class names differ, or image sizes differ and the extractor does not resize images.
    """
    reason = match_classes(samples.classes, reference.classes)
    warnings = [reason] if reason else []
    if samples.size != reference.size:
        sizes = "{} has images of {}x{} pixels, and {} of {}x{}".format(
            samples.name, *samples.size, reference.name, *reference.size
        )
        if extractor not in RESIZING:
            raise ValueError(
                f"{sizes}: --extractor {extractor} needs equal sizes; pass a reference with images of the samples' size"
            )
        warnings.append(f"{sizes}: the extractor resizes both, so distances include the difference in resolution")
    for grey, coloured in ((samples, reference), (reference, samples)):
        if grey.colour == 0 and coloured.colour > MIN_COLOUR:
            warnings.append(
                f"the first {len(grey.pixels)} images of {grey.name} are grey, and those of {coloured.name} are "
                "coloured: distances include this difference"
            )
    return warnings, reason


def match_classes(samples: Classes, reference: Classes) -> str:
    """Return the reason why labels of the two sets cannot be matched; "" if they can, or if one set has no labels.

    Raises:
        ValueError: both have class names, and the names differ.
    """
    if not samples.count or not reference.count:
        return ""  # the metrics that need labels report this
    consequence = "so accuracy and per-class metrics are not computed"
    if samples.are_numbers and reference.are_numbers:
        if samples.count <= reference.count:
            return ""
        return (
            f"{samples.owner} has labels up to {samples.count - 1}, and {reference.owner} up to "
            f"{reference.count - 1}, {consequence}"
        )
    if samples.are_numbers or reference.are_numbers:
        numbered, named = (samples, reference) if samples.are_numbers else (reference, samples)
        return (
            f"the classes of {numbered.owner} are numbers from 0 to {numbered.count - 1}, and {named.owner} has "
            f"{named.count} names ({_shorten(named.names)}): labels cannot be matched, {consequence}"
        )
    if samples.names == reference.names:
        return ""
    if set(samples.names) == set(reference.names):
        pairs = list(zip(samples.names, reference.names, strict=True))
        label = next(label for label, (a, b) in enumerate(pairs) if a != b)
        difference = "are in another order: label {} is {!r} and {!r}".format(label, *pairs[label])
    else:
        extra = []
        for a, b in ((samples, reference), (reference, samples)):
            if names := sorted(set(a.names) - set(b.names)):
                extra.append(f"only {a.owner} has {_shorten(names)}")
        difference = f"differ: {'; '.join(extra)}"
    raise ValueError(
        f"the class names of {samples.owner} and {reference.owner} {difference}. "
        "Pass as --reference the dataset that the samples' network was trained on"
    )


def _shorten(names: Sequence[str]) -> str:
    """Return the first three names, and the number of all names if there are more."""
    first = ", ".join(map(repr, names[:3]))
    return first if len(names) <= 3 else f"{first}, ... ({len(names)} in all)"
