"""Metrics of manifolds: conventions that detect swapped sets, blocks, and coverage of the intervals."""

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from models import neighbours
from models.manifolds import (
    authenticity,
    density_coverage,
    manifolds,
    precision_recall,
    precision_recall_openai,
    realism,
)
from models.metrics import Estimate, by_class

Array = NDArray[np.float64]
SEED = 21


def generator(*key: int) -> np.random.Generator:
    print("seed", SEED, key)
    return np.random.default_rng([SEED, *key])


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = generator(9)
    reference, samples = rng.standard_normal((300, 5)).astype(np.float32), rng.standard_normal((700, 5)) * 0.8
    expected_metrics, expected_realism = manifolds(reference, samples), realism(reference, samples)
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 300 * 17)
    assert manifolds(reference, samples) == expected_metrics
    np.testing.assert_array_equal(realism(reference, samples), expected_realism)


def test_density_and_coverage_use_as_many_samples_as_references() -> None:
    """With five times as many samples as references, coverage would be 1 for spreads of 1 and 0.7."""
    rng = generator(10)
    reference = rng.standard_normal((200, 4))
    good, narrow = (manifolds(reference, scale * rng.standard_normal((1000, 4))) for scale in (1.0, 0.7))
    for estimate in (good.density, good.coverage, good.clipped_density, good.clipped_coverage):
        assert estimate.n == estimate.n_reference == 200
    assert good.precision.n == 1000 and good.precision.n_reference == 200
    assert good.coverage.value < 0.999 and narrow.coverage.value < good.coverage.value
    _, coverage_of_all, *_ = density_coverage(reference, 0.7 * rng.standard_normal((1000, 4)))
    assert coverage_of_all.value > narrow.coverage.value + 0.02
    small = manifolds(reference, rng.standard_normal((60, 4)))
    assert small.coverage.n == small.coverage.n_reference == 60 and small.recall.n_reference == 200


def test_clipped_density_and_coverage_are_those_of_their_definition() -> None:
    """The expected values use one matrix of distances and SciPy's beta-binomial distribution."""
    rng, k = generator(11), 5
    reference, samples = rng.standard_normal((120, 3)), 0.8 * rng.standard_normal((90, 3)) + 0.2
    within, across = (np.sqrt(np.square(a[:, None] - reference[None]).sum(-1)) for a in (reference, samples))
    radii = np.sort(within, axis=1)[:, k]
    narrow = np.minimum(radii, np.median(radii))
    neighbours_within = (within <= radii[:, None]) & (within <= narrow[:, None]) & ~np.eye(120, dtype=bool)
    perfect = np.minimum(neighbours_within.sum(0) / k, 1).mean()
    _, _, density, coverage = density_coverage(reference, samples, k)
    expected = np.minimum((across <= narrow).sum(1) / k, 1).mean() / perfect
    assert density.value == pytest.approx(min(expected, 1), rel=1e-12)
    counts = np.arange(91)
    expected_coverage = [scipy.stats.betabinom(g, k, 120 - k).expect(lambda j: np.minimum(j, k)) / k for g in counts]
    covered = np.minimum((across < radii).sum(0), k).mean() / k
    assert coverage.value == pytest.approx(np.searchsorted(expected_coverage, covered - 1e-12) / 91)


def test_clipped_metrics_fall_with_the_share_of_good_samples() -> None:
    """Half of the samples are far away, so both metrics are one half."""
    rng = generator(12)
    reference, samples = rng.standard_normal((1000, 4)), rng.standard_normal((1000, 4))
    samples[::2] += 100
    _, _, density, coverage = density_coverage(reference, samples)
    assert density.value == pytest.approx(0.5, abs=0.05) and coverage.value == pytest.approx(0.5, abs=0.05)


def test_copies_in_the_reference_are_noted() -> None:
    rng = generator(13)
    reference = np.repeat(rng.standard_normal((20, 3)), 6, axis=0)
    estimates = manifolds(reference, rng.standard_normal((50, 3)))
    assert estimates.precision.value == 0 and estimates.density.n_reference == 50
    assert "120 reference rows" in estimates.precision.note and "sample" not in estimates.recall.note


