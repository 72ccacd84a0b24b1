"""Metrics of balls around nearest neighbours: precision, recall, density, coverage, realism and authenticity.

As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over samples has
the interval of a mean. Recall and coverage depend on the set of samples as a whole, so they have the jackknife's
interval: the influence of a sample is the decrease of the metric without it. This interval is conservative (Efron &
Stein 1981). The ball of a row has its centre there and reaches to its k-th nearest neighbour in the same set.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.metrics import Array, Estimate, Strata, check_features, mean_estimate, proportion_estimate, score_estimate
from models.neighbours import Indices, blocks, nearest, squared_radii

OPENAI_BLOCK = 10_000  # rows and columns of one block in the published evaluator


@dataclass(frozen=True)
class Manifolds:
    """The metrics of balls around neighbours, each with its interval."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate
    clipped_density: Estimate
    clipped_coverage: Estimate


def manifolds(reference: Array, samples: Array, k: int = 3, strict_k: int = 5, strata: Strata = None) -> Manifolds:
    """Return `precision_recall` with k neighbours and `density_coverage` with strict_k neighbours.

    Precision and recall use all rows. Density and coverage compare equal numbers of rows, because coverage saturates
    if samples outnumber the reference: the larger set is subsampled with a fixed seed, and with strata in proportion
    to the classes.
    """
    check_features(reference, samples)
    precision, recall = precision_recall(reference, samples, k, strata)
    rng = np.random.default_rng([len(reference), len(samples)])
    count = min(len(reference), len(samples))
    if len(reference) > count:
        reference = reference[_draw_rows(rng, len(reference), count, None)]
    if len(samples) > count:
        rows = _draw_rows(rng, len(samples), count, strata)
        samples, strata = samples[rows], None if strata is None else strata[rows]
    return Manifolds(precision, recall, *density_coverage(reference, samples, strict_k, strata))


def _draw_rows(rng: np.random.Generator, n: int, count: int, strata: Strata) -> Indices:
    """Return `count` of n row numbers, drawn at random and sorted; with strata in proportion to the classes."""
    order = rng.permutation(n) if strata is None else np.lexsort((rng.random(n), strata))
    return np.sort(order[np.floor((np.arange(count) + rng.random()) * (n / count)).astype(np.int64)])


