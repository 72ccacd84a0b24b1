"""Fréchet distance, Inception Score, kernel distances and Vendi score of features, with 95% intervals.

All functions are pure and compute in float64. Conventions of the whole module:

- The reference set (or its published mean and covariance) is fixed. Only the samples are random.
- A 95% interval covers the average of the metric over sets of n samples. The interval of a bias-corrected value covers
  the value at infinite n.
- `strata` are the samples' labels if the number of samples in each class is fixed. Then only the variance within each
  class counts as sampling error.
- `*_scores` return one number for each sample. Their mean is the metric and their variance gives its sampling error. So
  models that draw the same indices are compared by the differences of their scores (`models.paired_tests`).
- Nothing is bootstrapped, because resampling adds the bias of these metrics a second time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Strata = NDArray[np.integer] | None  # [n] classes with fixed counts; None = the samples are drawn independently
T = TypeVar("T")

BLOCK = 512  # consecutive rows whose statistics are computed together, for any size of the shards
GROUP = 32  # consecutive blocks whose statistics are merged first, so that each worker can compute some groups
Z95 = 1.959963984540054  # 97.5% point of the standard normal
MIN_INTERVAL_RATIO = 2  # n / D; the influence function of the Fréchet distance needs a larger ratio
MIN_SCORED = 100  # samples; an Inception Score of fewer has no interval
MIN_CORRECTED_RATIO = 16  # n / D; below it the remaining bias can exceed the width of the interval
FAR_FROM_ORIGIN = 100  # |mean|^2 / variance; above it the kernel distance has a note
HEAVY_TAIL = 0.5  # share of the variance in 1% of the samples; above it a note says that the interval may be too short


@dataclass(frozen=True)
class Estimate:
    """A metric, its number of samples and its 95% interval; without an interval, `note` says why."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    note: str = ""
    n_reference: int | None = None  # number of reference rows; None = the metric uses none, or the number is unknown
    bias: float | None = None  # bias of the value at this n; None = unknown

    def with_notes(self, *notes: str) -> "Estimate":
        """Return this estimate with additional notes; empty notes are ignored."""
        return replace(self, note="; ".join(note for note in (self.note, *notes) if note))


def mean_variance(scores: Array, strata: Strata = None) -> tuple[Array, int]:
    """Return the variance of the mean of scores [n, ...] over the n samples, and its degrees of freedom.

    With strata it is the sum over classes of w_k^2 s_k^2 / n_k, where w_k = n_k / n. If a class has a single sample,
    the variance within it cannot be estimated. Then all samples are treated as independent, which is conservative.
    """
    n = len(scores)
    if strata is not None:
        order = np.argsort(strata, kind="stable")
        _, starts, counts = np.unique(strata[order], return_index=True, return_counts=True)
        if counts.min() > 1:
            by_class = scores[order]
            sizes = counts.reshape(-1, *[1] * (scores.ndim - 1))
            residuals = by_class - np.repeat(np.add.reduceat(by_class, starts) / sizes, counts, axis=0)
            variances = np.add.reduceat(residuals**2, starts) / (sizes - 1)
            return (sizes * variances).sum(axis=0) / n**2, n - len(counts)
    return scores.var(axis=0, ddof=1, dtype=np.float64) / n, n - 1


def mean_estimate(scores: Array, note: str = "", strata: Strata = None) -> Estimate:
    """Return the mean of scores [n] with Student's interval; ValueError for fewer than 2 scores."""
    if scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"scores have shape {scores.shape}; expected [n] with n of at least 2")
    return score_estimate(float(scores.mean(dtype=np.float64)), scores, strata, note)


def score_estimate(value: float, scores: Array, strata: Strata = None, note: str = "") -> Estimate:
    """Return the estimate of a value that is not the mean of scores [n], but has the sampling error of that mean."""
    return _interval(value, len(scores), *mean_variance(scores, strata), note)


def proportion_estimate(hits: NDArray[np.bool_], strata: Strata = None) -> Estimate:
    """Return the share of hits [n] with Wilson's score interval, which is valid near 0 and 1 too (Wilson 1927).

    With strata it is the interval for the effective sample size: the number of independent samples whose share would
    have the same variance.
    """
    n, p = len(hits), float(hits.mean())
    size = float(n)
    if strata is not None and 0 < p < 1:
        variance = float(mean_variance(hits.astype(np.float64), strata)[0])
        if variance > 0:
            size = max(p * (1 - p) / variance, size)
    centre = p + Z95**2 / (2 * size)
    half = Z95 * np.sqrt(p * (1 - p) / size + Z95**2 / (4 * size**2))
    scale = 1 + Z95**2 / size
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return Estimate(p, n, min(low, p), max(high, p))  # if p is 0 or 1, rounding could leave it outside


