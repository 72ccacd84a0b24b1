"""Paired tests that decide which of several models is worse, from scores of the same indices.

Scores are float64 [n], one number for each index; their mean is a metric of which less is better (`models.scores`). All
models draw the same indices with the same labels and noise, so much of the noise cancels in paired differences. If the
labels are fixed and not drawn, the classes are strata, and the variance between classes is not a sampling error.
"""

import numpy as np
from numpy.typing import NDArray

from models.metrics import Array, Estimate, Strata, mean_variance, student_quantile

MIN_FAILURE_RATE = 0.01  # the smallest share of failing samples that a test must detect


def interval(scores: Array, n: int, strata: Strata = None, level: float = 0.025) -> Estimate:
    """Return the mean of scores of n samples with its interval, which misses on each side with probability `level`."""
    variance, degrees = mean_variance(scores, _strata_of_scores(scores, strata))
    value = float(scores.mean())
    half = student_quantile(1 - level, degrees) * float(np.sqrt(variance))
    return Estimate(value, n, value - half, value + half)


def _strata_of_scores(scores: Array, strata: Strata) -> Strata:
    """Return the strata if there is one for each score, and None for scores of groups of samples."""
    return strata if strata is not None and len(strata) == len(scores) else None


def differences(a: Array, b: Array) -> Array:
    """Return a - b for scores [n] of the same indices; ValueError if their numbers differ."""
    if a.shape != b.shape:
        raise ValueError(f"paired scores must be of the same indices, but they have the shapes {a.shape} and {b.shape}")
    return a - b


def surely_positive(scores: Array, strata: Strata, level: float, n: int, span: float) -> bool:
    """Return whether the mean of scores from n samples is above 0, with one-sided error probability `level`.

    A failure with large scores that occurs in 1% of all samples is absent among n samples with probability 0.99^n, and
    then the standard error does not include it. If this probability is above the level, the test uses the empirical
    Bernstein bound of Maurer & Pontil (2009) for scores in an interval of length `span`, and otherwise Student's t.
    """
    mean = scores.mean()
    log_odds = np.log(2 / level)
    use_student = (1 - MIN_FAILURE_RATE) ** n <= level
    margin = 0.0 if use_student else 7 * span * log_odds / (3 * (len(scores) - 1))
    if mean <= margin:  # for any variance; there may be too few scores to estimate it
        return False
    variance, degrees = mean_variance(scores, _strata_of_scores(scores, strata))
    factor = student_quantile(1 - level, degrees) if use_student else np.sqrt(2 * log_odds)
    return bool(mean > margin + factor * np.sqrt(variance))


def level_of_a_test(alpha: float, looks: int, rivals: int, constraints: int) -> float:
    """Return the one-sided error probability of each test for a family-wise error probability `alpha` (Bonferroni).

    A look is a time at which all tests are made. The best model that satisfies the constraints is eliminated wrongly
    only if, at some look, it seems to violate a constraint, or a rival seems to be better and to satisfy the
    constraints. A rival that truly satisfies them is not truly better, so the test of the objective is wrong. For a
    rival that truly violates a constraint, the test of this constraint is wrong. So one error of this level for each
    rival and for each constraint at each look is an upper bound, in any order of looks and rivals.
    """
    return alpha / (looks * max(rivals + constraints, 1))


def front(values: Array) -> NDArray[np.bool_]:
    """Return a mask [m] of the Pareto front: the points values [m, k] that no other point dominates; less is better."""
    at_most = (values[:, None] <= values[None]).all(axis=2)
    less = (values[:, None] < values[None]).any(axis=2)
    return np.logical_not((at_most & less).any(axis=0))


def front_ranks(values: Array) -> NDArray[np.int64]:
    """Return [m] 0 for the Pareto front of values [m, k], 1 for the front of the remaining points, and so on."""
    ranks = np.full(len(values), -1)
    while (remaining := np.flatnonzero(ranks < 0)).size:
        ranks[remaining[front(values[remaining])]] = ranks.max() + 1
    return ranks
