"""Samples and reference are compared before features are extracted, and differences are errors or warnings."""

from functools import partial

import numpy as np
import pytest

from orchestrator.evaluation.compatibility import Side, check_compatible
from orchestrator.evaluation.inputs import ImageSet

NAMES = ("cat", "dog", "fox")
NUMBERS = ("0", "1", "2")


def read(size: tuple[int, int], colour: int, label: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.full((end - begin, *size, 3), 100, np.uint8)
    images[..., 0] += colour
    return images, np.full(end - begin, -1) if label < 0 else np.arange(begin, end) % (label + 1)


def side(
    name: str = "x", classes: tuple[str, ...] = (), size: tuple[int, int] = (8, 8), colour: int = 40, label: int = 2
) -> Side:
    """Return a set with labels from 0 to `label` (-1: no labels), its class names, and pixels of one colour."""
    return Side.of(name, ImageSet(name, "npz", 100, name, partial(read, size, colour, label), classes=classes))


@pytest.mark.parametrize(
    ("samples", "reference"),
    [
        (NAMES, NAMES),
        (NUMBERS, NUMBERS),
        ((), ()),
        ((), NUMBERS),
        ((), ("0", "1", "2", "3")),  # the samples have no image of the last class
    ],
)
def test_equal_classes_are_matched(samples: tuple[str, ...], reference: tuple[str, ...]) -> None:
    assert check_compatible(side(classes=samples), side(classes=reference), "digits") == ([], "")


@pytest.mark.parametrize(
    ("samples", "reference", "key_words"),
    [
        (NAMES, ("cat", "cow", "dog"), ["only A has 'fox'", "only B has 'cow'", "trained on"]),
        (NAMES, (*NAMES, "cow"), ["only B has 'cow'"]),
        (NAMES, ("dog", "cat", "fox"), ["another order", "label 0 is 'cat' and 'dog'"]),
        (("a", *NUMBERS), ("b", *NUMBERS), ["'a'", "'b'"]),
        (tuple("abcdef"), NAMES, ["'a', 'b', 'c', ... (6 in all)"]),
    ],
)
def test_other_class_names_are_an_error(
    samples: tuple[str, ...], reference: tuple[str, ...], key_words: list[str]
) -> None:
    with pytest.raises(ValueError, match="class names of A and B") as error:
        check_compatible(side("A", samples), side("B", reference), "inception")
    for word in key_words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("samples", "reference", "key_words"),
    [
        ((), NAMES, ["A", "0 to 2", "B has 3 names", "'cat'"]),
        (NUMBERS, NAMES, ["A", "0 to 2", "B has 3 names"]),
        (NAMES, (), ["B", "0 to 2", "A has 3 names"]),
        ((), NUMBERS[:2], ["A has labels up to 2", "B up to 1"]),
    ],
)
def test_numbered_classes_that_cannot_be_matched_are_a_warning(
    samples: tuple[str, ...], reference: tuple[str, ...], key_words: list[str]
) -> None:
    (warning,), reason = check_compatible(side("A", samples), side("B", reference), "digits")
    assert warning == reason and "accuracy" in reason
    for word in key_words:
        assert word in warning


def test_without_labels_there_is_nothing_to_match() -> None:
    assert check_compatible(side(label=-1), side(classes=NAMES), "digits") == ([], "")
    assert check_compatible(side(classes=NAMES), side(label=-1), "digits") == ([], "")


def test_different_sizes_are_a_warning_if_the_extractor_resizes_and_else_an_error() -> None:
    small, large = side("A", size=(64, 64)), side("B", size=(128, 256))
    for extractor in ("inception", "efficientnet"):
        (warning,), _ = check_compatible(small, large, extractor)
        assert "A has images of 64x64 pixels" in warning and "B of 256x128" in warning
    for extractor in ("digits", "package.module.name"):
        with pytest.raises(ValueError, match=f"64x64 .* 256x128: --extractor {extractor}"):
            check_compatible(small, large, extractor)


@pytest.mark.parametrize(
    ("samples_colour", "reference_colour", "count"), [(0, 0, 0), (60, 50, 0), (0, 60, 1), (60, 0, 1), (2, 0, 0)]
)
def test_grey_against_colour_is_a_warning(samples_colour: int, reference_colour: int, count: int) -> None:
    warnings, _ = check_compatible(side("A", colour=samples_colour), side("B", colour=reference_colour), "digits")
    assert len(warnings) == count and all("grey" in warning for warning in warnings)
    if count:
        assert f"64 images of {'B' if samples_colour else 'A'} are grey" in warnings[0]