def by_class(
    metric: Callable[[Array, Array], T],
    reference: Array,
    reference_labels: NDArray[np.integer],
    samples: Array,
    sample_labels: NDArray[np.integer],
) -> dict[int, T]:
    """Return metric(reference rows, sample rows) of each class that both sets contain."""
    if len(reference_labels) != len(reference) or len(sample_labels) != len(samples):
        raise ValueError("labels and features must have the same number of rows in each set")
    classes = np.intersect1d(reference_labels, sample_labels)
    return {int(c): metric(reference[reference_labels == c], samples[sample_labels == c]) for c in classes}


def student_quantile(p: float, degrees: int) -> float:
    """Return the p-quantile of Student's t, exact for 1 and 2 degrees of freedom, otherwise to three digits.

    It uses the expansion around the normal quantile of Abramowitz & Stegun 26.7.5, for 1e-6 <= p <= 1 - 1e-6.
    """
    if degrees == 1:
        return float(np.tan(np.pi * (p - 0.5)))
    if degrees == 2:
        return float((2 * p - 1) / np.sqrt(2 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def _interval(value: float, n: int, variance: Array | float, degrees: int, note: str = "") -> Estimate:
    half = student_quantile(0.975, degrees) * float(np.sqrt(variance))
    return Estimate(value, n, value - half, value + half, note)


# --- Moments ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """The statistics of the Fréchet distance, which published reference files contain, in float64.

    Raises:
        ValueError: a shape is wrong, a value is not finite, or the covariance is not symmetric.
    """

    mean: Array  # [D]
    covariance: Array  # [D, D], with divisor n - 1

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):  # published files hold float32 means
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        dimension = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if dimension < 1 or self.covariance.shape != (dimension, dimension):
            raise ValueError(
                f"mean has shape {self.mean.shape}, covariance {self.covariance.shape}; expected [D] and [D, D]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance is not finite: it contains NaN or infinity")
        if not np.allclose(self.covariance, self.covariance.T, rtol=1e-4, atol=1e-6 * np.abs(self.covariance).max()):
            raise ValueError("covariance is not symmetric")

    @cached_property
    def principal_axes(self) -> tuple[Array, Array]:
        """Return variances [D], largest first, and the principal directions as columns [D, D]."""
        values, vectors = np.linalg.eigh(self.covariance)
        return _nonnegative(values[::-1]), vectors[:, ::-1]


@dataclass(frozen=True)
class Moments:
    """Number n of rows, their mean [D] and the sum m2 [D, D] of the outer products of centred rows, float64."""

    n: int
    mean: Array
    m2: Array

    @cached_property
    def gaussian(self) -> Gaussian:
        """Return mean and covariance with divisor n - 1; ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"the covariance of n={self.n} rows is not defined; at least 2 are needed")
        return Gaussian(self.mean, self.m2 / (self.n - 1))


def block_moments(features: Array) -> Iterator[Moments]:
    """Yield the moments of each 512 consecutive rows of features [N, D]; the last block can be shorter.

    Shards that are cut at multiples of 512 give the same blocks, and therefore the same bits.

    Raises:
        ValueError: the shape is wrong, or a value is not finite.
    """
    check_features(features)
    for start in range(0, len(features), BLOCK):
        rows = np.array(features[start : start + BLOCK], dtype=np.float64, order="C")
        mean = rows.mean(axis=0)
        centred = rows - mean
        yield Moments(len(rows), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two sets (Chan, Golub & LeVeque 1979); their order affects the last bits."""
    n, delta = a.n + b.n, b.mean - a.mean
    m2 = a.m2 + b.m2 + np.outer(delta, delta) * (a.n * b.n / n)
    return Moments(n, a.mean + delta * (b.n / n), m2)


def merge_in_order(parts: Iterable[Moments]) -> Moments:
    """Merge moments in the order given; ValueError if there are none."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else merge(total, part)
    if total is None:
        raise ValueError("no features: statistics need at least one row")
    return total


def moments(features: Array) -> Moments:
    """Return the moments of features [N, D].

    Blocks of 512 rows are merged in groups of 32, and then the groups are merged in order. Therefore workers that
    compute whole groups get the same bits.
    """
    rows = BLOCK * GROUP
    starts = range(0, max(len(features), 1), rows)
    return merge_in_order(merge_in_order(block_moments(features[start : start + rows])) for start in starts)


def check_features(*arrays: Array) -> None:
    """Raise ValueError unless all arrays are non-empty, finite and [N, D] with the same D."""
    for array in arrays:
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"features have shape {array.shape}; expected [N, D] with N, D > 0")
        if array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"features with {arrays[0].shape[1]} and {array.shape[1]} dimensions cannot be compared; both sets "
                "must come from the same extractor"
            )
        if not np.isfinite(array).all():
            raise ValueError("features contain NaN or infinity")


