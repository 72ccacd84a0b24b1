"""Metrics of balls around nearest neighbours: precision, recall, density, coverage, realism and authenticity.

As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over samples has
the interval of a mean. Recall and coverage depend on the set of samples as a whole, so they have the jackknife's
interval: the influence of a sample is what the metric would lose without it. This interval is conservative (Efron &
Stein 1981).
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
    fidelity = precision_recall(reference, samples, k, strata)
    rng, count = np.random.default_rng([len(reference), len(samples)]), min(len(reference), len(samples))
    if len(reference) > count:
        reference = reference[_drawn(rng, len(reference), count, None)]
    if len(samples) > count:
        rows = _drawn(rng, len(samples), count, strata)
        samples, strata = samples[rows], None if strata is None else strata[rows]
    return Manifolds(*fidelity, *density_coverage(reference, samples, strict_k, strata))


def _drawn(rng: np.random.Generator, n: int, count: int, strata: Strata) -> Indices:
    """Return `count` of n row numbers, drawn at random and sorted; with strata in proportion to the classes."""
    order = rng.permutation(n) if strata is None else np.lexsort((rng.random(n), strata))
    return np.sort(order[np.floor((np.arange(count) + rng.random()) * (n / count)).astype(np.int64)])


def precision_recall(reference: Array, samples: Array, k: int = 3, strata: Strata = None) -> tuple[Estimate, Estimate]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) with their intervals.

    Precision is the share of samples [N, D] inside a ball around a reference row [M, D] that reaches to its k-th
    neighbour. Recall is the share of reference rows inside such a ball around a sample. Collapsed samples have high
    precision and low recall.

    Raises:
        ValueError: one of the sets has at most k rows.
    """
    check_features(reference, samples)
    n, m = len(samples), len(reference)
    real_radii, radii = squared_radii(reference, k), squared_radii(samples, k)
    precise = np.zeros(n, np.bool_)
    holders, holder = np.zeros(m, np.int64), np.zeros(m, np.int64)  # of each reference row: how many samples, and one
    for block in blocks(samples, reference):
        rows, _ = block.within(real_radii)
        precise[rows] = True
        rows, recalled = block.within(radii[block.rows, None])
        holders += np.bincount(recalled, minlength=m)
        holder[recalled] = rows
    alone = np.bincount(holder[holders == 1], minlength=n)  # reference rows that only this sample recalls
    precision = proportion_estimate(precise, strata)
    recall = _set_estimate(float((holders > 0).mean()), alone / m, strata)
    return (
        replace(precision, n_reference=m).noted(_copies("reference", real_radii, k)),
        replace(recall, n_reference=m).noted(_copies("sample", radii, k)),
    )