def test_collapsed_samples_have_high_precision_and_low_recall() -> None:
    rng = generator(3)
    reference = rng.standard_normal((400, 4))
    precision, recall = precision_recall(reference, 0.2 * rng.standard_normal((300, 4)))
    density, coverage, *_ = density_coverage(reference, 0.2 * rng.standard_normal((300, 4)))
    assert precision.value > 0.95 and recall.value < 0.2
    assert density.value > 0.8 and coverage.value < 0.5
    precision, recall = precision_recall(reference, 3 * rng.standard_normal((300, 4)))  # and spread-out ones
    assert precision.value < 0.5 and recall.value > 0.8


def test_published_arithmetic_is_close_to_the_exact_one_and_survives_overflow() -> None:
    rng = generator(4)
    reference, samples = rng.standard_normal((200, 8)), rng.standard_normal((150, 8)) * 0.9
    for scale in (1.0, 1e3):  # squares of the second overflow float16
        exact = [e.value for e in precision_recall(reference, samples)]
        assert precision_recall_openai(reference * scale, samples * scale) == pytest.approx(exact, abs=0.02)


def test_realism_is_one_on_a_surface_and_infinite_for_a_copy() -> None:
    reference = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert realism(reference, np.array([[5.0], [9.0], [7.0]]), k=1).tolist() == [2.0, 2.0, np.inf]
    assert realism(reference, np.array([[-2.0], [15.0]]), k=1).tolist() == [0.5, 0.5]


def test_copies_are_not_authentic() -> None:
    rng = generator(5)
    reference = rng.standard_normal((200, 5))
    copies = reference[:100] + 1e-3 * rng.standard_normal((100, 5))
    assert authenticity(reference, copies).value == 0
    assert authenticity(reference, rng.standard_normal((100, 5)) + 20).value == 100
    assert 30 < authenticity(reference, rng.standard_normal((500, 5))).value < 70


def test_precision_within_classes_detects_swapped_classes() -> None:
    """With two swapped classes, the sets are equal but each class differs."""
    rng = generator(6)
    centres = np.array([[0.0, 0.0], [50.0, 0.0]])
    labels = np.arange(100) % 2
    reference, samples = (centres[c] + rng.standard_normal((100, 2)) for c in (labels, 1 - labels))
    assert precision_recall(reference, samples)[0].value > 0.8
    assert {p.value for p, _ in by_class(precision_recall, reference, labels, samples, labels).values()} == {0.0}


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="k=3"):
        precision_recall(np.zeros((3, 2)), np.ones((10, 2)))
    with pytest.raises(ValueError, match="4 and 2 dimensions"):
        precision_recall(np.zeros((9, 4)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="exact copies"):
        realism(np.zeros((9, 2)), np.ones((9, 2)))


def test_equal_values_of_all_samples_give_no_interval() -> None:
    rng = generator(7)
    _, recall = precision_recall(rng.standard_normal((50, 2)), rng.standard_normal((50, 2)) + 1e3)
    assert recall.value == 0 and recall.low is None and "no single sample" in recall.note
    density, *_ = density_coverage(rng.standard_normal((50, 2)), rng.standard_normal((50, 2)) + 1e3)
    assert density.value == 0 and density.low is None and "every sample" in density.note


@pytest.mark.parametrize(("scale", "shift"), [(0.8, 0.8), (0.6, 0.0)])
def test_intervals_hold(scale: float, shift: float) -> None:
    """95% intervals cover the mean over all sets of n samples, for one fixed reference."""
    rng, num_runs = generator(8), 200
    reference = rng.standard_normal((150, 3))
    runs: list[tuple[Estimate, ...]] = []
    for _ in range(num_runs):
        samples = scale * rng.standard_normal((200, 3)) + shift
        neighbour_metrics = precision_recall(reference, samples) + density_coverage(reference, samples)
        runs.append((*neighbour_metrics, authenticity(reference, samples)))
    names = ("precision", "recall", "density", "coverage", "clipped density", "clipped coverage", "authenticity")
    for name, estimates in zip(names, zip(*runs, strict=True), strict=True):
        truth = float(np.mean([e.value for e in estimates]))
        covered = np.mean([e.low is not None and e.high is not None and e.low <= truth <= e.high for e in estimates])
        print(scale, shift, name, "mean", truth, "held", covered)
        if truth < 0.99 or "clipped" not in name:  # clipped metrics end at 1
            upper_limit = 1.0 if name in ("recall", "coverage", "clipped coverage") else 0.98  # the jackknife's is safe
            assert 0.90 <= covered <= upper_limit, name