# --- Fréchet distance ---------------------------------------------------------------------------------------


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """Return |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), at least 0 (Heusel et al. 2017, eq. 6).

    The last trace is the sum of the square roots of the eigenvalues of L' S_a L, where S_b = L L'. They are real, and
    also valid for n < D.

    Raises:
        ValueError: the dimensions differ, or a covariance has negative eigenvalues.
    """
    a, b = _to_gaussians(a, b)
    factor = _factor(b.covariance)
    return _distance(a, b, np.linalg.eigvalsh(factor.T @ a.covariance @ factor))


def frechet_distance_of_rows(a: Array, b: Array) -> float:
    """Return the Fréchet distance of two small sets of rows [n, D] and [m, D].

    Let A and B be the centred rows divided by sqrt(n - 1) and sqrt(m - 1). Then tr (S_a S_b)^(1/2) is the sum of the
    singular values of A B', which costs n m min(n, m) operations instead of D^3.

    Raises:
        ValueError: a set has fewer than two rows.
    """
    check_features(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"sets of {len(a)} and {len(b)} rows have no covariance; at least 2 are needed")
    means = [x.mean(axis=0, dtype=np.float64) for x in (a, b)]
    scaled = [(x - mean) / np.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True)]
    root_trace = np.linalg.svd(scaled[0] @ scaled[1].T, compute_uv=False).sum()
    delta = means[0] - means[1]
    return max(float(delta @ delta + sum(np.square(rows).sum() for rows in scaled) - 2 * root_trace), 0.0)


def _to_gaussians(a: Moments | Gaussian, b: Moments | Gaussian) -> tuple[Gaussian, Gaussian]:
    """Return mean and covariance of both sets; ValueError if their dimensions differ."""
    a, b = (statistics.gaussian if isinstance(statistics, Moments) else statistics for statistics in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"sets of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared")
    return a, b


def _distance(a: Gaussian, b: Gaussian, eigenvalues: Array) -> float:
    """Return the Fréchet distance from the eigenvalues of L' S_a L, where S_b = L L'."""
    root_trace = np.sqrt(_nonnegative(eigenvalues)).sum()
    delta = a.mean - b.mean
    return max(float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace), 0.0)


def check_semidefinite(statistics: Gaussian) -> None:
    """Raise ValueError if the covariance has a negative eigenvalue that is not a rounding error."""
    _nonnegative(np.linalg.eigvalsh(statistics.covariance))


