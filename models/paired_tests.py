"""Paired tests: which of several models is surely worse, from scores of the same indices.

Scores are float64 [n]: a number for each of n indices, whose mean is a metric of which less is better; see
`models.scores`. All models draw the same indices with the same labels and noise, so they are compared by paired
differences, in which much of the noise cancels. Where the labels are given and not drawn, the classes are strata: the
variation between them is no sampling error. Everything here is pure.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from models.metrics import Array, Estimate

RARE = 0.01  # share of the samples of which a failure must not stay unseen

Strata = NDArray[np.int64] | None  # [n] of each index where the labels are given, by `strata_of`; None = drawn


@dataclass(frozen=True)
class Mean:
    """The mean of scores, its standard error, and the degrees of freedom of that."""

    value: float
    error: float
    degrees: float

    def estimate(self, n: int, level: float = 0.025, note: str = "") -> Estimate:
        """Return the mean with its interval, which misses on each side with probability `level`."""
        half = student_quantile(1 - level, self.degrees) * self.error
        return Estimate(self.value, n, self.value - half, self.value + half, note)


def mean_of(scores: Array, strata: Strata = None) -> Mean:
    """Return the mean of scores [n] with the stratified standard error, or the plain one where `strata` is None.

    The error is the root of sum_k (n_k / n)^2 s_k^2 / n_k over the strata k, with Satterthwaite's degrees of freedom.
    Scores of groups of samples are not as many as the strata have members, and are taken without strata.

    Raises:
        ValueError: fewer than two scores.
    """
    n = len(scores)
    if n < 2:
        raise ValueError(f"n={n} scores have no standard error; at least 2 are needed")
    stratum = np.zeros(n, np.int64) if strata is None or len(strata) != n else strata
    counts = np.bincount(stratum)
    centred = scores - (np.bincount(stratum, scores) / counts)[stratum]
    parts = np.bincount(stratum, centred**2) / (counts - 1) * counts / n**2  # of the variance, by stratum
    variance = float(parts.sum())
    degrees = variance**2 / float((parts**2 / (counts - 1)).sum()) if variance else float(n - len(counts))
    return Mean(float(scores.mean()), float(np.sqrt(variance)), degrees)


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
    mean = mean_of(scores, strata)
    if (1 - RARE) ** n <= level:
        return mean.value > student_quantile(1 - level, mean.degrees) * mean.error
    odds = np.log(2 / level)
    return bool(mean.value > np.sqrt(2 * odds) * mean.error + 7 * span * odds / (3 * (len(scores) - 1)))


def level_of_a_test(alpha: float, looks: int, rivals: int, constraints: int) -> float:
    """Return the one-sided error that each test may have, for a family-wise error of `alpha` (Bonferroni).

    The best model that keeps the constraints is eliminated wrongly only if, at some look, it seems to break a
    constraint, or a rival seems both better than it and to keep the constraints. A rival that keeps them is in truth
    not better, and of one that breaks them a constraint's test would have to fail: one error of this level for each
    rival and each constraint at each look, whatever the order of looks and however the rivals were chosen.
    """
    return alpha / (looks * max(rivals + constraints, 1))


def student_quantile(p: float, degrees: float) -> float:
    """The p-quantile of Student's t, by its expansion around the normal one (Abramowitz & Stegun 26.7.5).

    Good to three digits from 15 degrees of freedom on, for 1e-6 <= p <= 1 - 1e-6.
    """
    z, v = NormalDist().inv_cdf(p), degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


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
