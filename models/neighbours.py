"""Metrics of nearest neighbours: precision, recall, density, coverage, realism, copies.

Distances are decided exactly: a float32 matrix product of centred features gives each squared distance with a
bound on its error, and only what the bound leaves open (ties, mostly) is decided by summing squared
differences in float64. So the answers depend neither on block sizes nor on the device, a large mean does no
harm, and rows may be shared out among workers. Memory beyond the features is a few blocks of `BLOCK_BYTES`.

As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over
samples has the interval of a mean; one that depends on the set of samples (recall, coverage) has one from
random halves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Z95, Array, Estimate, check_features, mean_estimate, proportion_estimate

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

BLOCK_BYTES = 128 * 2**20  # of one float32 block of distances
SPARE = 8  # candidates beyond k that are measured exactly, so that rounding rarely hides a true neighbour
OPENAI_BLOCK = 10_000  # rows and columns of one block in the published evaluator
NUM_HALVES = 50  # random halves behind the interval of a metric of the whole set


@dataclass(frozen=True)
class Neighbours:
    """The k nearest targets of each query, nearest first, the lower index first on ties."""

    index: Indices  # [N, k]
    squared: Array  # [N, k] squared Euclidean distances, float64


def nearest(queries: Array, targets: Array, k: int, weights: Array | None = None) -> Neighbours:
    """The k targets [M, D] nearest to each query [N, D]; with `queries is targets` a row is not its own
    neighbour.

    With weights [M], squared distances to target j are multiplied by weights[j] first. Raises ValueError on
    shapes, values that are not finite, and where there are not k targets.
    """
    check_features(queries, targets)
    same = queries is targets
    if len(targets) - same < k:
        raise ValueError(f"k={k} neighbours of each row need more than the {len(targets)} rows given")
    weight = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    kept = min(k + SPARE, len(targets) - same)
    index, squared = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for start, lower, *_ in _bounded_squares(queries, targets):
        lower *= torch.from_numpy(weight).float()
        rows = np.arange(start, start + len(lower))
        if same:
            lower[torch.arange(len(rows)), torch.from_numpy(rows)] = torch.inf
        bounds, candidates = (t.numpy() for t in lower.topk(kept, dim=1, largest=False))
        exact = _squares(queries, np.repeat(rows, kept), targets, candidates.ravel()).reshape(candidates.shape)
        index[rows], squared[rows] = _first(weight[candidates] * exact, candidates, k)
        if kept == len(targets) - same:
            continue
        # Other targets lie at or beyond the last bound: only where that is nearer is more to be measured.
        for row in rows[bounds[:, -1] <= squared[rows, -1]]:
            full = weight * _squares(queries, np.full(len(targets), row), targets, np.arange(len(targets)))
            if same:
                full[row] = np.inf
            index[row], squared[row] = _first(full[None], np.arange(len(targets))[None], k)
    return Neighbours(index, squared)


def _first(values: Array, index: Indices, k: int) -> tuple[Indices, Array]:
    order = np.lexsort((index, values), axis=1)[:, :k]
    return np.take_along_axis(index, order, axis=1), np.take_along_axis(values, order, axis=1)


def squared_radii(features: Array, k: int) -> Array:
    """[N] squared distance of each row to its k-th nearest other row."""
    return nearest(features, features, k).squared[:, -1]


def balls_holding(points: Array, centres: Array, radii: Array, strict: bool = False) -> Indices:
    """[N] how many of the balls around centres [M, D] with squared `radii` [M] hold each point [N, D].

    A point on the surface is held, or is not with strict=True.
    """
    counts = np.zeros(len(points), np.int64)
    for start, sure, unsure in _inside(points, centres, radii):
        counts[start : start + len(sure)] = sure.sum(1).numpy()
        rows, columns = (i.numpy() for i in torch.nonzero(unsure, as_tuple=True))
        squares = _squares(points, start + rows, centres, columns)
        held = squares < radii[columns] if strict else squares <= radii[columns]
        np.add.at(counts, start + rows[held], 1)
    return counts


def any_ball_holds(points: Array, centres: Array, radii: Array) -> Mask:
    """[N] whether at least one ball holds each point, surface included: `balls_holding(...) > 0`, sooner."""
    hit = np.zeros(len(points), np.bool_)
    for start, sure, unsure in _inside(points, centres, radii):
        hit[start : start + len(sure)] = sure.any(1).numpy()
        left = start + np.flatnonzero(~hit[start : start + len(sure)])
        rows, columns = (i.numpy() for i in torch.nonzero(unsure[torch.from_numpy(left - start)], as_tuple=True))
        hit[left[rows[_squares(points, left[rows], centres, columns) <= radii[columns]]]] = True
    return hit


def _inside(points: Array, centres: Array, radii: Array) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of rows: start, which pairs [b, M] surely lie inside, and which the bounds leave open."""
    check_features(points, centres)
    if radii.shape != (len(centres),):
        raise ValueError(f"radii have shape {radii.shape}; wanted one for each of {len(centres)} centres")
    threshold = torch.from_numpy(np.asarray(radii, np.float64)).float()
    for start, lower, row_slack, column_slack in _bounded_squares(points, centres):
        possible = lower <= threshold
        sure = lower.add_(row_slack[:, None]) < threshold - column_slack
        yield start, sure, possible.logical_and_(~sure)


