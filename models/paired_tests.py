"""Paired tests: which of several models is surely worse, from scores of the same indices.

Scores are float64 [n]: a number for each of n indices, whose mean is a metric of which less is better; see
`models.scores`. All models draw the same indices with the same labels and noise, so they are compared by paired
differences, in which much of the noise cancels. Where the labels are given and not drawn, the classes are strata: the
variation between them is no sampling error. Everything here is pure.
"""

import numpy as np
from numpy.typing import NDArray

from models.metrics import Array, Estimate, Strata, mean_variance, student_quantile

RARE = 0.01  # share of the samples of which a failure must not stay unseen


def interval(scores: Array, n: int, strata: Strata = None, level: float = 0.025) -> Estimate:
    """Return the mean of scores of n samples with an interval that misses on each side with probability `level`."""
    variance, degrees = mean_variance(scores, _fitting(scores, strata))
    value, half = float(scores.mean()), student_quantile(1 - level, degrees) * float(np.sqrt(variance))
    return Estimate(value, n, value - half, value + half)


def _fitting(scores: Array, strata: Strata) -> Strata:
    """The strata, where there is one for each score: scores of groups of samples have none."""
    return strata if strata is not None and len(strata) == len(scores) else None


def differences(a: Array, b: Array) -> Array:
    """Return a - b for scores [n] of the same indices; ValueError where the numbers of indices differ."""
    if a.shape != b.shape:
        raise ValueError(f"paired scores must cover the same indices: shapes {a.shape}, {b.shape}")
    return a - b


def surely_positive(scores: Array, strata: Strata, level: float, n: int, span: float) -> bool:
    """Return whether the mean of scores from n samples is above 0, with one-sided error `level`.

    A failure that costs much but befalls 1% of the samples is not seen among n with probability 0.99^n, and before it
    is seen no standard error knows of it. Where that probability is above the level, the bound is the empirical
    Bernstein bound of Maurer & Pontil (2009) for scores within a `span`; else it is Student's t.
    """
    mean, odds, seen = scores.mean(), np.log(2 / level), (1 - RARE) ** n <= level
    least = 0.0 if seen else 7 * span * odds / (3 * (len(scores) - 1))
    if mean <= least:  # whatever the variance is
        return False
    variance, degrees = mean_variance(scores, _fitting(scores, strata))
    factor = student_quantile(1 - level, degrees) if seen else np.sqrt(2 * odds)
    return bool(mean > least + factor * np.sqrt(variance))


def level_of_a_test(alpha: float, looks: int, rivals: int, constraints: int) -> float:
    """Return the one-sided error that each test may have, for a family-wise error of `alpha` (Bonferroni).

    The best model that keeps the constraints is eliminated wrongly only if, at some look, it seems to break a
    constraint, or a rival seems both better than it and to keep the constraints. A rival that keeps them is in truth
    not better, and of one that breaks them a constraint's test would have to fail: one error of this level for each
    rival and each constraint at each look, whatever the order of looks and however the rivals were chosen.
    """
    return alpha / (looks * max(rivals + constraints, 1))


def front(values: Array) -> NDArray[np.bool_]:
    """[m] which of the points values [m, k], of which less is better, no other one dominates."""
    at_most = (values[:, None] <= values[None]).all(axis=2)
    less = (values[:, None] < values[None]).any(axis=2)
    return np.logical_not((at_most & less).any(axis=0))


def front_ranks(values: Array) -> NDArray[np.int64]:
    """[m] 0 for the front of values [m, k], 1 for the front of what is left, and so on."""
    ranks = np.full(len(values), -1)
    while (left := np.flatnonzero(ranks < 0)).size:
        ranks[left[front(values[left])]] = ranks.max() + 1
    return ranks
