"""Statistics of features -> numbers with intervals: Frechet distance, Inception Score, kernel distance.

Everything is float64 and pure. Conventions that hold for the whole module:

- the reference set (or its published mean and covariance) is fixed; only the samples are random;
- a 95% interval holds the value that the same protocol, at the same n, gives on average over sets of n
samples;
- `*_scores` are one number for each sample whose mean is the metric and whose spread is its sampling error,
so two models run on the same indices are compared by `paired_difference` of their scores;
- nothing is bootstrapped: resampling adds the bias of these metrics a second time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
T = TypeVar("T")

BLOCK = 512  # rows: consecutive indices whose statistics are formed at once, whatever the shards are
GROUP = 32  # blocks: consecutive ones whose statistics are merged first, so that groups may be shared out
Z95 = 1.959963984540054  # 97.5% point of the standard normal
MIN_INTERVAL_RATIO = 2  # n / D at or below which the influence function of the Frechet distance is refused
MIN_SCORED = 100  # samples below which the Inception Score has no interval
MIN_CORRECTED_RATIO = 16  # n / D below which the bias correction leaves more bias than the interval is wide


@dataclass(frozen=True)
class Estimate:
    """A metric, the number of samples behind it and its 95% interval (None with a `note` where none is sound)."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    note: str = ""


def mean_estimate(scores: Array, note: str = "") -> Estimate:
    """The mean of scores [n] of independent samples with its normal interval. Raises ValueError for n < 2."""
    if scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"scores have shape {scores.shape}; an interval needs at least two of them in one axis")
    value = float(scores.mean(dtype=np.float64))
    return _interval(value, len(scores), float(scores.var(ddof=1, dtype=np.float64)) / len(scores), note)


def paired_difference(scores_a: Array, scores_b: Array) -> Estimate:
    """Metric of a minus metric of b, from the scores [n] of the same n indices in the same order.

    Common noise cancels in the differences, so this resolves far more than two separate intervals do. Raises
    ValueError where the lengths differ.
    """
    if scores_a.shape != scores_b.shape:
        raise ValueError(f"paired scores must cover the same indices: shapes {scores_a.shape}, {scores_b.shape}")
    return mean_estimate(np.asarray(scores_a, np.float64) - np.asarray(scores_b, np.float64))


def proportion_estimate(hits: NDArray[np.bool_]) -> Estimate:
    """The share of hits [n] with Wilson's score interval, which holds near 0 and 1 too (Wilson 1927)."""
    n, p = len(hits), float(hits.mean())
    centre, half = p + Z95**2 / (2 * n), Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return Estimate(p, n, min(low, p), max(high, p))  # rounding alone could leave p outside at 0 and 1


