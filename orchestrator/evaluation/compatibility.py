"""Compare samples with their reference before any feature is made: class names, image size, channels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.evaluation.extractors import RESIZING
from orchestrator.evaluation.inputs import ImageSet

LOOKED_AT = 64  # first images of each set
COLOURFUL = 12  # grey levels between the channels of a pixel, on average, from which on a set counts as coloured


@dataclass(frozen=True)
class Side:
    """The first images of samples or of a reference, under the name that messages give the set."""

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
        """Return the difference between the channels of a pixel, on average: 0 for grey images."""
        return float((self.pixels.max(axis=3) - self.pixels.min(axis=3)).mean())

    @property
    def num_classes(self) -> int:
        """Return how many classes the labels may be of; 0 where there are no labels."""
        if self.labels[0] < 0:
            return 0
        return len(self.images.classes) or self.images.num_classes or int(self.labels.max()) + 1

    @property
    def numbered(self) -> bool:
        """Return whether classes have no other names than their numbers, as in an .npz and in released weights."""
        classes = self.images.classes
        return classes == tuple(str(label) for label in range(len(classes)))


def check_compatible(samples: Side, reference: Side, extractor: str) -> tuple[list[str], str]:
    """Return warnings, and why the labels of the two sets cannot be matched ("" where they can).

    Raises:
        ValueError: class names or image sizes differ, and so cannot be compared.
    """
    reason = _match_classes(samples, reference)
    warnings = [reason] if reason else []
    if samples.size != reference.size:
        sizes = "{} has images of {}x{} pixels, and {} of {}x{}".format(
            samples.name, *samples.size, reference.name, *reference.size
        )
        if extractor not in RESIZING:
            raise ValueError(f"{sizes}: --extractor {extractor} needs a reference of the samples' size")
        warnings.append(f"{sizes}: the extractor resizes both, so distances measure the difference in resolution too")
    for grey, coloured in ((samples, reference), (reference, samples)):
        if grey.colour == 0 and coloured.colour > COLOURFUL:
            warnings.append(
                f"the first {len(grey.pixels)} images of {grey.name} are grey, and those of {coloured.name} are "
                "coloured: distances measure this difference too"
            )
    return warnings, reason


def _match_classes(samples: Side, reference: Side) -> str:
    if not samples.num_classes or not reference.num_classes:
        return ""  # the metrics that need labels give this as their reason
    here, there = samples.images.classes, reference.images.classes
    left_out = "so accuracy and metrics by class are left out"
    if samples.numbered and reference.numbered:
        if samples.num_classes <= reference.num_classes:
            return ""
        return (
            f"{samples.name} has labels up to {samples.num_classes - 1}, and {reference.name} up to "
            f"{reference.num_classes - 1}, {left_out}"
        )
    if samples.numbered or reference.numbered:
        numbered, named = (samples, reference) if samples.numbered else (reference, samples)
        return (
            f"the classes of {numbered.name} have no names but 0 to {numbered.num_classes - 1}, and {named.name} names "
            f"{named.num_classes} ({_some(named.images.classes)}): labels cannot be matched, {left_out}"
        )
    if here == there:
        return ""
    if set(here) == set(there):
        label = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
        what = f"are in another order: label {label} is {here[label]!r} and {there[label]!r}"
    else:
        parts = [
            f"only {side.name} has {_some(sorted(own - other))}"
            for side, own, other in ((samples, set(here), set(there)), (reference, set(there), set(here)))
            if own - other
        ]
        what = f"differ: {'; '.join(parts)}"
    raise ValueError(
        f"the class names of {samples.name} and {reference.name} {what}. "
        "Pass as --reference the dataset that the samples' network was trained on"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)} in all)"