def _bounded_squares(points: Array, centres: Array) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Blocks of rows: start, lower bounds [b, M] of squared distances, and the width of the bounds by row and
    column.

    |u|^2 - 2 u.v + |v|^2 in float32 errs by a multiple of eps (|u|^2 + |v|^2): a few roundings, and those of
    a sum of D products, which stay below 8 sqrt(D) eps but for a chance of 1e-13 (Higham & Mary 2019, theorem
    2.4).
    """
    mean = centres.mean(axis=0, dtype=np.float64)
    v, v_squares = _centred(centres, mean)
    slack = (32 + 8 * np.sqrt(points.shape[1])) * 2.0**-24
    size = max(1, BLOCK_BYTES // (4 * len(centres)))
    for start in range(0, len(points), size):
        u, u_squares = _centred(points[start : start + size], mean)
        lower = torch.addmm(v_squares * (1 - slack), u, v.T, alpha=-2).add_(u_squares[:, None], alpha=1 - slack)
        yield start, lower, 2 * slack * u_squares, 2 * slack * v_squares


def _centred(features: Array, mean: Array) -> tuple[Tensor, Tensor]:
    """Rows minus mean and their squared norms, rounded to float32 only after the subtraction."""
    centred, squares = np.empty(features.shape, np.float32), np.empty(len(features), np.float32)
    for start in range(0, len(features), 4096):
        rows = features[start : start + 4096] - mean
        centred[start : start + 4096], squares[start : start + 4096] = rows, (rows * rows).sum(axis=1)
    largest = float(squares.max())
    if not largest < 1e36:
        raise ValueError("features spread too far for float32 distances; scale them down")
    return torch.from_numpy(centred), torch.from_numpy(squares)


def _squares(queries: Array, rows: Indices, targets: Array, columns: Indices) -> Array:
    """Squared distances of the pairs (rows[p], columns[p]), summed directly in float64: equal pairs tie
    exactly.
    """
    squares = np.empty(len(rows))
    size = max(1, BLOCK_BYTES // (16 * queries.shape[1]))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        difference = np.asarray(queries[rows[part]], np.float64) - targets[columns[part]]
        squares[part] = np.square(difference, out=difference).sum(axis=1)
    return squares


# --- Fidelity and diversity ---------------------------------------------------------------------------------


def precision_recall(reference: Array, samples: Array, k: int = 3) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2): in this order, each with its
    interval.

    Precision: the share of samples [N, D] inside a ball around a reference row [M, D] that reaches to its
    k-th neighbour; recall: the share of reference rows inside such a ball around a sample. Collapsed samples
    have high precision and low recall. Raises ValueError where a set has not more than k rows.
    """
    precision = proportion_estimate(any_ball_holds(samples, reference, squared_radii(reference, k)))
    lists = nearest(samples, samples, min(4 * k + 16, len(samples) - 1))
    recall = float(any_ball_holds(reference, samples, lists.squared[:, k - 1]).mean())
    by_halves = partial(_recall_of_halves, reference, samples, lists, k)
    return precision, _halves_estimate(recall, len(samples), k, by_halves)


