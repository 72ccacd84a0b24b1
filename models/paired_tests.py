"""Paired tests that decide which of several models is worse, from scores of the same indices.

Scores are float64 [n], one number for each index; their mean is a metric of which less is better (`models.scores`). All
models draw the same indices with the same labels and noise, so much of the noise cancels in paired differences. If the
labels are given and not drawn, the classes are strata, and the variation between them is not a sampling error.
"""

import numpy as np
from numpy.typing import NDArray

from models.metrics import Array, Estimate, Strata, mean_variance, student_quantile

RARE = 0.01  # the smallest share of failing samples that must not be overlooked


def interval(scores: Array, n: int, strata: Strata = None, level: float = 0.025) -> Estimate:
    """Return the mean of scores of n samples with an interval that misses on each side with probability `level`."""
    variance, degrees = mean_variance(scores, _fitting(scores, strata))
    value, half = float(scores.mean()), student_quantile(1 - level, degrees) * float(np.sqrt(variance))
    return Estimate(value, n, value - half, value + half)


def _fitting(scores: Array, strata: Strata) -> Strata:
    """Return the strata if there is one for each score; scores of groups of samples have none."""
    return strata if strata is not None and len(strata) == len(scores) else None


def differences(a: Array, b: Array) -> Array:
    """Return a - b for scores [n] of the same indices; ValueError if their numbers differ."""
    if a.shape != b.shape:
        raise ValueError(f"paired scores must cover the same indices: shapes {a.shape}, {b.shape}")
    return a - b


def surely_positive(scores: Array, strata: Strata, level: float, n: int, span: float) -> bool:
    """Return whether the mean of scores from n samples is above 0, with one-sided error probability `level`.

    A costly failure of 1% of the samples does not occur among n samples with probability 0.99^n, and then the standard
    error does not include it. If that probability is above the level, the test uses the empirical Bernstein bound of
    Maurer & Pontil (2009) for scores within a `span`, otherwise Student's t.
    """
    mean, odds, seen = scores.mean(), np.log(2 / level), (1 - RARE) ** n <= level
    least = 0.0 if seen else 7 * span * odds / (3 * (len(scores) - 1))
    if mean <= least:  # whatever the variance is
        return False
    variance, degrees = mean_variance(scores, _fitting(scores, strata))
    factor = student_quantile(1 - level, degrees) if seen else np.sqrt(2 * odds)
    return bool(mean > least + factor * np.sqrt(variance))


def level_of_a_test(alpha: float, looks: int, rivals: int, constraints: int) -> float:
    """Return the one-sided error probability of each test for a family-wise error probability `alpha` (Bonferroni).

    The best model that satisfies the constraints is eliminated wrongly only if, at some look, it seems to violate a
    constraint, or a rival seems both better and to satisfy the constraints. A rival that satisfies them is in truth not
    better, and for one that violates them a constraint's test has to be wrong. So there is at most one error of this
    level for each rival and each constraint at each look, in whatever order the looks and rivals come.
    """
    return alpha / (looks * max(rivals + constraints, 1))


def front(values: Array) -> NDArray[np.bool_]:
    """Return [m] which of the points values [m, k] no other point dominates; less is better."""
    at_most = (values[:, None] <= values[None]).all(axis=2)
    less = (values[:, None] < values[None]).any(axis=2)
    return np.logical_not((at_most & less).any(axis=0))


def front_ranks(values: Array) -> NDArray[np.int64]:
    """Return [m] 0 for the front of values [m, k], 1 for the front of the remaining points, and so on."""
    ranks = np.full(len(values), -1)
    while (left := np.flatnonzero(ranks < 0)).size:
        ranks[left[front(values[left])]] = ranks.max() + 1
    return ranks
