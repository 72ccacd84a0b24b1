"""Paired tests: which of several models is surely worse, from scores of the same indices.

Scores are float64 [c, n]: a number for each of n indices, whose mean is a metric of which less is better, by each
of c criteria that must agree. All models draw the same indices with the same labels and noise, so they are compared
by paired differences, in which most of the noise cancels. Everything here is pure.

The Fréchet distance at few samples is biased, and not alike for all: it rewards collapse. So it decides nothing
alone below n = 16 D; there an unbiased score, the kernel distance, must agree with the bias-corrected distance.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from models.metrics import (
    MIN_CORRECTED_RATIO,
    MIN_INTERVAL_RATIO,
    Array,
    Gaussian,
    Moments,
    check_features,
    influence_scores,
    kid_scores,
)

KID_ROWS = 10_000  # rows of the reference that the kernel distance is taken to: enough, where it is quadratic in them
NUM_GROUPS = 20  # of samples, left out in turn where a metric is no mean over them
LEFT_OUT = 16  # neighbours beyond the k-th that are kept, in case that nearer ones are left out

# ------------------------------------------------------------------------------------------------ criteria


def frechet_criteria(samples: Array, reference: Array, moments: Moments | Gaussian) -> Array:
    """[c, n] what decides on the Fréchet distance of samples [n, D] to the reference [M, D] with these `moments`.

    From n = 16 D on it is the bias-corrected distance itself; below it that and the kernel distance; where n <= 2 D
    the kernel distance alone, which is unbiased at any n. The first criterion is the one to rank by.
    """
    n, dimension = samples.shape
    found = []
    if n > MIN_INTERVAL_RATIO * dimension:
        found.append(influence_scores(samples, moments))
    if n < MIN_CORRECTED_RATIO * dimension:
        found.append(kid_scores(reference[:KID_ROWS], samples))
    return np.stack(found)


def inception_criteria(probabilities: Array) -> Array:
    """[c, n] minus the Inception Score of class probabilities [n, K], over one split, freed of its bias of order K/n.

    The plug-in entropy of the mean is too small by sum_k var(p_k) / (2 n mean_k) (Miller 1955). No criterion (c = 0)
    below n = 16 K, where more bias than that remains.
    """
    check_features(probabilities)
    n, classes = probabilities.shape
    if n < MIN_CORRECTED_RATIO * classes:
        return np.empty((0, n))
    p = np.asarray(probabilities, np.float64)
    marginal = p.mean(axis=0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
    divergence = (p * np.log(ratio)).sum(axis=1)  # KL of each row: its own influence, up to a constant
    seen = marginal > 0
    bias = float((p.var(axis=0, ddof=1)[seen] / marginal[seen]).sum()) / (2 * n)
    score = np.exp(divergence.mean() + bias)
    return -score * (1 + divergence - divergence.mean())[None]


def share_criteria(hits: NDArray[np.bool_]) -> Array:
    """[1, n] minus the share of hits [n]: precision, or how many are of the class that was asked for."""
    return -hits.astype(np.float64)[None]


def recall_criteria(reference: Array, samples: Array, k: int = 3) -> Array:
    """[1, G] minus the recall of the reference [M, D] by samples [n, D], as G = 20 scores of groups of them.

    Recall is no mean over samples: each widens or narrows the balls of others too. How it varies shows when groups of
    indices are left out in turn (the jackknife, which errs on the safe side; Efron & Stein 1981). Group g is every
    index i with i mod G = g, so the groups of all models hold the same indices. No criterion (c = 0) where n < 4 G.
    """
    check_features(reference, samples)
    n = len(samples)
    if n < 4 * NUM_GROUPS:
        return np.empty((0, NUM_GROUPS))
    x, y = (torch.from_numpy(np.asarray(rows, np.float32)) for rows in (samples, reference))
    near = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(min(n - 1, k + LEFT_OUT), largest=False)
    group = torch.arange(n) % NUM_GROUPS
    radii = torch.empty(NUM_GROUPS + 1, n)  # of each sample, without each group; the last with all
    for g in range(NUM_GROUPS + 1):
        kept = (group[near.indices] != g).cumsum(1)
        radii[g] = near.values.gather(1, (kept >= k).int().argmax(1, keepdim=True))[:, 0]
        radii[g, group == g] = -1.0
    recalled = torch.zeros(NUM_GROUPS + 1, len(y), dtype=torch.bool)
    for rows in torch.arange(len(y)).split(1024):
        distances = torch.cdist(y[rows], x)
        for g in range(NUM_GROUPS + 1):
            recalled[g, rows] = (distances <= radii[g]).any(1)
    shares = recalled.double().mean(1).numpy()
    influence = (NUM_GROUPS - 1) * (shares[:-1].mean() - shares[:-1])
    return -(shares[-1] + influence)[None]


# ------------------------------------------------------------------------------------------------ decisions


@dataclass(frozen=True)
class ErrorBudget:
    """The family-wise error `alpha`, the chance of ever eliminating the best model, shared by all looks and all rivals.

    The best is wrongly stopped only if some rival seems surely better at some look. So a look at one pair may err
    with alpha / (looks x rivals), whatever the order of looks and however the rivals were chosen (Bonferroni).
    """

    alpha: float
    looks: int
    rivals: int

    @property
    def level(self) -> float:
        """The one-sided error of a look at one pair."""
        return self.alpha / (self.looks * max(self.rivals, 1))


def surely_worse(a: Array, b: Array, level: float, tolerance: float = 0.0) -> bool:
    """Whether model a is worse than b by every criterion, with one-sided error `level`.

    a, b: scores [c, n] of the same indices. With a tolerance: whether a is not better than b by more than this share
    of b's own score. Raises ValueError where indices or criteria differ.
    """
    difference, error = paired_means(a, b)
    if not len(difference):
        return False
    bound = student_quantile(1 - level, a.shape[1] - 1) * error
    return bool((difference + tolerance * np.abs(b.mean(axis=1)) > bound).all())


def standing(a: Array, b: Array) -> float:
    """By how many standard errors a is worse than b in the first criterion; 0 where there is none, or no difference."""
    difference, error = paired_means(a, b)
    if not len(difference) or difference[0] == 0:
        return 0.0
    return float(difference[0] / error[0]) if error[0] else float(np.sign(difference[0]) * np.inf)


def paired_means(a: Array, b: Array) -> tuple[Array, Array]:
    """Mean [c] of a - b for scores [c, n] of the same indices, and its standard error [c]."""
    if a.shape != b.shape:
        raise ValueError(f"paired scores must cover the same indices by the same criteria: {a.shape}, {b.shape}")
    difference = a - b
    return difference.mean(axis=1), difference.std(axis=1, ddof=1) / np.sqrt(a.shape[1])


def student_quantile(p: float, degrees: int) -> float:
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


# ------------------------------------------------------------------------------------------------ two objectives


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