def strata_of(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the stratum [n] of each sample, numbered from 0, where the labels [n] are given and not drawn.

    A stratum is a class. Classes of one sample, within which nothing can be estimated, form one stratum together, or
    with the next smallest class where there is just one; that errs on the safe side.
    """
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    single = counts == 1
    if single.sum() == 1:
        single[np.argsort(counts, kind="stable")[:2]] = True
    return np.unique(np.where(single, -1, np.arange(len(counts)))[number], return_inverse=True)[1]


def by_class(
    metric: Callable[[Array, Array], T],
    reference: Array,
    reference_labels: NDArray[np.integer],
    samples: Array,
    sample_labels: NDArray[np.integer],
) -> dict[int, T]:
    """metric(reference rows, sample rows) within every class that both sets hold."""
    if len(reference_labels) != len(reference) or len(sample_labels) != len(samples):
        raise ValueError("labels and features must have the same number of rows in both sets")
    classes = np.intersect1d(reference_labels, sample_labels)
    return {int(c): metric(reference[reference_labels == c], samples[sample_labels == c]) for c in classes}


def _interval(value: float, n: int, variance: float, note: str = "") -> Estimate:
    half = Z95 * float(np.sqrt(variance))
    return Estimate(value, n, value - half, value + half, note)


# --- Moments ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """All that the Frechet distance asks of a set; published reference files hold just this.

    mean [D], covariance [D, D] with divisor n - 1, kept as float64. Raises ValueError on wrong shapes, values
    that are not finite and a covariance that is not symmetric.
    """

    mean: Array
    covariance: Array

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):  # published files hold float32 means
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        dimension = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if dimension < 1 or self.covariance.shape != (dimension, dimension):
            raise ValueError(
                f"mean has shape {self.mean.shape}, covariance {self.covariance.shape}; wanted [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance holds values that are not finite")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-4, atol=1e-6 * np.abs(self.covariance).max()):
            raise ValueError("covariance is not symmetric")

    @cached_property
    def principal_axes(self) -> tuple[Array, Array]:
        """Return variances [D], the largest first, and the principal directions [D, D] as columns; kept for reuse."""
        values, vectors = np.linalg.eigh(self.covariance)
        return _nonnegative(values[::-1]), vectors[:, ::-1]


@dataclass(frozen=True)
class Moments:
    """Count, mean [D] and sum of centred outer products m2 [D, D] of n feature rows, float64."""

    n: int
    mean: Array
    m2: Array

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance with divisor n - 1. Raises ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"the covariance of n={self.n} rows is not defined; at least 2 are needed")
        return Gaussian(self.mean, self.m2 / (self.n - 1))


def block_moments(features: Array, block: int = BLOCK) -> Iterator[Moments]:
    """Moments of each `block` consecutive rows of features [N, D], the last one perhaps shorter.

    Shards that are cut at multiples of `block` give the same blocks, hence the same bits. Raises ValueError
    on a wrong shape and on values that are not finite.
    """
    check_features(features)
    for start in range(0, len(features), block):
        rows = np.array(features[start : start + block], dtype=np.float64, order="C")
        mean = rows.mean(axis=0)
        centred = rows - mean
        yield Moments(len(rows), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together (Chan, Golub & LeVeque 1979); the order of the two shows in last bits."""
    n, delta = a.n + b.n, b.mean - a.mean
    m2 = a.m2 + b.m2 + np.outer(delta, delta) * (a.n * b.n / n)
    return Moments(n, a.mean + delta * (b.n / n), m2)


def merge_in_order(parts: Iterable[Moments]) -> Moments:
    """Folds moments given in index order. Raises ValueError where there is none."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else merge(total, part)
    if total is None:
        raise ValueError("no features: statistics need at least one row")
    return total


def moments(features: Array) -> Moments:
    """Moments of features [N, D]: blocks of 512 rows merged in groups of 32, and these in their order.

    Bit-equal to any sharding by whole blocks whose groups are merged so.
    """
    rows = BLOCK * GROUP
    starts = range(0, max(len(features), 1), rows)
    return merge_in_order(merge_in_order(block_moments(features[start : start + rows])) for start in starts)


def check_features(*arrays: Array) -> None:
    """Raises ValueError unless all are non-empty, finite [N, D] arrays with one D."""
    for array in arrays:
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"features have shape {array.shape}; wanted [N, D] with N, D > 0")
        if array.shape[1] != arrays[0].shape[1]:
            raise ValueError(f"features of {arrays[0].shape[1]} and {array.shape[1]} dimensions do not compare")
        if not np.isfinite(array).all():
            raise ValueError("features hold values that are not finite")


# --- Frechet distance ---------------------------------------------------------------------------------------


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), never below 0 (Heusel et al. 2017, eq. 6).

    The trace comes from the eigenvalues of L' S_a L with S_b = L L', which are real and stay meaningful where
    n < D. Raises ValueError on different dimensions and on a covariance with negative eigenvalues.
    """
    a, b = _gaussians(a, b)
    factor = _factor(b.covariance)
    return _distance(a, b, np.linalg.eigvalsh(factor.T @ a.covariance @ factor))


def frechet_distance_of_rows(a: Array, b: Array) -> float:
    """The Frechet distance of two small sets of rows [n, D] and [m, D], of at least two rows each.

    With centred rows A / sqrt(n - 1) and B / sqrt(m - 1), tr (S_a S_b)^(1/2) is the sum of the singular values
    of A B', which costs n m min(n, m) in place of D^3. Raises ValueError for fewer than two rows.
    """
    check_features(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} rows have no covariance; at least 2 are needed")
    means = [x.mean(axis=0, dtype=np.float64) for x in (a, b)]
    rows = [(x - mean) / np.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True)]
    overlap = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    delta = means[0] - means[1]
    return max(float(delta @ delta + sum(np.square(r).sum() for r in rows) - 2 * overlap), 0.0)


