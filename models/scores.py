"""Scores of samples: a number for each of n indices, whose mean is a metric freed of its bias; less is better.

Models that draw the same indices with the same labels and noise are compared by the paired differences of their scores
(`models.paired_tests`), so every function here takes the samples in the order of their indices. A function returns no
scores, an empty array, where n is so small that the bias left in it would decide. Everything is float64 and pure.
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
    expand_frechet,
)

SAMPLES_PER_DIRECTION = 4  # n / d: fewer, and the bias correction leaves bias that differs between models
NUM_GROUPS = 20  # of samples, left out in turn where a metric is no mean over them
LEFT_OUT = 16  # neighbours beyond the k-th that are kept, in case that nearer ones are left out


def num_directions(n: int, dimension: int) -> int:
    """Return d = min(D, n / 4): in how many principal directions of the reference n samples are compared with it."""
    return max(1, min(dimension, n // SAMPLES_PER_DIRECTION))


def expand_leading_frechet(samples: Array, reference: Moments | Gaussian, strata: Strata = None) -> FrechetExpansion:
    """Return the Fréchet distance of samples [n, D] in the reference's first d = min(D, n / 4) principal directions.

    In all D directions n samples below about 16 D leave bias that differs between models: it rewards lost spread. In
    the directions of the reference's largest variances the correction holds at any n, and no model is favoured. From
    n = 4 D on this is the distance in all directions, but its value still has bias of order (D/n)^2 below n = 16 D.
    A Fréchet distance never falls when directions are added, so that the one here is at most that in all directions.

    The eigenvectors of the reference's covariance cost 9 D^3 operations once, and each set of samples n D d + d^3.

    Raises:
        ValueError: shapes differ, or features are not finite.
    """
    check_features(samples)
    gaussian = reference.gaussian if isinstance(reference, Moments) else reference
    n, dimension = samples.shape
    if dimension != len(gaussian.mean):
        raise ValueError(f"samples have {dimension} dimensions, and the reference has {len(gaussian.mean)}")
    directions = num_directions(n, dimension)
    if directions == dimension:
        return expand_frechet(samples, reference, strata)
    variances, axes = gaussian.principal_axes
    projected = (samples - gaussian.mean) @ axes[:, :directions]
    return expand_frechet(projected, Gaussian(np.zeros(directions), np.diag(variances[:directions])), strata)


def frechet_scores(samples: Array, reference: Moments | Gaussian, strata: Strata = None) -> Array:
    """Return [n] scores whose mean is the bias-corrected distance of `expand_leading_frechet`."""
    return expand_leading_frechet(samples, reference, strata).scores


def inception_scores(probabilities: Array) -> Array:
    """Return [n] minus the Inception Score of class probabilities [n, K], over one split, freed of bias of order K/n.

    The plug-in entropy of the mean is too small by sum_k var(p_k) / (2 n mean_k) (Miller 1955). No scores below
    n = 16 K, where more bias than that remains.
    """
    check_features(probabilities)
    n, classes = probabilities.shape
    if n < MIN_CORRECTED_RATIO * classes:
        return np.empty(0)
    p = np.asarray(probabilities, np.float64)
    marginal = p.mean(axis=0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)
    divergence = (p * np.log(ratio)).sum(axis=1)  # KL of each row: its own influence, up to a constant
    seen = marginal > 0
    bias = float((p.var(axis=0, ddof=1)[seen] / marginal[seen]).sum()) / (2 * n)
    score = np.exp(divergence.mean() + bias)
    return -score * (1 + divergence - divergence.mean())


def share_scores(hits: NDArray[np.bool_]) -> Array:
    """Return [n] minus the share of hits [n]: precision, or how many are of the class that was asked for."""
    return -hits.astype(np.float64)


def recall_scores(reference: Array, samples: Array, k: int = 3) -> Array:
    """Return [G] minus the recall of the reference [M, D] by samples [n, D], as G = 20 scores of groups of them.

    Recall is no mean over samples: each widens or narrows the balls of others too. How it varies shows when groups of
    indices are left out in turn (the jackknife, which errs on the safe side; Efron & Stein 1981). Group g is every
    index i with i mod G = g, so the groups of all models hold the same indices. No scores where n < 4 G.
    """
    check_features(reference, samples)
    n = len(samples)
    if n < 4 * NUM_GROUPS:
        return np.empty(0)
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
    return -(shares[-1] + influence)
