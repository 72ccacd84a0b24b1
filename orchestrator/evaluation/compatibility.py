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
    def num_classes(self) -> int:
        """Return the number of classes; 0 = there are no labels."""
        if self.labels[0] < 0:
            return 0
        return len(self.images.classes) or self.images.num_classes or int(self.labels.max()) + 1

    @property
    def numbered(self) -> bool:
        """Return whether the names of the classes are their numbers, as for an .npz and for released weights."""
        classes = self.images.classes
        return classes == tuple(str(label) for label in range(len(classes)))


def check_compatible(samples: Side, reference: Side, extractor: str) -> tuple[list[str], str]:
    """Return warnings, and the reason why the labels of the two sets cannot be matched ("" = they can).

    Raises:
        ValueError: class names or image sizes differ.
    """
    reason = _match_classes(samples, reference)
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


def _match_classes(samples: Side, reference: Side) -> str:
    if not samples.num_classes or not reference.num_classes:
        return ""  # the metrics that need labels report this
    sample_classes, reference_classes = samples.images.classes, reference.images.classes
    left_out = "so accuracy and per-class metrics are not computed"
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
            f"the classes of {numbered.name} are numbers from 0 to {numbered.num_classes - 1}, and {named.name} has "
            f"{named.num_classes} names ({_some(named.images.classes)}): labels cannot be matched, {left_out}"
        )
    if sample_classes == reference_classes:
        return ""
    if set(sample_classes) == set(reference_classes):
        label = next(i for i, (a, b) in enumerate(zip(sample_classes, reference_classes, strict=True)) if a != b)
        what = f"are in another order: label {label} is {sample_classes[label]!r} and {reference_classes[label]!r}"
    else:
        parts = [
            f"only {side.name} has {_some(sorted(own - other))}"
            for side, own, other in (
                (samples, set(sample_classes), set(reference_classes)),
                (reference, set(reference_classes), set(sample_classes)),
            )
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