def _gaussians(a: Moments | Gaussian, b: Moments | Gaussian) -> tuple[Gaussian, Gaussian]:
    a, b = (s.gaussian if isinstance(s, Moments) else s for s in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"sets of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
    return a, b


def _distance(a: Gaussian, b: Gaussian, eigenvalues: Array) -> float:
    overlap = np.sqrt(_nonnegative(eigenvalues)).sum()
    delta = a.mean - b.mean
    return max(float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap), 0.0)


def check_semidefinite(statistics: Gaussian) -> None:
    """Raises ValueError where the covariance has an eigenvalue that is negative beyond rounding."""
    _nonnegative(np.linalg.eigvalsh(statistics.covariance))


def _factor(covariance: Array) -> Array:
    """L with L L' = covariance: Cholesky, or the symmetric root where the covariance is singular."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return (vectors * np.sqrt(_nonnegative(values))) @ vectors.T


def _nonnegative(eigenvalues: Array) -> Array:
    """Clips rounding below zero; a truly negative eigenvalue is an error, since no root is meant then."""
    largest = max(float(np.abs(eigenvalues).max()), np.finfo(np.float64).tiny)
    smallest = float(eigenvalues.min())
    if smallest < -1e-5 * largest:
        raise ValueError(f"covariance is not positive semi-definite: eigenvalues {smallest:.3g} to {largest:.3g}")
    return eigenvalues.clip(0)


@dataclass(frozen=True)
class FrechetExpansion:
    """A Frechet distance to a fixed reference, expanded to second order around the samples' distribution."""

    distance: float  # as everybody reports it, biased upwards at small n
    bias: float  # its excess over the distance at infinite n, to order 1/n
    influence: Array  # [n] first-order influence of each sample, mean 0
    dimension: int

    @property
    def variance(self) -> float:
        """Of the distance over sets of n; up to twice too large for a perfect model, whose influence is all noise."""
        return float(self.influence.var(ddof=1)) / len(self.influence)

    @property
    def estimate(self) -> Estimate:
        """The plain distance; its interval holds what n samples of this model give on average."""
        n, fewest = len(self.influence), MIN_CORRECTED_RATIO * self.dimension
        note = f"biased upwards: n={n} is below {MIN_CORRECTED_RATIO} D, D={self.dimension}" if n < fewest else ""
        return _interval(self.distance, n, self.variance, note)

    @property
    def corrected(self) -> Estimate:
        """FD-infinity: the distance at infinite n; below n = 16 D, where bias of order (D/n)^2 remains, no interval.

        Chong & Forsyth (2020) fit it from distances of subsets; the same 1/n term computed has no noise of its own.
        """
        n, value = len(self.influence), self.distance - self.bias
        if n >= MIN_CORRECTED_RATIO * self.dimension:
            return _interval(value, n, self.variance)
        return Estimate(value, n, note=f"no interval: n={n} is below {MIN_CORRECTED_RATIO} D, D={self.dimension}")

    @property
    def scores(self) -> Array:
        """[n] numbers whose mean is the corrected distance: what paired comparisons of two models take."""
        return self.influence + (self.distance - self.bias)


