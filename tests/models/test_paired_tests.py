"""Decisions between models: error rates of paired tests, also with classes as strata."""

from itertools import pairwise

import numpy as np
import pytest

from models.paired_tests import (
    differences,
    front,
    front_ranks,
    interval,
    level_of_a_test,
    surely_positive,
)


def test_the_best_is_eliminated_at_most_at_the_stated_level() -> None:
    """All of ten models are equally good, so each is the best. They are compared at three nested sample sizes."""
    alpha, models, looks = 0.05, 10, (700, 1000, 1400)
    level = level_of_a_test(alpha, len(looks), models - 1, 0)
    stopped = 0
    for run in range(400):
        rng = np.random.default_rng([7, run])
        scores = rng.standard_normal((models, looks[-1])) + 2 * rng.standard_normal(looks[-1])
        best, rivals = scores[0], scores[1:]
        stopped += any(surely_positive(best[:n] - rival[:n], None, level, n, np.inf) for n in looks for rival in rivals)
    assert 0 < stopped <= alpha * 400 * 1.3, f"{stopped} of 400"


def test_constraints_share_the_error() -> None:
    assert level_of_a_test(0.05, 2, 23, 2) == pytest.approx(0.05 / 50)
    assert level_of_a_test(0.05, 1, 0, 0) == 0.05


def test_intervals_of_given_classes_hold_at_any_level() -> None:
    """Ten classes with means 0 to 9 and spreads 0.5 to 1.4, drawn in turn."""
    labels, covered = np.arange(200) % 10, {0.025: 0, 0.1: 0}
    for run in range(400):
        scores = labels + (0.5 + 0.1 * labels) * np.random.default_rng([8, run]).standard_normal(200)
        for level in covered:
            estimate = interval(scores, 200, labels, level)
            assert estimate.low is not None and estimate.high is not None
            covered[level] += estimate.low <= 4.5 <= estimate.high
    assert 0.92 * 400 <= covered[0.025] <= 0.98 * 400 and 0.75 * 400 <= covered[0.1] <= 0.85 * 400, covered
    assert interval(scores[:20], 200, labels) == interval(scores[:20], 200), "scores of groups have no strata"


def test_scores_of_other_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="same indices"):
        differences(np.zeros(5), np.zeros(6))
    assert not surely_positive(np.zeros(5), None, 0.4, 5, 1.0), "no difference, no decision"


def test_few_samples_are_compared_by_a_bound_that_allows_for_rare_failures() -> None:
    """1% of the samples of a model fail, but its own samples contain no failure yet."""
    rng = np.random.default_rng(10)
    better = 0.3 + 0.1 * rng.standard_normal(256)
    assert surely_positive(better, None, 1e-3, 1024, span=50.0), "Student's t: 1,024 samples would contain a failure"
    assert not surely_positive(better, None, 1e-3, 256, span=50.0), "failures of other models gave the span of 50"
    assert surely_positive(better, None, 1e-3, 256, span=0.8)


def test_the_front_contains_the_settings_that_no_other_dominates() -> None:
    values = np.array([[1.0, 5.0], [2.0, 2.0], [5.0, 1.0], [3.0, 3.0], [6.0, 6.0], [2.0, 2.0]])
    assert front(values).tolist() == [True, True, True, False, False, True]
    assert front_ranks(values).tolist() == [0, 0, 0, 1, 2, 0]
    ranks = front_ranks(np.random.default_rng(12).standard_normal((50, 2)))
    assert set(ranks) == set(range(ranks.max() + 1)) and all(b - a in (0, 1) for a, b in pairwise(sorted(ranks)))