def density_coverage(reference: Array, samples: Array, k: int = 5) -> tuple[Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, eq. 4-5), with the strict comparison of their code.

    Density: in how many of the reference's k-neighbour balls a sample lies, over k; it can exceed 1.
    Coverage: the share of those balls that hold a sample.
    """
    radii = squared_radii(reference, k)
    density = mean_estimate(balls_holding(samples, reference, radii, strict=True) / k)
    covered = nearest(reference, samples, 1).squared[:, 0] < radii
    coverage = float(covered.mean())
    by_halves = partial(_coverage_of_halves, reference, samples, radii)
    return density, _halves_estimate(coverage, len(samples), 1, by_halves)


def realism(reference: Array, samples: Array, k: int = 3) -> Array:
    """[N] largest ratio of a reference ball's radius to its distance from the sample (Kynkaanniemi et al.
    2019, eq. 3).

    At least 1 means inside the reference's manifold; infinite for an exact copy. All balls are kept, also the
    widest; those of radius 0 (rows with k copies) can realise nothing but their copies and are left out.
    """
    radii = squared_radii(reference, k)
    wide = radii > 0
    if not wide.any():
        raise ValueError(f"every reference row has {k} exact copies; realism is not defined")
    with np.errstate(divide="ignore"):
        return 1 / np.sqrt(nearest(samples, reference[wide], 1, weights=1 / radii[wide]).squared[:, 0])


def authenticity(reference: Array, samples: Array) -> Estimate:
    """AuthPct: % of samples farther from their nearest reference row than that row is from its own nearest.

    Copies pull it down (Alaa et al. 2022). Value and interval are percentages, 0..100.
    """
    own = nearest(samples, reference, 1)
    share = proportion_estimate(own.squared[:, 0] > squared_radii(reference, 1)[own.index[:, 0]])
    low, high = (None if x is None else 100 * x for x in (share.low, share.high))
    return Estimate(100 * share.value, share.n, low, high)


# --- Intervals from random halves ---------------------------------------------------------------------------


def _halves_estimate(value: float, n: int, k: int, of_halves: Callable[[Mask], Array]) -> Estimate:
    """The interval of a metric of the whole set from its values on random halves of it, each without
    replacement.

    Halves of n vary around the whole as the whole varies around its mean (the jackknife that deletes n/2),
    and hold no duplicates, which would enter each other's balls.
    """
    if n < 4 * (k + 1):
        return Estimate(value, n, note=f"no interval: halves of n={n} samples are too few for k={k}")
    rng = np.random.default_rng([n])
    halves = np.zeros((NUM_HALVES, n), np.bool_)
    for half in halves:
        half[rng.choice(n, n // 2, replace=False)] = True
    spread = float(of_halves(halves).std(ddof=1)) * float(np.sqrt((n // 2) / (n - n // 2)))
    if spread == 0:
        return Estimate(value, n, note="no interval: the value is the same in every random half")
    error = Z95 * spread
    return Estimate(value, n, max(value - error, 0.0), min(value + error, 1.0))


def _coverage_of_halves(reference: Array, samples: Array, radii: Array, halves: Mask) -> Array:
    """[H] coverage by each half of the samples; pairs left open do not matter to its spread."""
    members = torch.from_numpy(halves.astype(np.float32))
    held = torch.zeros(len(halves), len(reference))
    for start, sure, _ in _inside(samples, reference, radii):
        held += members[:, start : start + len(sure)] @ sure.float()
    return (held > 0).double().mean(1).numpy()


def _recall_of_halves(reference: Array, samples: Array, lists: Neighbours, k: int, halves: Mask) -> Array:
    """[H] recall by each half of the samples, whose balls reach to the k-th neighbour within that half."""
    radii = np.full(halves.shape, -np.inf, np.float32)
    for half, reach in zip(halves, radii, strict=True):
        members = np.flatnonzero(half)
        rank = half[lists.index[members]].cumsum(axis=1)
        found = rank[:, -1] >= k
        reach[members] = lists.squared[members, (rank >= k).argmax(axis=1)]
        lost = members[~found]  # all but never: fewer than k of the listed neighbours are in this half
        if len(lost):
            reach[lost] = nearest(samples[lost], samples[half], k + 1).squared[:, -1]  # itself is the first
    recalled = torch.zeros(len(halves))
    thresholds = torch.from_numpy(radii)
    for _, lower, *_ in _bounded_squares(reference, samples):
        for i, threshold in enumerate(thresholds):
            recalled[i] += (lower <= threshold).any(1).sum()
    return (recalled / len(reference)).double().numpy()


# --- The published evaluator's arithmetic -------------------------------------------------------------------


def precision_recall_openai(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """Precision and recall as ADM's evaluator computes them, in float16: for parity with published numbers
    only.

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
    """Squared distances [b, c] as float32 values, after float16 arithmetic where that does not overflow."""
    for dtype in (torch.float16, torch.float32):
        x, y = u.to(dtype), v.to(dtype)
        row, column = (x * x).sum(1, keepdim=True), (y * y).sum(1)
        # float16 products are summed in float32 by the hardware, and rounded once
        squares = row.float() - 2 * (x.float() @ y.float().T).to(dtype).float()
        squares = (squares.to(dtype) + column).clamp_min_(0).float()
        if torch.isfinite(squares).all():
            break
    return squares