def expand_frechet(
    features: Array, reference: Moments | Gaussian, strata: NDArray[np.integer] | None = None
) -> FrechetExpansion:
    """Distance of features [n, D] to a fixed reference (mean m_r, covariance R), its bias and sampling error.

    strata: [n] as `strata_of` returns them, where the number of samples of each class is given and not drawn: then the
    variation between classes is no part of the bias.

    With T the symmetric transport map from S to R, the influence of a sample is s(x) = 2 (m - m_r)'(x - m) +
    (x - m)'(I - T)(x - m) - tr((I - T) S); its spread gives the standard error. The second derivative gives
    the bias: in the eigenbasis of L' S L with R = L L' a change E costs
    sum_ij E_ij^2 / (2 sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j))), and the mean of E_ij^2 is known from the samples.
    Raises ValueError where n <= 2 D.
    """
    check_features(features)
    n, dimension = features.shape
    if n <= MIN_INTERVAL_RATIO * dimension:
        raise ValueError(f"n={n} samples, D={dimension}: an influence function needs n > {MIN_INTERVAL_RATIO} D")
    own, target = _gaussians(moments(features), reference)
    factor = _factor(target.covariance)
    values, vectors = np.linalg.eigh(factor.T @ own.covariance @ factor)
    distance = _distance(own, target, values)
    keep = values > dimension * np.finfo(np.float64).eps * values.max()  # elsewhere neither S nor T moves
    values, basis = values[keep], factor @ vectors[:, keep]
    roots = np.sqrt(values)
    curvature = 1 / (np.outer(roots, roots) * (roots[:, None] + roots))

    influence, fourth = np.empty(n), np.zeros_like(curvature)
    for start in range(0, n, 8 * BLOCK):
        centred = features[start : start + 8 * BLOCK] - own.mean
        squares = (centred @ basis) ** 2
        influence[start : start + len(centred)] = (
            2 * centred @ (own.mean - target.mean) + (centred**2).sum(1) - squares @ (1 / roots)
        )
        fourth += squares.T @ squares
    influence -= influence.mean()
    fourth = fourth / n - np.diag(values**2)
    bias = (np.trace(own.covariance) + 0.5 * float((curvature * fourth).sum())) / n
    if strata is not None:
        bias -= _certain(features - own.mean, basis, roots, curvature, strata) / n
    return FrechetExpansion(distance, float(bias), influence, dimension)


def _certain(centred: Array, basis: Array, roots: Array, curvature: Array, strata: NDArray[np.integer]) -> float:
    """n times the bias that is not there where the number of samples of each class is given.

    With B the covariance of the class means, n B / (n - 1) is in the sample covariance without error, and the products
    E_ij vary about their class means alone. So the bias is smaller by the trace of T B, and by the squares of these
    class means in place of their variances.
    """
    n, order = len(centred), np.argsort(strata, kind="stable")
    ends = np.flatnonzero(np.diff(strata[order])) + 1
    means, products = np.zeros(len(roots)), -np.diag(roots**4)  # of B in the eigenbasis; of E_ij
    for rows in np.split(centred[order], ends):
        count, z = len(rows), rows @ basis
        mean, second, fourth = z.mean(axis=0), z.T @ z / count, (z**2).T @ z**2 / count
        means += count / n * (mean**2 - (np.diag(second) - mean**2) / (count - 1))
        products += count / n * (second**2 - (fourth - second**2) / (count - 1))
    return float(means @ (1 / roots) + 0.5 * (curvature * products).sum())


def influence_scores(features: Array, reference: Moments | Gaussian) -> Array:
    """[n] scores with the bias-corrected Frechet distance as their mean; raises as `expand_frechet` does."""
    return expand_frechet(features, reference).scores


def frechet_estimate(features: Array, reference: Moments | Gaussian) -> Estimate:
    """Frechet distance of features [n, D] with its interval, or with none and a note where n <= 2 D."""
    n, dimension = features.shape
    if n > MIN_INTERVAL_RATIO * dimension:
        return expand_frechet(features, reference).estimate
    note = f"no interval: n={n} is not above {MIN_INTERVAL_RATIO} D, D={dimension}"
    return Estimate(frechet_distance(moments(features), reference), n, note=note)


def class_frechet_estimate(reference: Array, features: Array) -> Estimate:
    """Frechet distance of the rows of one class, which may be fewer than their dimensions: then without an interval."""
    n, dimension = features.shape
    if n > MIN_INTERVAL_RATIO * dimension and len(reference) > dimension:
        return frechet_estimate(features, moments(reference))
    note = f"no interval, and biased upwards: n={n} and {len(reference)} references in D={dimension}"
    return Estimate(frechet_distance_of_rows(reference, features), n, note=note)


# --- Inception Score ----------------------------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    """Class probabilities [N, K] in float64 of logits [N, K]."""
    shifted = np.asarray(logits, np.float64)
    exponentials = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def inception_score(probabilities: Array, split_size: int = 5000) -> Estimate:
    """exp of the mean KL(p(y|x) || p(y)), averaged over splits as by ADM's evaluator (Salimans et al. 2016).

    probabilities [N, K] in sample order: consecutive splits of `split_size` rows, a short last one weighing
    as much as the others. Samples sorted by class would lower it. 0 log 0 counts as 0.
    """
    starts = np.arange(0, len(probabilities), split_size)
    return _mean_of_splits(probabilities, np.append(starts, len(probabilities)))