def precision_recall(reference: Array, samples: Array, k: int = 3, strata: Strata = None) -> tuple[Estimate, Estimate]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) with their intervals.

    Precision is the share of samples [N, D] inside the ball of a reference row [M, D]. Recall is the share of reference
    rows inside the ball of a sample. Collapsed samples have high precision and low recall.

    Raises:
        ValueError: one of the sets has at most k rows.
    """
    check_features(reference, samples)
    n, m = len(samples), len(reference)
    reference_radii, sample_radii = squared_radii(reference, k), squared_radii(samples, k)
    in_reference_ball = np.zeros(n, np.bool_)
    num_recalling = np.zeros(m, np.int64)  # for each reference row, the number of samples whose balls contain it
    recalling_sample = np.zeros(m, np.int64)  # for each reference row, one of these samples
    for block in blocks(samples, reference):
        rows, _ = block.within(reference_radii)
        in_reference_ball[rows] = True
        rows, recalled = block.within(sample_radii[block.rows, None])
        num_recalling += np.bincount(recalled, minlength=m)
        recalling_sample[recalled] = rows
    num_recalled_alone = np.bincount(recalling_sample[num_recalling == 1], minlength=n)  # rows only this sample recalls
    precision = proportion_estimate(in_reference_ball, strata)
    recall = _set_estimate(float((num_recalling > 0).mean()), num_recalled_alone / m, strata)
    return (
        replace(precision, n_reference=m).with_notes(_copies_note("reference", reference_radii, k)),
        replace(recall, n_reference=m).with_notes(_copies_note("sample", sample_radii, k)),
    )


def density_coverage(
    reference: Array, samples: Array, k: int = 5, strata: Strata = None
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Return density, coverage, clipped density and clipped coverage with their intervals.

    Density is the number of balls of the reference in which a sample lies, divided by k; it can exceed 1. Coverage is
    the share of these balls that contain a sample (Naeem et al. 2020, eq. 4-5). The surface of a ball is outside of it,
    as in their code.

    The clipped metrics are those of Salvy, Talbot & Thirion (2026). For clipped density, a sample counts for at most k
    balls, a ball is at most as wide as the median ball, and the result is divided by that of the reference's own rows.
    For clipped coverage, a ball counts at most k samples, and the result is the share of good samples that is expected
    to have this coverage. Good samples have the distribution of the reference.
    """
    check_features(reference, samples)
    n, m = len(samples), len(reference)
    neighbours = nearest(reference, reference, k)
    radii = neighbours.squared[:, -1]
    clipped_radii = np.minimum(radii, np.median(radii))
    largest_inside = np.nextafter(radii, -1)  # because the surface of a ball is outside
    num_balls = np.zeros(n, np.int64)  # for each sample, the balls that contain it
    num_clipped_balls = np.zeros(n, np.int64)  # the same for balls with clipped radii
    num_samples = np.zeros(m, np.int64)  # for each ball, the samples in it
    pairs = []  # (sample, ball), without balls that are known to contain more than k samples
    for block in blocks(samples, reference):
        rows, balls = block.within(largest_inside)
        num_balls += np.bincount(rows, minlength=n)
        undecided = num_samples[balls] <= k
        pairs.append(np.stack([rows[undecided], balls[undecided]]))
        num_samples += np.bincount(balls, minlength=m)
        rows, _ = block.within(clipped_radii)
        num_clipped_balls += np.bincount(rows, minlength=n)
    rows, balls = np.concatenate(pairs, axis=1)
    num_alone = np.bincount(rows[num_samples[balls] <= 1], minlength=n)  # of its balls, those without other samples
    num_sparse = np.bincount(rows[num_samples[balls] <= k], minlength=n)  # of its balls, those with at most k samples
    near = neighbours.squared <= clipped_radii[:, None]
    reference_density = np.bincount(neighbours.index[near], minlength=m).clip(max=k).mean() / k
    estimates = (
        _density_estimate(num_balls / k, strata),
        _set_estimate(float((num_samples > 0).mean()), num_alone / m, strata),
        _density_estimate(num_clipped_balls.clip(max=k) / k / max(reference_density, 1e-12), strata),
        _set_estimate(float(num_samples.clip(max=k).mean()) / k, num_sparse / m / k, strata),
    )
    note = _copies_note("reference", radii, k)
    density, coverage, clipped_density, clipped_coverage = (
        replace(estimate, n_reference=m).with_notes(note) for estimate in estimates
    )
    expected = _expected_coverage(n, m, k) if m > k + 1 else np.linspace(0, 1, n + 1)
    return (
        density,
        coverage,
        _transform(clipped_density, lambda x: min(x, 1.0)),
        _transform(clipped_coverage, lambda x: float(np.searchsorted(expected, x - 1e-12)) / (n + 1)),
    )


def _expected_coverage(n: int, m: int, k: int) -> Array:
    """Return the expected clipped coverage [n + 1] of m balls by n samples of which 0 to n are good.

    A ball that reaches to the k-th nearest of the m - 1 other rows contains J of g good samples, where J is
    beta-binomial with parameters k and m - k. Therefore E min(J, k) / k = 1 - sum over j < k of (1 - j / k) P(J = j).
    """
    expected = np.ones(n + 1)
    log_factorials = np.append(0.0, np.cumsum(np.log(np.arange(1, n + m))))
    for j in range(k):
        g = np.arange(j, n + 1)
        log_p = log_factorials[g] - log_factorials[j] - log_factorials[g - j]
        log_p += log_factorials[k + j - 1] + log_factorials[m + g - k - j - 1] - log_factorials[m + g - 1]
        log_p -= log_factorials[k - 1] + log_factorials[m - k - 1] - log_factorials[m - 1]
        expected[j:] -= (1 - j / k) * np.exp(log_p)
    return expected


def _set_estimate(value: float, lost: Array, strata: Strata) -> Estimate:
    """Return a share of the reference with the jackknife's interval; lost [n] is its decrease without each sample."""
    if not lost.any():
        return Estimate(value, len(lost), note="no interval: no single sample changes it")
    estimate = score_estimate(value, len(lost) * lost, strata)
    return _transform(estimate, lambda x: float(np.clip(x, 0, 1)))


