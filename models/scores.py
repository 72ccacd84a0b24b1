"""Scores of samples for paired comparisons: their mean is a bias-corrected metric, and less is better.

Models that draw the same indices with the same labels and noise are compared by the paired differences of their scores
(`models.paired_tests`), so every function here takes the samples in the order of their indices. A function returns an
empty array if n is so small that the remaining bias could decide the comparison. Everything is float64 and pure.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from models.metrics import (
    MIN_CORRECTED_RATIO,
    Array,
    FrechetExpansion,
    Gaussian,
    Moments,
    Strata,
    check_features,
    entropy_bias,
    expand_frechet,
    split_scores,
)

SAMPLES_PER_DIRECTION = 4  # n / d; with fewer, the remaining bias differs between models
NUM_GROUPS = 20  # groups of samples that the jackknife leaves out in turn
EXTRA_NEIGHBOURS = 16  # beyond the k-th; they replace nearer ones that the jackknife leaves out


def expand_leading_frechet(samples: Array, reference: Moments | Gaussian, strata: Strata = None) -> FrechetExpansion:
    """Return the Fréchet distance of samples [n, D] in the reference's first d = min(D, n / 4) principal directions.

    In all D directions, the corrected distance of fewer than about 16 D samples has a bias that differs between models
    and favours those with too little variance. In the directions of the reference's largest variances, the correction
    is valid at any n. From n = 4 D on, this is the distance in all directions, which has bias of order (D/n)^2 below
    n = 16 D. A Fréchet distance never decreases when directions are added, so this one is at most that in all
    directions.

    The eigenvectors of the reference's covariance cost 9 D^3 operations once. Each set of samples costs n D d + d^3.

    Raises:
        ValueError: the dimensions differ, or a value is not finite.
    """
    check_features(samples)
    gaussian = reference.gaussian if isinstance(reference, Moments) else reference
    n, dimension = samples.shape
    if dimension != len(gaussian.mean):
        raise ValueError(f"samples have {dimension} dimensions, but the reference has {len(gaussian.mean)}")
    directions = max(1, min(dimension, n // SAMPLES_PER_DIRECTION))
    if directions == dimension:
        return expand_frechet(samples, reference, strata)
    variances, axes = gaussian.principal_axes
    projected = (samples - gaussian.mean) @ axes[:, :directions]
    return expand_frechet(projected, Gaussian(np.zeros(directions), np.diag(variances[:directions])), strata)


def frechet_scores(samples: Array, reference: Moments | Gaussian, strata: Strata = None) -> Array:
    """Return [n] scores whose mean is the bias-corrected distance of `expand_leading_frechet`."""
    return expand_leading_frechet(samples, reference, strata).scores


def inception_scores(probabilities: Array) -> Array:
    """Return [n] scores whose mean is minus the Inception Score of one split, corrected for bias.

    The correction for class probabilities [n, K] is `entropy_bias`, of order K/n. There are no scores below n = 16 K,
    where more bias remains.
    """
    n, classes = probabilities.shape
    if n < MIN_CORRECTED_RATIO * classes:
        return np.empty(0)
    _, divergences = split_scores(probabilities, np.array([0, n]))
    score = np.exp(divergences.mean() + entropy_bias(probabilities))
    return -score * (1 + divergences - divergences.mean())


def share_scores(hits: NDArray[np.bool_]) -> Array:
    """Return [n] scores whose mean is minus the share of hits [n], which is a precision or an accuracy."""
    return -hits.astype(np.float64)


def recall_scores(reference: Array, samples: Array, k: int = 3) -> Array:
    """Return [G] scores whose mean is minus the recall of the reference [M, D] by samples [n, D], for G = 20 groups.

    Recall is not a mean over samples, because each sample also changes the balls of others. Therefore the scores are
    those of the jackknife, which leaves out groups of indices in turn and is conservative (Efron & Stein 1981). Group g
    consists of the indices i with i mod G = g, so the groups of all models have the same indices. There are no scores
    for n < 4 G.
    """
    check_features(reference, samples)
    n = len(samples)
    if n < 4 * NUM_GROUPS:
        return np.empty(0)
    x, y = (torch.from_numpy(np.asarray(rows, np.float32)) for rows in (samples, reference))
    neighbours = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(min(n - 1, k + EXTRA_NEIGHBOURS), largest=False)
    group = torch.arange(n) % NUM_GROUPS
    radii = torch.empty(NUM_GROUPS + 1, n)  # row g: of each sample's ball without group g; last row: with all groups
    for g in range(NUM_GROUPS + 1):
        num_remaining = (group[neighbours.indices] != g).cumsum(1)
        radii[g] = neighbours.values.gather(1, (num_remaining >= k).int().argmax(1, keepdim=True))[:, 0]
        radii[g, group == g] = -1.0  # samples of group g have no ball
    recalled = torch.zeros(NUM_GROUPS + 1, len(y), dtype=torch.bool)
    for rows in torch.arange(len(y)).split(1024):
        distances = torch.cdist(y[rows], x)
        for g in range(NUM_GROUPS + 1):
            recalled[g, rows] = (distances <= radii[g]).any(1)
    shares = recalled.double().mean(1).numpy()
    influence = (NUM_GROUPS - 1) * (shares[:-1].mean() - shares[:-1])
    return -(shares[-1] + influence)
