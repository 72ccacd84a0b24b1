"""Metrics of nearest neighbours: precision, recall, density, coverage, realism, copies.

Distances are decided exactly: a float32 matrix product of centred features gives each squared distance with a
bound on its error, and only what the bound leaves open (ties, mostly) is decided by summing squared
differences in float64. So the answers depend neither on block sizes nor on the device, a large mean does no
harm, and rows may be shared out among workers. Memory beyond the features is a few blocks of `BLOCK_BYTES`.

As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over
samples has the interval of a mean; one that depends on the set of samples (recall, coverage) has one from
random halves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Z95, Array, Estimate, check_features, mean_estimate, proportion_estimate

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

BLOCK_BYTES = 128 * 2**20  # of one float32 block of distances
MAX_ROWS = 1024  # of one block: small, so that one triangle of a set's own distances is little more than half
SPARE = 3  # candidates beyond k that are measured exactly, so that rounding rarely hides a true neighbour
OPENAI_BLOCK = 10_000  # rows and columns of one block in the published evaluator
NUM_HALVES = 50  # random halves behind the interval of a metric of the whole set


@dataclass(frozen=True)
class Neighbours:
    """The k nearest targets of each query, nearest first, the lower index first on ties."""

    index: Indices  # [N, k]
    squared: Array  # [N, k] squared Euclidean distances, float64


def nearest(queries: Array, targets: Array, k: int, weights: Array | None = None) -> Neighbours:
    """The k targets [M, D] nearest to each query [N, D]; with `queries is targets` a row is not its own neighbour.

    With weights [M], squared distances to target j are multiplied by weights[j] first. Raises ValueError on
    shapes, values that are not finite, and where there are not k targets.
    """
    others = len(targets) - (queries is targets)
    if others < k:
        raise ValueError(f"k={k} neighbours of each row need more than the {len(targets)} rows given")
    weight = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    return _measured(queries, targets, _shortlist(queries, targets, min(k + SPARE, others), weight), k, weight)


@dataclass(frozen=True)
class _Shortlist:
    """The targets with the smallest lower bounds of (weighted) squared distance to each query, smallest first."""

    bounds: Tensor  # [N, kept] float32; every other target's bound is at least the last
    index: Tensor  # [N, kept]

    def offer(self, rows: slice, bounds: Tensor, first: int) -> None:
        """Lets bounds [rows, c] of the targets from `first` on compete with those that are listed."""
        kept = self.bounds.shape[1]
        values, columns = bounds.topk(min(kept, bounds.shape[1]), dim=1, largest=False)
        values, columns = torch.cat([self.bounds[rows], values], 1), torch.cat([self.index[rows], columns + first], 1)
        self.bounds[rows], order = values.topk(kept, dim=1, largest=False)
        self.index[rows] = columns.gather(1, order)


def _shortlist(queries: Array, targets: Array, kept: int, weight: Array) -> _Shortlist:
    check_features(queries, targets)
    same = queries is targets  # then one triangle of the distances says all
    shortlist = _Shortlist(
        torch.full((len(queries), kept), torch.inf), torch.zeros(len(queries), kept, dtype=torch.long)
    )
    factors = torch.from_numpy(weight).float()
    for block in _bounded_squares(queries, targets, triangle=same):
        if same:
            shortlist.offer(block.rows, block.lower.fill_diagonal_(torch.inf), block.columns.start)
            below, beside = slice(block.rows.stop, len(queries)), block.lower[:, len(block.lower) :]
            if beside.numel():
                shortlist.offer(below, beside.T.contiguous(), block.rows.start)
        else:
            shortlist.offer(block.rows, block.lower.mul_(factors), 0)
    return shortlist


def _measured(queries: Array, targets: Array, shortlist: _Shortlist, k: int, weight: Array) -> Neighbours:
    """The k nearest in truth: those of the shortlist are measured, and all where it could have missed one."""
    kept = min(k + SPARE, shortlist.index.shape[1])
    bounds, candidates = shortlist.bounds[:, :kept].numpy(), shortlist.index[:, :kept].numpy()
    rows = np.repeat(np.arange(len(queries)), kept)
    exact = _squares(queries, rows, targets, candidates.ravel()).reshape(candidates.shape)
    index, squared = _first(weight[candidates] * exact, candidates, k)
    if kept == len(targets) - (queries is targets):
        return Neighbours(index, squared)
    for row in np.flatnonzero(bounds[:, -1] <= squared[:, -1]):
        full = weight * _squares(queries, np.full(len(targets), row), targets, np.arange(len(targets)))
        if queries is targets:
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
    _check_balls(points, centres, radii)
    counts = np.zeros(len(points), np.int64)
    for block in _bounded_squares(points, centres):
        counts[block.rows] = _held(points, centres, block, radii, strict).sum(1).numpy()
    return counts


def any_ball_holds(points: Array, centres: Array, radii: Array) -> Mask:
    """[N] whether at least one ball holds each point, its surface included."""
    return balls_holding(points, centres, radii) > 0


def _held(points: Array, centres: Array, block: "_Block", radii: Array, strict: bool = False) -> Tensor:
    """[b, M] which balls around centres hold the block's points: by the bounds, and measured where they are open."""
    threshold = torch.from_numpy(np.asarray(radii, np.float32))
    possible = block.lower <= threshold
    held = block.lower + block.row_slack[:, None] < threshold - block.column_slack
    rows, columns = (i.numpy() for i in torch.nonzero(possible.logical_and_(~held), as_tuple=True))
    squares = _squares(points, rows + block.rows.start, centres, columns + block.columns.start)
    inside = squares < radii[columns] if strict else squares <= radii[columns]
    held[rows[inside], columns[inside]] = True
    return held