def inception_score_10split(probabilities: Array, num_splits: int = 10, shuffle_seed: int | None = 2020) -> Estimate:
    """The same over `num_splits` equal parts, by default of rows shuffled as torch-fidelity shuffles them."""
    n = len(probabilities)
    if n < num_splits:
        raise ValueError(f"n={n} samples cannot be cut into num_splits={num_splits}")
    if shuffle_seed is not None:  # numpy's old generator, since the published protocol is defined by it
        probabilities = probabilities[np.random.RandomState(shuffle_seed).permutation(n)]
    return _mean_of_splits(probabilities, np.arange(num_splits + 1) * n // num_splits)


def split_scores(probabilities: Array, bounds: NDArray[np.integer]) -> tuple[Array, Array]:
    """Inception Score [S] of the consecutive rows between `bounds` [S + 1], and the variance [S] of each.

    Raises ValueError where rows are not probabilities.
    """
    check_features(probabilities)
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(1), 1, atol=1e-4):
        raise ValueError("probabilities must be at least 0 and sum to 1 in each row; pass logits through softmax")
    scores, variances = np.empty(len(bounds) - 1), np.empty(len(bounds) - 1)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        p = np.asarray(probabilities[start:stop], np.float64)
        ratio = np.divide(p, p.mean(axis=0), out=np.ones_like(p), where=p > 0)
        divergence = (p * np.log(ratio)).sum(axis=1)  # KL of each row: its own influence, up to a constant
        scores[i] = np.exp(divergence.mean())
        variances[i] = scores[i] ** 2 * divergence.var() / len(p)
    return scores, variances


def _mean_of_splits(probabilities: Array, bounds: NDArray[np.integer]) -> Estimate:
    scores, variances = split_scores(probabilities, bounds)
    if (n := len(probabilities)) < MIN_SCORED:
        return Estimate(float(scores.mean()), n, note=f"no interval: n={n} is below {MIN_SCORED}")
    return _interval(float(scores.mean()), len(probabilities), float(variances.sum()) / len(scores) ** 2)


# --- Kernel distance ----------------------------------------------------------------------------------------


def kid(reference: Array, samples: Array) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 over the full sets (Binkowski et al. 2018, eq. 4).

    No subsets, hence no subset noise. It is unbiased at any n, so it can be slightly negative.
    """
    return mean_estimate(kid_scores(reference, samples))


def kid_scores(reference: Array, samples: Array) -> Array:
    """[n] scores of the samples with `kid` as their mean: the projection of the U-statistic on each sample.

    Raises ValueError on unlike or invalid sets and on fewer than two rows.
    """
    check_features(reference, samples)
    n, m = len(samples), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"the unbiased kernel distance needs two rows of each set; got {n} samples, {m} references")
    within = sum(polynomial_kernel(r, reference).sum() - _kernel_diagonal(r).sum() for r in _row_blocks(reference))
    across = np.concatenate([polynomial_kernel(r, reference).mean(axis=1) for r in _row_blocks(samples)])
    own = [(polynomial_kernel(r, samples).sum(axis=1) - _kernel_diagonal(r)) / (n - 1) for r in _row_blocks(samples)]
    witness = np.concatenate(own) - across
    value = witness.mean() - across.mean() + within / (m * (m - 1))
    return value + 2 * (witness - witness.mean())


def _row_blocks(features: Array) -> Iterator[Array]:
    for start in range(0, len(features), BLOCK):
        yield np.asarray(features[start : start + BLOCK], np.float64)


def polynomial_kernel(x: Array, y: Array) -> Array:
    """(x.y / D + 1)^3 of all pairs of rows, float64."""
    linear = np.asarray(x, np.float64) @ np.asarray(y, np.float64).T / x.shape[1] + 1
    return linear * linear * linear


def _kernel_diagonal(x: Array) -> Array:
    return ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3


def vendi_score(samples: Array) -> float:
    """Effective number of distinct samples: exp of the cosine kernel's entropy (Friedman & Dieng 2023, q = 1)."""
    check_features(samples)
    unit = np.asarray(samples, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit.T @ unit / len(unit))
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))
