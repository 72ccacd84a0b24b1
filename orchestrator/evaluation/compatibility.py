"""Checks that samples and reference fit together: class names, image size and colours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.evaluation.extractors import RESIZING
from orchestrator.evaluation.inputs import ImageSet

LOOKED_AT = 64  # first images of each set that are compared
COLOURFUL = 12  # mean difference between the channels of a pixel, above which a set counts as coloured


@dataclass(frozen=True)
class Side:
    """The first images of samples or of a reference."""

    name: str  # as the user typed it, such as "--samples digits/samples"
    images: ImageSet
    pixels: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, name: str, images: ImageSet) -> "Side":
        """Read the first images."""
        return cls(name, images, *images.read(0, min(LOOKED_AT, images.count)))

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
        """Return the classes of the labels."""
        names = self.images.classes
        if self.labels[0] < 0:
            return Classes(self.name, names, 0)
        return Classes(self.name, names, len(names) or self.images.num_classes or int(self.labels.max()) + 1)


@dataclass(frozen=True)
class Classes:
    """The classes of samples or of a reference."""

    owner: str  # as the user typed it
    names: tuple[str, ...]  # in the order of the labels, if they are known
    count: int  # 0 = there are no labels

    @property
    def are_numbers(self) -> bool:
        """Return whether the names of the classes are their numbers, as for an .npz and for released weights."""
        return self.names == tuple(map(str, range(len(self.names))))


def check_compatible(samples: Side, reference: Side, extractor: str) -> tuple[list[str], str]:
    """Return warnings, and the reason why the labels of the two sets cannot be matched ("" = they can).

    Raises:
        ValueError: class names or image sizes differ.
    """
    reason = match_classes(samples.classes, reference.classes)
    warnings = [reason] if reason else []
    if samples.size != reference.size:
        sizes = "{} has images of {}x{} pixels, and {} of {}x{}".format(
            samples.name, *samples.size, reference.name, *reference.size
        )
        if extractor not in RESIZING:
            raise ValueError(
                f"{sizes}: --extractor {extractor} needs equal sizes; pass a reference of the samples' size"
            )
        warnings.append(f"{sizes}: the extractor resizes both, so distances include the difference in resolution")
    for grey, coloured in ((samples, reference), (reference, samples)):
        if grey.colour == 0 and coloured.colour > COLOURFUL:
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
    left_out = "so accuracy and per-class metrics are not computed"
    if samples.are_numbers and reference.are_numbers:
        if samples.count <= reference.count:
            return ""
        return (
            f"{samples.owner} has labels up to {samples.count - 1}, and {reference.owner} up to "
            f"{reference.count - 1}, {left_out}"
        )
    if samples.are_numbers or reference.are_numbers:
        numbered, named = (samples, reference) if samples.are_numbers else (reference, samples)
        return (
            f"the classes of {numbered.owner} are numbers from 0 to {numbered.count - 1}, and {named.owner} has "
            f"{named.count} names ({_some(named.names)}): labels cannot be matched, {left_out}"
        )
    if samples.names == reference.names:
        return ""
    if set(samples.names) == set(reference.names):
        pairs = enumerate(zip(samples.names, reference.names, strict=True))
        label, (own, other) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        difference = f"are in another order: label {label} is {own!r} and {other!r}"
    else:
        only = [
            f"only {one.owner} has {_some(sorted(missing))}"
            for one, other in ((samples, reference), (reference, samples))
            if (missing := set(one.names) - set(other.names))
        ]
        difference = f"differ: {'; '.join(only)}"
    raise ValueError(
        f"the class names of {samples.owner} and {reference.owner} {difference}. "
        "Pass as --reference the dataset that the samples' network was trained on"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)} in all)"