def _transform(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """Apply an increasing function to the value and to both ends of the interval."""
    low, high = (None if end is None else function(end) for end in (estimate.low, estimate.high))
    return replace(estimate, value=function(estimate.value), low=low, high=high)


def _density_estimate(densities: Array, strata: Strata) -> Estimate:
    """Return the mean of the samples' densities [n], with an interval unless all densities are equal."""
    estimate = mean_estimate(densities, strata=strata)
    if estimate.low is not None and estimate.low != estimate.high:
        return replace(estimate, low=max(estimate.low, 0.0))
    return Estimate(estimate.value, estimate.n, note="no interval: it is the same for every sample")


def _copies_note(which: str, radii: Array, k: int) -> str:
    """Return a note on balls of radius 0, or "" if there are none."""
    count = int((radii == 0).sum())
    return f"{count:,} {which} rows have {k} or more exact copies, so their balls have radius 0" if count else ""


def realism(reference: Array, samples: Array, k: int = 3) -> Array:
    """Return the realism [N] of each sample (Kynkaanniemi et al. 2019, eq. 3).

    Realism is the maximum, over the balls of the reference, of the radius divided by the distance of the sample from
    the centre. It is at least 1 for samples inside a ball, and infinite for an exact copy of a reference row. Unlike
    the paper, this also uses the widest balls. It omits balls of radius 0, which are those of rows with k exact copies.

    Raises:
        ValueError: all balls have radius 0, or the reference has at most k rows.
    """
    radii = squared_radii(reference, k)
    positive = radii > 0
    if not positive.any():
        raise ValueError(f"every reference row has {k} exact copies, so realism is not defined; remove the copies")
    with np.errstate(divide="ignore"):
        squared = nearest(samples, reference[positive], 1, weights=1 / radii[positive]).squared[:, 0]
        return 1 / np.sqrt(squared)


def authenticity(reference: Array, samples: Array) -> Estimate:
    """Return AuthPct with its interval, in percent (Alaa et al. 2022); copies lower it.

    It is the share of samples that are farther from their nearest reference row than that row is from its own nearest
    other row.
    """
    neighbours = nearest(samples, reference, 1)
    return authentic_share(neighbours.squared[:, 0], squared_radii(reference, 1)[neighbours.index[:, 0]])


def authentic_share(squared: Array, own_squared: Array, strata: Strata = None) -> Estimate:
    """Return AuthPct with its interval from squared distances [N].

    Args:
        squared: squared distance of each sample to its nearest reference row.
        own_squared: squared distance of that reference row to its own nearest other row.
    """
    return _transform(proportion_estimate(squared > own_squared, strata), lambda x: 100 * x)


# --- The published evaluator's arithmetic -------------------------------------------------------------------


def precision_recall_openai(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """Return precision and recall in the float16 arithmetic of ADM's evaluator, to compare with published numbers only.

    Squared distances |u|^2 - 2 u.v + |v|^2 are computed from features, norms and products in float16, in blocks of
    10,000 rows. A block that overflows is computed again in float32.
    """
    check_features(reference, samples)
    x, y = (torch.from_numpy(np.asarray(features, np.float32)) for features in (reference, samples))
    reference_radii, sample_radii = _openai_radii(x, k), _openai_radii(y, k)
    precise, recalled = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    for i in range(0, len(x), OPENAI_BLOCK):
        rows = slice(i, i + OPENAI_BLOCK)
        for j in range(0, len(y), OPENAI_BLOCK):
            columns = slice(j, j + OPENAI_BLOCK)
            squares = _openai_squares(x[rows], y[columns])
            precise[columns] |= (squares <= reference_radii[rows, None]).any(0)
            recalled[rows] |= (squares <= sample_radii[columns]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


def _openai_radii(features: Tensor, k: int) -> Tensor:
    """Return the squared distance [N] of each row to its k-th nearest other row."""
    radii = []
    for rows in features.split(OPENAI_BLOCK):
        squares = [_openai_squares(rows, columns) for columns in features.split(OPENAI_BLOCK)]
        smallest = [block.topk(min(k + 1, block.shape[1]), dim=1, largest=False).values for block in squares]
        radii.append(torch.cat(smallest, dim=1).kthvalue(k + 1, dim=1).values)  # k + 1, because the row is its nearest
    return torch.cat(radii)


def _openai_squares(u: Tensor, v: Tensor) -> Tensor:
    """Return squared distances [b, c] as float32 values, after float16 arithmetic if that does not overflow."""
    for dtype in (torch.float16, torch.float32):
        x, y = u.to(dtype), v.to(dtype)
        row, column = (x * x).sum(1, keepdim=True), (y * y).sum(1)
        # float16 products are summed in float32 by the hardware, and rounded once
        squares = row.float() - 2 * (x.float() @ y.float().T).to(dtype).float()
        squares = (squares.to(dtype) + column).clamp_min_(0).float()
        if torch.isfinite(squares).all():
            break
    return squares