def _check_balls(points: Array, centres: Array, radii: Array) -> None:
    check_features(points, centres)
    if radii.shape != (len(centres),):
        raise ValueError(f"radii have shape {radii.shape}; wanted one for each of {len(centres)} centres")


@dataclass(frozen=True)
class _Block:
    """Lower bounds of the squared distances between some points and some centres, and the width of the bounds."""

    rows: slice  # of the points
    columns: slice  # of the centres
    lower: Tensor  # [b, c] float32; the distance is at most lower + row_slack + column_slack
    row_slack: Tensor  # [b]
    column_slack: Tensor  # [c]

    @property
    def transposed(self) -> "_Block":
        return _Block(self.columns, self.rows, self.lower.T, self.column_slack, self.row_slack)


def _bounded_squares(points: Array, centres: Array, triangle: bool = False) -> Iterator[_Block]:
    """Blocks of rows; with `triangle` (points and centres being one set) without the columns before the first row.

    |u|^2 - 2 u.v + |v|^2 in float32 errs by a multiple of eps (|u|^2 + |v|^2): a few roundings, and those of
    a sum of D products, which stay below 8 sqrt(D) eps but for a chance of 1e-13 (Higham & Mary 2019, theorem
    2.4).
    """
    mean = centres.mean(axis=0, dtype=np.float64)
    v, v_squares = _centred(centres, mean)
    slack = (32 + 8 * np.sqrt(points.shape[1])) * 2.0**-24
    size = min(max(1, BLOCK_BYTES // (4 * len(centres))), MAX_ROWS)
    for start in range(0, len(points), size):
        rows = slice(start, min(start + size, len(points)))
        columns = slice(start if triangle else 0, len(centres))
        u, u_squares = (v[rows], v_squares[rows]) if triangle else _centred(points[rows], mean)
        lower = torch.addmm(v_squares[columns] * (1 - slack), u, v[columns].T, alpha=-2)
        lower.add_(u_squares[:, None], alpha=1 - slack)
        yield _Block(rows, columns, lower, 2 * slack * u_squares, 2 * slack * v_squares[columns])


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
    """Squared distances of the pairs (rows[p], columns[p]), summed directly in float64: equal pairs tie exactly."""
    squares = np.empty(len(rows))
    size = max(1, BLOCK_BYTES // (16 * queries.shape[1]))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        difference = np.asarray(queries[rows[part]], np.float64) - targets[columns[part]]
        squares[part] = np.square(difference, out=difference).sum(axis=1)
    return squares


# --- Fidelity and diversity ---------------------------------------------------------------------------------


def precision_recall(reference: Array, samples: Array, k: int = 3) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2): in this order, each with its interval.

    Precision: the share of samples [N, D] inside a ball around a reference row [M, D] that reaches to its
    k-th neighbour; recall: the share of reference rows inside such a ball around a sample. Collapsed samples
    have high precision and low recall. Raises ValueError where a set has not more than k rows.
    """
    check_features(reference, samples)
    real_radii = squared_radii(reference, k)
    if len(samples) <= k:
        raise ValueError(f"k={k} neighbours of each row need more than the {len(samples)} samples given")
    unweighted = np.ones(len(samples))
    shortlist = _shortlist(samples, samples, min(4 * k + 16, len(samples) - 1), unweighted)
    radii = _measured(samples, samples, shortlist, k, unweighted).squared[:, -1]
    half_radii = _radii_of_halves(samples, shortlist, k, _random_halves(len(samples), k))

    precise, recalled = np.zeros(len(samples), np.bool_), np.zeros(len(reference), np.bool_)
    recalled_by = np.zeros((len(half_radii), len(reference)), np.bool_)
    for block in _bounded_squares(samples, reference):
        precise[block.rows] = _held(samples, reference, block, real_radii).any(1).numpy()
        recalled |= _held(reference, samples, block.transposed, radii[block.rows]).any(1).numpy()
        _recall_by_halves(recalled_by, block, half_radii[:, block.rows])
    return proportion_estimate(precise), _halves_estimate(recalled, recalled_by, len(samples))


def density_coverage(reference: Array, samples: Array, k: int = 5) -> tuple[Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, eq. 4-5), with the strict comparison of their code.

    Density: in how many of the reference's k-neighbour balls a sample lies, over k; it can exceed 1.
    Coverage: the share of those balls that hold a sample.
    """
    check_features(reference, samples)
    radii, halves = squared_radii(reference, k), _random_halves(len(samples), k)
    counts, covered = np.zeros(len(samples), np.int64), np.zeros(len(reference), np.bool_)
    covered_by = np.zeros((len(halves), len(reference)), np.bool_)
    for block in _bounded_squares(samples, reference):
        held = _held(samples, reference, block, radii, strict=True)
        counts[block.rows] = held.sum(1).numpy()
        covered |= held.any(0).numpy()
        rows, columns = (i.numpy() for i in torch.nonzero(held, as_tuple=True))
        for half, covered_by_half in zip(halves[:, block.rows], covered_by, strict=True):
            covered_by_half[columns[half[rows]]] = True
    return mean_estimate(counts / k), _halves_estimate(covered, covered_by, len(samples))


def realism(reference: Array, samples: Array, k: int = 3) -> Array:
    """[N] largest ratio of a reference ball's radius to its distance from the sample (Kynkaanniemi et al. 2019, eq. 3).

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


def _random_halves(n: int, k: int) -> Mask:
    """[H, n] random halves of n samples, each without replacement; none where they would be too few for k."""
    rng = np.random.default_rng([n])
    halves = np.zeros((NUM_HALVES if n >= 4 * (k + 1) else 0, n), np.bool_)
    for half in halves:
        half[rng.choice(n, n // 2, replace=False)] = True
    return halves


def _halves_estimate(hits: Mask, hits_by: Mask, n: int) -> Estimate:
    """The share of hits [M] by all n samples; its interval from the hits [H, M] by random halves of them.

    Halves of n vary around the whole as the whole varies around its mean (the jackknife that deletes n/2),
    and hold no duplicates, which would enter each other's balls.
    """
    value = float(hits.mean())
    if not len(hits_by):
        return Estimate(value, n, note=f"no interval: n={n} samples are too few to halve")
    spread = float(hits_by.mean(axis=1).std(ddof=1)) * float(np.sqrt((n // 2) / (n - n // 2)))
    if spread == 0:
        return Estimate(value, n, note="no interval: the value is the same in every random half")
    return Estimate(value, n, max(value - Z95 * spread, 0.0), min(value + Z95 * spread, 1.0))


def _radii_of_halves(samples: Array, shortlist: _Shortlist, k: int, halves: Mask) -> NDArray[np.float32]:
    """[H, N] squared radii to the k-th neighbour within each half, -inf for samples outside it; roughly rounded."""
    bounds, index = shortlist.bounds.numpy(), shortlist.index.numpy()
    radii = np.full(halves.shape, -np.inf, np.float32)
    for half, reach in zip(halves, radii, strict=True):
        members = np.flatnonzero(half)
        rank = half[index[members]].cumsum(axis=1)
        reach[members] = bounds[members, (rank >= k).argmax(axis=1)]
        lost = members[rank[:, -1] < k]  # all but never: fewer than k of the listed neighbours are in this half
        if len(lost):
            reach[lost] = nearest(samples[lost], samples[half], k + 1).squared[:, -1]  # itself is the first
    return radii


def _recall_by_halves(recalled_by: Mask, block: _Block, half_radii: NDArray[np.float32]) -> None:
    """Marks in recalled_by [H, M] what the block's samples recall in the halves [H, b] that they belong to."""
    if not len(half_radii):
        return
    widest = torch.from_numpy(half_radii.max(axis=0))
    near = block.lower <= widest[:, None]
    rows, columns = (i.numpy() for i in torch.nonzero(near, as_tuple=True))
    squares = block.lower[near].numpy()
    for radii, recalled in zip(half_radii, recalled_by, strict=True):
        recalled[columns[squares <= radii[rows]]] = True


# --- The published evaluator's arithmetic -------------------------------------------------------------------


def precision_recall_openai(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """Precision and recall as ADM's evaluator computes them, in float16: for parity with published numbers only.

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