def density_coverage(
    reference: Array, samples: Array, k: int = 5, strata: Strata = None
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Return density, coverage, clipped density and clipped coverage with their intervals.

    Density is the number of the reference's k-neighbour balls in which a sample lies, divided by k; it can exceed 1.
    Coverage is the share of these balls that hold a sample (Naeem et al. 2020, eq. 4-5; the surface is outside, as in
    their code).

    The clipped metrics are those of Salvy, Talbot & Thirion (2026). For clipped density a sample counts for at most k
    balls, a ball is at most as wide as the median, and the result is relative to that of the reference's own rows. For
    clipped coverage a ball counts at most k samples, and the result is the share of good samples that covers as much.
    """
    check_features(reference, samples)
    n, m, own = len(samples), len(reference), nearest(reference, reference, k)
    radii = own.squared[:, -1]
    clipped = np.minimum(radii, np.median(radii))
    inside = np.nextafter(radii, -1)  # a ball's surface is outside
    counts, narrow, held = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(m, np.int64)
    pairs = []  # (sample, ball) where the ball holds few samples
    for block in blocks(samples, reference):
        rows, balls = block.within(inside)
        counts += np.bincount(rows, minlength=n)
        few = held[balls] <= k
        pairs.append(np.stack([rows[few], balls[few]]))
        held += np.bincount(balls, minlength=m)
        rows, _ = block.within(clipped)
        narrow += np.bincount(rows, minlength=n)
    at, balls = np.concatenate(pairs, axis=1)
    lost = (np.bincount(at[held[balls] <= most], minlength=n) / m for most in (1, k))  # without each sample
    perfect = np.bincount(own.index[own.squared <= clipped[:, None]], minlength=m).clip(max=k).mean() / k
    estimates = (
        _same_for_all(mean_estimate(counts / k, strata=strata)),
        _set_estimate(float((held > 0).mean()), next(lost), strata),
        _same_for_all(mean_estimate(narrow.clip(max=k) / k / max(perfect, 1e-12), strata=strata)),
        _set_estimate(float(held.clip(max=k).mean()) / k, next(lost) / k, strata),
    )
    good = _coverage_by_good(n, m, k) if m > k + 1 else np.linspace(0, 1, n + 1)
    density, coverage, narrow_density, full = (
        replace(e, n_reference=m).noted(_copies("reference", radii, k)) for e in estimates
    )
    return (
        density,
        coverage,
        _mapped(narrow_density, lambda x: min(x, 1.0)),
        _mapped(full, lambda x: float(np.searchsorted(good, x - 1e-12)) / (n + 1)),
    )


def _coverage_by_good(n: int, m: int, k: int) -> Array:
    """Return the expected clipped coverage [n + 1] of m balls by n samples of which 0 to n are good.

    A good sample is distributed as the reference is. A ball that reaches to the k-th of m - 1 others holds J of g good
    samples, where J is beta-binomial with parameters k and m - k. Therefore E min(J, k) / k =
    1 - sum over j < k of (1 - j / k) P(J = j).
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
    return _mapped(estimate, lambda x: float(np.clip(x, 0, 1)))


def _mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    low, high = (None if end is None else function(end) for end in (estimate.low, estimate.high))
    return replace(estimate, value=function(estimate.value), low=low, high=high)


def _same_for_all(estimate: Estimate) -> Estimate:
    if estimate.low is not None and estimate.low != estimate.high:
        return replace(estimate, low=max(estimate.low, 0.0))
    return Estimate(estimate.value, estimate.n, note="no interval: it is the same for every sample")


def _copies(what: str, radii: Array, k: int) -> str:
    """Return a note on balls of radius 0, or "" if there are none."""
    count = int((radii == 0).sum())
    return f"{count:,} {what} rows have {k} or more exact copies, so their balls have no size" if count else ""


def realism(reference: Array, samples: Array, k: int = 3) -> Array:
    """Return the realism [N] of each sample (Kynkaanniemi et al. 2019, eq. 3).

    Realism is the largest ratio of a reference ball's radius to its centre's distance from the sample. It is at least 1
    inside the reference's manifold, and infinite for an exact copy. Unlike the paper, this keeps the widest balls too.
    Balls of radius 0 (of rows with k copies) are left out.

    Raises:
        ValueError: all balls have radius 0, or the reference has at most k rows.
    """
    radii = squared_radii(reference, k)
    wide = radii > 0
    if not wide.any():
        raise ValueError(f"every reference row has {k} exact copies, so realism is not defined; remove the copies")
    with np.errstate(divide="ignore"):
        squared = nearest(samples, reference[wide], 1, weights=1 / radii[wide]).squared[:, 0]
        return 1 / np.sqrt(squared)


def authenticity(reference: Array, samples: Array) -> Estimate:
    """Return AuthPct with its interval, in percent (Alaa et al. 2022); copies lower it.

    It is the share of samples that are farther from their nearest reference row than that row is from its own nearest.
    """
    own = nearest(samples, reference, 1)
    return authentic_share(own.squared[:, 0], squared_radii(reference, 1)[own.index[:, 0]])


def authentic_share(squared: Array, own_squared: Array, strata: Strata = None) -> Estimate:
    """Return AuthPct from squared distances [N].

    Args:
        squared: of each sample to its nearest reference row.
        own_squared: of that reference row to its own nearest other row.
    """
    return _mapped(proportion_estimate(squared > own_squared, strata), lambda x: 100 * x)


# --- The published evaluator's arithmetic -------------------------------------------------------------------


def precision_recall_openai(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """Return precision and recall in the float16 arithmetic of ADM's evaluator, for parity with published numbers only.

    Squared distances |u|^2 - 2 u.v + |v|^2 are formed in float16 from features, norms and products in
    float16, in blocks of 10,000 rows; a block that overflows is formed again in float32.
    """
    check_features(reference, samples)
    real, fake = (torch.from_numpy(np.asarray(x, np.float32)) for x in (reference, samples))
    real_radii, fake_radii = (_openai_radii(x, k) for x in (real, fake))
    inside, recalled = torch.zeros(len(fake), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for i in range(0, len(real), OPENAI_BLOCK):
        rows = slice(i, i + OPENAI_BLOCK)
        for j in range(0, len(fake), OPENAI_BLOCK):
            columns = slice(j, j + OPENAI_BLOCK)
            squares = _openai_squares(real[rows], fake[columns])
            inside[columns] |= (squares <= real_radii[rows, None]).any(0)
            recalled[rows] |= (squares <= fake_radii[columns]).any(1)
    return float(inside.double().mean()), float(recalled.double().mean())


def _openai_radii(features: Tensor, k: int) -> Tensor:
    radii = []
    for rows in features.split(OPENAI_BLOCK):
        blocks = [_openai_squares(rows, columns) for columns in features.split(OPENAI_BLOCK)]
        smallest = [b.topk(min(k + 1, b.shape[1]), dim=1, largest=False).values for b in blocks]
        radii.append(torch.cat(smallest, dim=1).kthvalue(k + 1, dim=1).values)  # the row itself is among them
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