def _factor(covariance: Array) -> Array:
    """Return L with L L' = covariance: the Cholesky factor, or the symmetric root if the covariance is singular."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return (vectors * np.sqrt(_nonnegative(values))) @ vectors.T


def _nonnegative(eigenvalues: Array) -> Array:
    """Replace eigenvalues that rounding made negative by 0; ValueError for others that are negative."""
    largest = max(float(np.abs(eigenvalues).max()), np.finfo(np.float64).tiny)
    smallest = float(eigenvalues.min())
    if smallest < -1e-5 * largest:
        raise ValueError(f"covariance is not positive semi-definite: eigenvalues {smallest:.3g} to {largest:.3g}")
    return eigenvalues.clip(0)


@dataclass(frozen=True)
class FrechetExpansion:
    """A Fréchet distance to a fixed reference, expanded to second order around the samples' distribution."""

    distance: float  # the usual distance, biased upwards at small n
    bias: float  # of the distance at this n, to order 1/n
    influence: Array  # [n] first-order influence of each sample, mean 0
    dimension: int
    strata: Strata = None
    n_reference: int | None = None
    reference_bias: float = 0.0  # distance of a perfect model at infinite n, because the reference is finite

    @property
    def estimate(self) -> Estimate:
        """Return the biased distance; its interval covers the average over sets of n samples of this model."""
        n, note = len(self.influence), ""
        if n < MIN_CORRECTED_RATIO * self.dimension:
            note = f"biased upwards: n={n} is below {MIN_CORRECTED_RATIO} D, D={self.dimension}"
        return self._with_notes(score_estimate(self.distance, self.influence, self.strata, note), self.bias)

    @property
    def corrected(self) -> Estimate:
        """Return FD-infinity, the distance at infinite n.

        Chong & Forsyth (2020) fit the 1/n term to distances of subsets. This computes the term from the samples, which
        adds no noise. Below n = 16 D there is no interval, because bias of order (D/n)^2 remains.
        """
        n, value = len(self.influence), self.distance - self.bias
        if n >= MIN_CORRECTED_RATIO * self.dimension:
            estimate = score_estimate(value, self.influence, self.strata)
        else:
            note = f"no interval: n={n} is below {MIN_CORRECTED_RATIO} D, D={self.dimension}"
            estimate = Estimate(value, n, note=note)
        negative = f"the estimate is {value:.3g}; it is set to 0, because no distance is negative" if value < 0 else ""
        return replace(self._with_notes(estimate), value=max(value, 0.0)).with_notes(negative)

    @property
    def scores(self) -> Array:
        """Return [n] scores for paired comparisons; their mean is the corrected distance."""
        return self.influence + (self.distance - self.bias)

    @property
    def tail_share(self) -> float:
        """Return the share of the variance of the influence that the most influential 1% of samples carry."""
        squares = np.sort(self.influence**2)
        return float(squares[-max(1, len(squares) // 100) :].sum() / max(squares.sum(), np.finfo(np.float64).tiny))

    def _with_notes(self, estimate: Estimate, bias: float | None = None) -> Estimate:
        """Return the estimate with an interval of at least 0, and with notes on heavy tails and a small reference."""
        notes = []
        if estimate.low is not None and estimate.high is not None:
            if self.tail_share > HEAVY_TAIL:
                notes.append(
                    f"heavy tails: 1% of the samples carry {100 * self.tail_share:.0f}% of the variance, so the "
                    "interval may be too short"
                )
            has_few_rows = (self.n_reference or np.inf) < MIN_CORRECTED_RATIO * self.dimension
            if has_few_rows or self.reference_bias > (estimate.high - estimate.low) / 4:
                notes.append(
                    f"a perfect model would score about {self.reference_bias:.2g} instead of 0, because the reference "
                    f"has only {self.n_reference:,} rows"
                )
            estimate = replace(estimate, low=max(estimate.low, 0.0), high=max(estimate.high, 0.0))
        return replace(estimate, n_reference=self.n_reference, bias=bias).with_notes(*notes)


def expand_frechet(features: Array, reference: Moments | Gaussian, strata: Strata = None) -> FrechetExpansion:
    """Return the distance of features [n, D] to a fixed reference, its bias and the influence of each sample.

    Let m and S be the samples' mean and covariance, m_r and R those of the reference, and T the symmetric matrix of the
    optimal transport map from N(m, S) to N(m_r, R). The influence of a sample x is 2 (m - m_r)'(x - m) +
    (x - m)'(I - T)(x - m) - tr((I - T) S), and its variance gives the standard error. The second derivative gives the
    bias: in the eigenbasis of L' S L with R = L L' and eigenvalues l_i, a change E of the covariance adds
    sum_ij E_ij^2 / (2 sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j))), and the mean of E_ij^2 is estimated from the samples.

    Raises:
        ValueError: n <= 2 D, or the dimensions differ.
    """
    check_features(features)
    n, dimension = features.shape
    if n <= MIN_INTERVAL_RATIO * dimension:
        raise ValueError(f"n={n} samples, D={dimension}: an influence function needs n > {MIN_INTERVAL_RATIO} D")
    model, target = _to_gaussians(moments(features), reference)
    factor = _factor(target.covariance)
    values, vectors = np.linalg.eigh(factor.T @ model.covariance @ factor)
    distance = _distance(model, target, values)
    positive = values > dimension * np.finfo(np.float64).eps * values.max()  # other directions add nothing
    values, basis = values[positive], factor @ vectors[:, positive]
    roots = np.sqrt(values)

    influence = np.empty(n)
    for start in range(0, n, 8 * BLOCK):
        centred = features[start : start + 8 * BLOCK] - model.mean
        influence[start : start + len(centred)] = (
            2 * centred @ (model.mean - target.mean) + (centred**2).sum(1) - (centred @ basis) ** 2 @ (1 / roots)
        )
    influence -= influence.mean()
    bias = _scaled_bias(features, model, basis, roots, strata) / n
    if not isinstance(reference, Moments):
        return FrechetExpansion(distance, bias, influence, dimension, strata)
    products = np.outer(roots, roots)  # the reference's bias is that of Gaussian rows
    second_order = 0.5 * float((products / (roots[:, None] + roots) * (1 + np.eye(len(roots)))).sum())
    reference_bias = (float(np.trace(target.covariance)) + second_order) / reference.n
    return FrechetExpansion(distance, bias, influence, dimension, strata, reference.n, reference_bias)


def _scaled_bias(features: Array, model: Gaussian, basis: Array, roots: Array, strata: Strata) -> float:
    """Return n times the bias of the Fréchet distance, from the variances of the samples' mean and covariance.

    With strata, only the variance within classes changes the two, and the expected covariance exceeds the true one by
    the covariance between classes divided by n.
    """
    curvature = 1 / (np.outer(roots, roots) * (roots[:, None] + roots))
    if strata is None or (counts := np.unique(strata, return_counts=True)[1]).min() < 2:
        fourth = np.zeros_like(curvature)
        for start in range(0, len(features), 8 * BLOCK):
            squares = ((features[start : start + 8 * BLOCK] - model.mean) @ basis) ** 2
            fourth += squares.T @ squares
        fourth = fourth / len(features) - np.diag(roots**4)
        return float(np.trace(model.covariance) + 0.5 * (curvature * fourth).sum())
    total = 0.0
    for rows in np.split(np.argsort(strata, kind="stable"), np.cumsum(counts)[:-1]):
        centred, count = features[rows] - model.mean, len(rows)
        y = centred @ basis
        fourth = ((y**2).T @ y**2 - (y.T @ y) ** 2 / count) / (count - 1)  # variances of y_i y_j in this class
        # With S_w within and S_b between classes: tr S_w + tr (I - T) S_b = tr T S_w + tr (I - T) S.
        trace_within = (y.var(axis=0, ddof=1) / roots).sum()  # tr T S_w
        trace_total = ((centred**2).sum() - (y**2 / roots).sum()) / count  # tr (I - T) S
        total += count * float(trace_within + trace_total + 0.5 * (curvature * fourth).sum())
    return total / len(features)


def frechet_estimate(features: Array, reference: Moments | Gaussian, strata: Strata = None) -> Estimate:
    """Return the Fréchet distance of features [n, D] with its interval; for n <= 2 D with a note and no interval."""
    n, dimension = features.shape
    if n > MIN_INTERVAL_RATIO * dimension:
        return expand_frechet(features, reference, strata).estimate
    note = f"no interval: n={n} is at most {MIN_INTERVAL_RATIO} D, D={dimension}, and most of the value may be bias"
    n_reference = reference.n if isinstance(reference, Moments) else None
    return Estimate(frechet_distance(moments(features), reference), n, note=note, n_reference=n_reference)


def class_frechet_estimate(reference: Array, features: Array) -> Estimate:
    """Return the Fréchet distance of the rows of one class; without an interval if one of the sets has too few."""
    n, dimension = features.shape
    if n > MIN_INTERVAL_RATIO * dimension and len(reference) > dimension:
        return frechet_estimate(features, moments(reference))
    note = f"no interval, and biased upwards: n={n} and {len(reference)} reference rows are few for D={dimension}"
    return Estimate(frechet_distance_of_rows(reference, features), n, note=note, n_reference=len(reference))


# --- Inception Score ----------------------------------------------------------------------------------------


def softmax(logits: Array) -> Array:
    """Return class probabilities [N, K] in float64 of logits [N, K]."""
    shifted = np.asarray(logits, np.float64)
    exponentials = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def inception_score(probabilities: Array, split_size: int = 5000, strata: Strata = None) -> Estimate:
    """Return exp of the mean KL(p(y|x) || p(y)), averaged over splits as in ADM's evaluator (Salimans et al. 2016).

    Each split has `split_size` consecutive rows of probabilities [N, K]; a shorter last split has the same weight.
    Samples that are sorted by class have a lower score. 0 log 0 counts as 0.
    """
    starts = np.arange(0, len(probabilities), split_size)
    return _mean_of_splits(probabilities, np.append(starts, len(probabilities)), strata)


def inception_score_10split(
    probabilities: Array, num_splits: int = 10, shuffle_seed: int | None = 2020, strata: Strata = None
) -> Estimate:
    """Return the Inception Score over `num_splits` equal splits; by default rows are shuffled as in torch-fidelity."""
    n = len(probabilities)
    if n < num_splits:
        raise ValueError(f"n={n} samples cannot be divided into num_splits={num_splits}; at least one each is needed")
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(n)  # the generator of the published protocol
        probabilities, strata = probabilities[order], None if strata is None else strata[order]
    return _mean_of_splits(probabilities, np.arange(num_splits + 1) * n // num_splits, strata)


def split_scores(probabilities: Array, bounds: NDArray[np.integer]) -> tuple[Array, Array]:
    """Return the Inception Score [S] of each split, and KL(p(y|x) || p(y)) [N] of each row within its split.

    Split s has the rows bounds[s] to bounds[s + 1] of probabilities [N, K].

    Raises:
        ValueError: a row is not a probability distribution.
    """
    check_features(probabilities)
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(1), 1, atol=1e-4):
        raise ValueError("probabilities must be at least 0 and sum to 1 in each row; pass logits through softmax")
    scores, divergences = np.empty(len(bounds) - 1), np.empty(len(probabilities))
    for i, (start, stop) in enumerate(pairwise(bounds)):
        p = np.asarray(probabilities[start:stop], np.float64)
        ratio = np.divide(p, p.mean(axis=0), out=np.ones_like(p), where=p > 0)
        divergences[start:stop] = (p * np.log(ratio)).sum(axis=1)  # influence on the log of the score, up to a constant
        scores[i] = np.exp(divergences[start:stop].mean())
    return scores, divergences


def entropy_bias(probabilities: Array, strata: Strata = None) -> float:
    """Return by how much the entropy of the mean of probabilities [n, K] is too small on average (Miller 1955)."""
    marginal = probabilities.mean(axis=0, dtype=np.float64)
    variance, _ = mean_variance(probabilities, strata)
    return float((variance[marginal > 0] / marginal[marginal > 0]).sum()) / 2


def _mean_of_splits(probabilities: Array, bounds: NDArray[np.integer], strata: Strata) -> Estimate:
    """Return the mean of the splits' Inception Scores with its interval and bias; `bounds` as in `split_scores`."""
    scores, divergences = split_scores(probabilities, bounds)
    n, classes = probabilities.shape
    value = float(scores.mean())
    if n < MIN_SCORED:
        return Estimate(value, n, note=f"no interval: n={n} is below {MIN_SCORED}")
    bias, variance, degrees = 0.0, 0.0, 0
    for score, (start, stop) in zip(scores, pairwise(bounds), strict=True):
        if stop - start == 1:
            continue  # the score of a single row is 1 for any row
        split_strata = None if strata is None else strata[start:stop]
        split_variance, split_degrees = mean_variance(divergences[start:stop], split_strata)
        bias -= score * np.expm1(entropy_bias(probabilities[start:stop], split_strata)) / len(scores)
        variance += score**2 * float(split_variance) / len(scores) ** 2  # of exp(mean divergence), by the delta method
        degrees += split_degrees
    note = ""
    if n < MIN_CORRECTED_RATIO * classes:
        note = f"the interval may be too short: n={n} is below {MIN_CORRECTED_RATIO} K, K={classes} classes"
    return replace(_interval(value, n, variance, degrees, note), bias=float(bias))


# --- Kernel distance ----------------------------------------------------------------------------------------


def kid(reference: Array, samples: Array, strata: Strata = None) -> Estimate:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, eq. 4).

    It uses the full sets and no random subsets. It is unbiased at any n, so it can be slightly negative.
    """
    variance = float(np.var(reference, axis=0, dtype=np.float64).sum())
    squared_norm = float(np.square(np.mean(reference, axis=0, dtype=np.float64)).sum())
    note = ""
    if squared_norm > FAR_FROM_ORIGIN * variance:
        note = "features lie far from the origin, where this kernel depends on little more than their mean"
    estimate = mean_estimate(kid_scores(reference, samples), note, strata)
    return replace(estimate, n_reference=len(reference))


def kid_scores(reference: Array, samples: Array) -> Array:
    """Return [n] scores whose mean is `kid`: the projection of the U-statistic on each sample.

    Raises:
        ValueError: the dimensions differ, a value is not finite, or a set has fewer than two rows.
    """
    check_features(reference, samples)
    n, m = len(samples), len(reference)
    if min(n, m) < 2:
        raise ValueError(
            "the unbiased kernel distance needs at least two rows of each set, but there are "
            f"{n} samples and {m} reference rows"
        )
    kernel = _CentredKernel(reference.mean(axis=0, dtype=np.float64))
    among_reference = sum(kernel(r, reference).sum() - kernel.diagonal(r).sum() for r in _row_blocks(reference))
    to_reference = np.concatenate([kernel(r, reference).mean(axis=1) for r in _row_blocks(samples)])
    to_samples = [(kernel(r, samples).sum(axis=1) - kernel.diagonal(r)) / (n - 1) for r in _row_blocks(samples)]
    witness = np.concatenate(to_samples) - to_reference
    value = witness.mean() - to_reference.mean() + among_reference / (m * (m - 1))
    return value + 2 * (witness - witness.mean())


def _row_blocks(features: Array) -> Iterator[Array]:
    for start in range(0, len(features), BLOCK):
        yield np.asarray(features[start : start + BLOCK], np.float64)


class _CentredKernel:
    """The kernel (x.y / D + 1)^3 without the terms that depend on x alone or y alone.

    These terms cancel in the distance, but far from the origin their rounding errors would dominate it.

    With x = mean + u, y = mean + v and A = |mean|^2 / D + 1, the kernel is (A + w)^3, where
    w = mean.(u + v) / D + u.v / D.
    """

    def __init__(self, mean: Array) -> None:
        self.mean, self.a = mean, float(mean @ mean) / len(mean) + 1

    def __call__(self, x: Array, y: Array) -> Array:
        """Return the kernel [n, m] of rows x [n, D] and y [m, D]."""
        u, v = x - self.mean, y - self.mean
        return self._cube((u @ self.mean)[:, None] / u.shape[1] + v @ self.mean / u.shape[1], u @ v.T / u.shape[1])

    def diagonal(self, x: Array) -> Array:
        """Return the kernel [n] of each row of x [n, D] with itself."""
        u = x - self.mean
        return self._cube(2 * u @ self.mean / u.shape[1], (u * u).sum(axis=1) / u.shape[1])

    def _cube(self, linear: Array, product: Array) -> Array:
        w = linear + product
        return 3 * self.a**2 * product + w * w * (3 * self.a + w)


def cmmd(reference: Array, samples: Array, strata: Strata = None) -> Estimate:
    """Return CMMD: 1,000 times the squared MMD of normalised rows with the kernel exp(-|x - y|^2 / 200).

    It is biased as published: Jayasumana et al. (2024) take the mean over all pairs, including each row with itself.
    """
    check_features(reference, samples)
    n, m = len(samples), len(reference)
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True).clip(1e-12) for f in (samples, reference))

    def kernel(u: Array, v: Array) -> Array:
        return np.expm1((u @ v.T - 1) / 100)  # |u - v|^2 = 2 - 2 u.v; the constant 1 cancels

    to_samples = np.concatenate([kernel(rows, x).mean(axis=1) for rows in _row_blocks(x)])
    to_reference = np.concatenate([kernel(rows, y).mean(axis=1) for rows in _row_blocks(x)])
    among_reference = sum(float(kernel(rows, y).sum()) for rows in _row_blocks(y)) / m**2
    value = 1000 * float(to_samples.mean() - 2 * to_reference.mean() + among_reference)
    bias = None
    if min(n, m) > 1:
        bias = -1000 * float(to_samples.mean() / (n - 1) + among_reference / (m - 1))
    estimate = score_estimate(value, 2000 * (to_samples - to_reference), strata)
    return replace(estimate, n_reference=m, bias=bias)


def vendi_score(samples: Array) -> float:
    """Return the Vendi score with q = 1 (Friedman & Dieng 2023), the effective number of distinct samples.

    It is exp of the entropy of the eigenvalues of K / n, where K is the matrix of cosine similarities.
    """
    check_features(samples)
    unit = np.asarray(samples, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)
    gram = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit
    eigenvalues = np.linalg.eigvalsh(gram / len(unit))
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))
