"""Decisions between models: sure as they claim, by paired differences, with given classes as strata."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from models.metrics import strata_of
from models.paired_tests import (
    differences,
    front,
    front_ranks,
    level_of_a_test,
    mean_of,
    student_quantile,
    surely_positive,
)


def test_student_quantiles_are_scipys() -> None:
    for p in (0.95, 0.975, 0.999, 1 - 1e-5):
        for degrees in (15, 31, 63.5, 1000):
            assert student_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-3)


def test_the_best_is_eliminated_no_oftener_than_the_level_says() -> None:
    """All of ten models are equally good, so each is the best; three looks at nested samples."""
    alpha, models, looks = 0.05, 10, (700, 1000, 1400)
    level = level_of_a_test(alpha, len(looks), models - 1, 0)
    stopped = 0
    for run in range(400):
        rng = np.random.default_rng([7, run])
        scores = rng.standard_normal((models, looks[-1])) + 2 * rng.standard_normal(looks[-1])
        best, rivals = scores[0], scores[1:]
        stopped += any(surely_positive(best[:n] - r[:n], None, level, n, np.inf) for n in looks for r in rivals)
    assert 0 < stopped <= alpha * 400 * 1.3, f"{stopped} of 400"


def test_constraints_share_the_error() -> None:
    assert level_of_a_test(0.05, 2, 23, 2) == pytest.approx(0.05 / 50)
    assert level_of_a_test(0.05, 1, 0, 0) == 0.05


def test_the_stratified_error_is_that_of_given_classes_and_the_plain_one_that_of_drawn_ones() -> None:
    """Ten classes with means 0 to 9 and spreads 0.5 to 1.4."""
    n, classes, found = 200, 10, {"given": [], "drawn": []}  # type: ignore[var-annotated]
    for run in range(400):
        rng = np.random.default_rng([8, run])
        for kind, labels in (("given", np.arange(n) % classes), ("drawn", rng.integers(classes, size=n))):
            scores = labels + (0.5 + 0.1 * labels) * rng.standard_normal(n)
            found[kind].append(mean_of(scores, strata_of(labels) if kind == "given" else None))
    for kind, means in found.items():
        spread = np.std([mean.value for mean in means])
        assert np.mean([mean.error for mean in means]) == pytest.approx(spread, rel=0.1), kind
    assert found["drawn"][0].error > 2 * found["given"][0].error


def test_intervals_with_few_samples_of_a_class_hold() -> None:
    """Two samples of each of 50 classes, and classes of one, which form a stratum together."""
    held = 0
    labels = np.concatenate([np.repeat(np.arange(50), 2), np.arange(50, 60)])
    for run in range(400):
        rng = np.random.default_rng([9, run])
        estimate = mean_of(np.sin(labels) + rng.standard_normal(len(labels)), strata_of(labels)).estimate(len(labels))
        assert estimate.low is not None and estimate.high is not None
        held += estimate.low <= np.sin(labels).mean() <= estimate.high
    assert 0.92 * 400 <= held <= 0.99 * 400, f"{held} of 400"


def test_strata_of_one_sample_are_merged() -> None:
    assert strata_of(np.array([5, 5, 7, 7, 7])).tolist() == [0, 0, 1, 1, 1]
    assert strata_of(np.array([1, 2, 3, 3])).tolist() == [0, 0, 1, 1], "two classes of one sample are a stratum"
    assert strata_of(np.array([1, 2, 2, 3, 3, 3])).tolist() == [0, 0, 0, 1, 1, 1], "one joins the next smallest"
    assert set(strata_of(np.arange(8))) == {0} == set(strata_of(np.full(8, -1)))
    assert mean_of(np.arange(8.0), strata_of(np.arange(8))) == mean_of(np.arange(8.0))


def test_scores_of_other_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="same indices"):
        differences(np.zeros(5), np.zeros(6))
    with pytest.raises(ValueError, match="at least 2"):
        mean_of(np.zeros(1))
    assert not surely_positive(np.zeros(5), None, 0.4, 5, 1.0), "no difference, no decision"


def test_few_samples_decide_by_a_bound_that_knows_of_rare_failures() -> None:
    """A model of which 1% of the samples fail, and the failures have not been seen in its own samples yet."""
    rng = np.random.default_rng(10)
    better = 0.3 + 0.1 * rng.standard_normal(256)
    assert surely_positive(better, None, 1e-3, 1024, span=50.0), "by Student's t, where a failure would have been seen"
    assert not surely_positive(better, None, 1e-3, 256, span=50.0), "another model's failures have shown what they cost"
    assert surely_positive(better, None, 1e-3, 256, span=0.8)


def test_fronts() -> None:
    values = np.array([[1.0, 5.0], [2.0, 2.0], [5.0, 1.0], [3.0, 3.0], [6.0, 6.0], [2.0, 2.0]])
    assert front(values).tolist() == [True, True, True, False, False, True]
    assert front_ranks(values).tolist() == [0, 0, 0, 1, 2, 0]
    ranks = front_ranks(np.random.default_rng(12).standard_normal((50, 2)))
    assert set(ranks) == set(range(ranks.max() + 1)) and all(b - a in (0, 1) for a, b in pairwise(sorted(ranks)))
