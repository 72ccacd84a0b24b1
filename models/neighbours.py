"""Metrics of nearest neighbours: precision, recall, density, coverage, realism, copies.

Distances are decided exactly: a float32 matrix product of centred features gives each squared distance with a
bound on its error, and only what the bound leaves open (ties, mostly) is decided by summing squared
differences in float64. So the answers depend neither on block sizes nor on the device, a large mean does no
harm, and rows may be shared out among workers: a `Run` does the shares, in this process or on a pool, and the
numbers are the same to the bit. Memory beyond the features and one centred copy of them is a few blocks of
`BLOCK_BYTES`.

As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over
samples has the interval of a mean; one that depends on the set of samples (recall, coverage) has one from
random halves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Z95, Array, Estimate, check_features, mean_estimate, proportion_estimate

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

BLOCK_BYTES = 128 * 2**20  # of one float32 block of distances
MAX_ROWS = 512  # of one block: small, so that one triangle of a set's own distances is little more than half
CACHED_ROWS = 128  # rows of features that are worked on at once: they stay in the cache
SPARE = 3  # candidates beyond k that are measured exactly, so that rounding rarely hides a true neighbour
OPENAI_BLOCK = 10_000  # rows and columns of one block in the published evaluator
NUM_HALVES = 50  # random halves behind the interval of a metric of the whole set
SHARE_BLOCKS = 8  # blocks of rows in one share of the work

# Does step(reference, samples, *task) for every task, and answers in any order.
Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterable[Any]]


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
    check_features(queries, targets)
    if queries is targets:
        return _measured(queries, queries, _own_shortlist(queries, _kept(len(queries), k, k + SPARE)), k, own=True)
    if len(targets) < k:
        raise ValueError(f"k={k} neighbours of each row need more than the {len(targets)} rows given")
    weight = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    shortlist, factors = _Shortlist.empty(len(queries), min(k + SPARE, len(targets))), torch.from_numpy(weight).float()
    for block in _bounded_squares(queries, targets):
        shortlist.offer(block.rows, block.lower.mul_(factors), 0)
    return _measured(queries, targets, shortlist, k, weight)


def _kept(num_rows: int, k: int, wanted: int) -> int:
    """Length of a shortlist of a set's own rows, which are at most one fewer than it has."""
    if num_rows <= k:
        raise ValueError(f"k={k} neighbours of each row need more than the {num_rows} rows given")
    return min(wanted, num_rows - 1)


@dataclass(frozen=True)
class _Shortlist:
    """The targets with the smallest lower bounds of (weighted) squared distance to each query, smallest first."""

    bounds: Tensor  # [N, kept] float32; every other target's bound is at least the last
    index: Tensor  # [N, kept] int32

    @classmethod
    def empty(cls, num_rows: int, kept: int) -> "_Shortlist":
        """One on which every target will find a place."""
        return cls(torch.full((num_rows, kept), torch.inf), torch.zeros(num_rows, kept, dtype=torch.int32))

    def offer(self, rows: slice, bounds: Tensor, first: int) -> None:
        """Lets bounds [rows, c] of the targets from `first` on compete with those that are listed."""
        values, columns = bounds.topk(min(self.bounds.shape[1], bounds.shape[1]), dim=1, largest=False)
        self._compete(rows, values, (columns + first).to(torch.int32))

    def merge(self, rows: slice, other: "_Shortlist") -> None:
        """Takes in another shortlist of these rows, over other targets."""
        self._compete(rows, other.bounds, other.index)

    def _compete(self, rows: slice, bounds: Tensor, index: Tensor) -> None:
        bounds, index = torch.cat([self.bounds[rows], bounds], 1), torch.cat([self.index[rows], index], 1)
        self.bounds[rows], order = bounds.topk(self.bounds.shape[1], dim=1, largest=False)
        self.index[rows] = index.gather(1, order)


def _own_shortlist(features: Array, kept: int, share: slice | None = None) -> _Shortlist:
    """The nearest other rows of each row, from one triangle of the distances.

    With `share`, only what these rows say: of the rows from share.start on, since earlier ones have met them.
    """
    begin = share.start if share else 0
    shortlist = _Shortlist.empty(len(features) - begin, kept)
    for block in _bounded_squares(features, features, triangle=True, share=share):
        rows, height = slice(block.rows.start - begin, block.rows.stop - begin), len(block.lower)
        shortlist.offer(rows, block.lower.fill_diagonal_(torch.inf), block.columns.start)
        if block.lower.shape[1] > height:
            beside = block.lower[:, height:].T.contiguous()
            shortlist.offer(slice(rows.stop, None), beside, block.rows.start)
    return shortlist


def _measured(
    queries: Array,
    targets: Array,
    shortlist: _Shortlist,
    k: int,
    weight: Array | None = None,
    own: bool = False,
) -> Neighbours:
    """The k nearest in truth: those of the shortlist are measured, and all where it could have missed one.

    own: the two are one set, of whose rows none is its own neighbour.
    """
    weight = np.ones(len(targets)) if weight is None else weight
    kept = min(k + SPARE, shortlist.index.shape[1])
    bounds, candidates = shortlist.bounds[:, :kept].numpy(), shortlist.index[:, :kept].numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(queries)), kept)
    exact = _squares(queries, rows, targets, candidates.ravel()).reshape(candidates.shape)
    index, squared = _first(weight[candidates] * exact, candidates, k)
    if kept == len(targets) - own:
        return Neighbours(index, squared)
    for row in np.flatnonzero(bounds[:, -1] <= squared[:, -1]):
        full = weight * _squares(queries, np.full(len(targets), row), targets, np.arange(len(targets)))
        if own:
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


def _bounded_squares(
    points: Array, centres: Array, triangle: bool = False, share: slice | None = None
) -> Iterator[_Block]:
    """Blocks of rows (those of `share`); with `triangle` (points and centres being one set) only the columns from
    the block's first row on. Shares begin at multiples of `_block_rows`, so that all blocks are as without them.

    |u|^2 - 2 u.v + |v|^2 in float32 errs by a multiple of eps (|u|^2 + |v|^2): a few roundings, and those of
    a sum of D products, which stay below 8 sqrt(D) eps but for a chance of 1e-13 (Higham & Mary 2019, theorem
    2.4).
    """
    mean = centres.mean(axis=0, dtype=np.float64)
    v, v_squares = _centred(centres, mean)
    slack = (32 + 8 * np.sqrt(points.shape[1])) * 2.0**-24
    size = _block_rows(len(centres))
    begin, end = (share.start, share.stop) if share else (0, len(points))
    for start in range(begin, end, size):
        rows = slice(start, min(start + size, end))
        columns = slice(start if triangle else 0, len(centres))
        u, u_squares = (v[rows], v_squares[rows]) if triangle else _centred(points[rows], mean)
        lower = torch.addmm(v_squares[columns] * (1 - slack), u, v[columns].T, alpha=-2)
        lower.add_(u_squares[:, None], alpha=1 - slack)
        yield _Block(rows, columns, lower, 2 * slack * u_squares, 2 * slack * v_squares[columns])


def _block_rows(num_centres: int) -> int:
    return min(max(1, BLOCK_BYTES // (4 * num_centres)), MAX_ROWS)


def shares(num_rows: int, num_centres: int) -> list[slice]:
    """All rows, cut where blocks begin: the shares in which a `Run` gets them."""
    size = SHARE_BLOCKS * _block_rows(num_centres)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _centred(features: Array, mean: Array) -> tuple[Tensor, Tensor]:
    """Rows minus mean and their squared norms in float32, a few roundings of the result away from the truth.

    A float32 row less the mean's float32 part is exact where the two are close, which is where it matters.
    """
    coarse = mean.astype(np.float32)
    rest = (mean - coarse).astype(np.float32)
    centred, squares = np.empty(features.shape, np.float32), np.empty(len(features), np.float32)
    for start in range(0, len(features), CACHED_ROWS):
        rows = features[start : start + CACHED_ROWS]
        part = (rows - coarse) - rest if rows.dtype == np.float32 else (rows - mean).astype(np.float32)
        centred[start : start + CACHED_ROWS], squares[start : start + CACHED_ROWS] = part, (part * part).sum(axis=1)
    if not float(squares.max()) < 1e36:
        raise ValueError("features spread too far for float32 distances; scale them down")
    return torch.from_numpy(centred), torch.from_numpy(squares)


def _squares(queries: Array, rows: Indices, targets: Array, columns: Indices) -> Array:
    """Squared distances of the pairs (rows[p], columns[p]), summed directly in float64: equal pairs tie exactly."""
    squares = np.empty(len(rows))
    for start in range(0, len(rows), CACHED_ROWS):
        part = slice(start, start + CACHED_ROWS)
        difference = np.asarray(queries[rows[part]], np.float64) - targets[columns[part]]
        squares[part] = np.square(difference, out=difference).sum(axis=1)
    return squares


# --- Fidelity and diversity ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifolds:
    """What balls around neighbours say of samples against a reference, each number with its interval."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def here(reference: Array, samples: Array) -> Run:
    """Does the shares one after another in this process."""
    return lambda step, tasks: (step(reference, samples, *task) for task in tasks)


def manifolds(reference: Array, samples: Array, k: int = 3, strict_k: int = 5, run: Run | None = None) -> Manifolds:
    """`precision_recall` (of k neighbours) and `density_coverage` (of strict_k), from one pass over all pairs."""
    check_features(reference, samples)
    run = run or here(reference, samples)
    radii = _own_neighbours(reference, max(k, strict_k), run).squared
    fidelity = _Fidelity.of(samples, radii[:, k - 1], k, run)
    density = _Density.of(radii[:, strict_k - 1], strict_k, _random_halves(len(samples), strict_k))
    fidelity_shares, density_shares = _count(reference, samples, [fidelity, density], run)
    return Manifolds(*_Fidelity.estimates(fidelity_shares), *_Density.estimates(density_shares))


def precision_recall(reference: Array, samples: Array, k: int = 3, run: Run | None = None) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2): in this order, each with its interval.

    Precision: the share of samples [N, D] inside a ball around a reference row [M, D] that reaches to its
    k-th neighbour; recall: the share of reference rows inside such a ball around a sample. Collapsed samples
    have high precision and low recall. Raises ValueError where a set has not more than k rows.
    """
    check_features(reference, samples)
    run = run or here(reference, samples)
    fidelity = _Fidelity.of(samples, _own_neighbours(reference, k, run).squared[:, -1], k, run)
    return _Fidelity.estimates(_count(reference, samples, [fidelity], run)[0])


def density_coverage(reference: Array, samples: Array, k: int = 5, run: Run | None = None) -> tuple[Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, eq. 4-5), with the strict comparison of their code.

    Density: in how many of the reference's k-neighbour balls a sample lies, over k; it can exceed 1.
    Coverage: the share of those balls that hold a sample.
    """
    check_features(reference, samples)
    run = run or here(reference, samples)
    radii = _own_neighbours(reference, k, run).squared[:, -1]
    density = _Density.of(radii, k, _random_halves(len(samples), k))
    return _Density.estimates(_count(reference, samples, [density], run)[0])


def _own_neighbours(reference: Array, k: int, run: Run) -> Neighbours:
    kept = _kept(len(reference), k, k + SPARE)
    return _measured(reference, reference, _shared_shortlist(reference, kept, run, 0), k, own=True)


def _shared_shortlist(features: Array, kept: int, run: Run, which: int) -> _Shortlist:
    """`_own_shortlist` of the reference (which = 0) or the samples (1), its rows shared out."""
    tasks = [(which, kept, share) for share in shares(len(features), len(features))]
    shortlist = _Shortlist.empty(len(features), kept)
    for begin, part in run(_shortlist_step, tasks):
        shortlist.merge(slice(begin, None), part)
    return shortlist


def _shortlist_step(reference: Array, samples: Array, which: int, kept: int, share: slice) -> tuple[int, _Shortlist]:
    return share.start, _own_shortlist((reference, samples)[which], kept, share)


class _Count(Protocol):
    """What a pass over all pairs of samples and reference rows adds up, for all samples or a share of them."""

    def share(self, rows: slice) -> "_Count": ...

    def add(self, reference: Array, samples: Array, block: "_Block", rows: slice) -> None: ...


def _count(reference: Array, samples: Array, counts: "Sequence[_Fidelity | _Density]", run: Run) -> list[list[Any]]:
    """For each of the counts its shares, filled, in the order of their rows."""
    tasks = [([count.share(rows) for count in counts], rows) for rows in shares(len(samples), len(reference))]
    answers = sorted(run(_count_step, tasks), key=lambda answer: answer[0])
    return [list(parts) for parts in zip(*(counts for _, counts in answers), strict=True)]


def _count_step(reference: Array, samples: Array, counts: "list[_Count]", share: slice) -> tuple[int, "list[_Count]"]:
    counts = [count.share(slice(None)) for count in counts]  # afresh: what came from a pool's driver is read-only
    for block in _bounded_squares(samples, reference, share=share):
        rows = slice(block.rows.start - share.start, block.rows.stop - share.start)
        for count in counts:
            count.add(reference, samples, block, rows)
    return share.start, counts


@dataclass(frozen=True)
class _Fidelity:
    """Which samples lie in balls of the reference, and which reference rows in balls of samples or of half of them."""

    real_radii: Array  # [M] squared, as all radii here
    radii: Array  # [N]
    half_radii: NDArray[np.float32]  # [H, N] within each half, -inf for samples outside it; roughly rounded
    precise: Mask  # [N]
    recalled: Mask  # [M]
    recalled_by: Mask  # [H, M]

    @classmethod
    def of(cls, samples: Array, real_radii: Array, k: int, run: Run) -> "_Fidelity":
        """The balls of all samples, with nothing counted."""
        n = len(samples)
        shortlist = _shared_shortlist(samples, _kept(n, k, 4 * k + 16), run, 1)
        radii = _measured(samples, samples, shortlist, k, own=True).squared[:, -1]
        half_radii = _radii_of_halves(samples, shortlist, k, _random_halves(n, k))
        return cls._empty(real_radii, radii, half_radii)

    @classmethod
    def _empty(cls, real_radii: Array, radii: Array, half_radii: NDArray[np.float32]) -> "_Fidelity":
        n, m, halves = len(radii), len(real_radii), len(half_radii)
        nothing = (np.zeros(shape, np.bool_) for shape in (n, m, (halves, m)))
        return cls(real_radii, radii, half_radii, *nothing)

    def share(self, rows: slice) -> "_Fidelity":
        return self._empty(self.real_radii, self.radii[rows], self.half_radii[:, rows])

    def add(self, reference: Array, samples: Array, block: "_Block", rows: slice) -> None:
        self.precise[rows] = _held(samples, reference, block, self.real_radii).any(1).numpy()
        self.recalled[:] |= _held(reference, samples, block.transposed, self.radii[rows]).any(1).numpy()
        _recall_by_halves(self.recalled_by, block, self.half_radii[:, rows])

    @staticmethod
    def estimates(shares: "list[_Fidelity]") -> tuple[Estimate, Estimate]:
        """Precision and recall."""
        precise = np.concatenate([share.precise for share in shares])
        recalled = np.any([share.recalled for share in shares], axis=0)
        recalled_by = np.any([share.recalled_by for share in shares], axis=0)
        return proportion_estimate(precise), _halves_estimate(recalled, recalled_by, len(precise))


@dataclass(frozen=True)
class _Density:
    """In how many balls of the reference each sample lies, and which balls hold a sample, of all or of half of them."""

    k: int
    radii: Array  # [M] squared, of the reference's balls
    halves: Mask  # [H, N]
    counts: Indices  # [N]
    covered: Mask  # [M]
    covered_by: Mask  # [H, M]

    @classmethod
    def of(cls, radii: Array, k: int, halves: Mask) -> "_Density":
        """Nothing counted yet."""
        num_halves, n = halves.shape
        nothing = (np.zeros(shape, np.bool_) for shape in (len(radii), (num_halves, len(radii))))
        return cls(k, radii, halves, np.zeros(n, np.int64), *nothing)

    def share(self, rows: slice) -> "_Density":
        return self.of(self.radii, self.k, self.halves[:, rows])

    def add(self, reference: Array, samples: Array, block: "_Block", rows: slice) -> None:
        held = _held(samples, reference, block, self.radii, strict=True)
        self.counts[rows] = held.sum(1).numpy()
        self.covered[:] |= held.any(0).numpy()
        inside, balls = (i.numpy() for i in torch.nonzero(held, as_tuple=True))
        for half, covered_by_half in zip(self.halves[:, rows], self.covered_by, strict=True):
            covered_by_half[balls[half[inside]]] = True

    @staticmethod
    def estimates(shares: "list[_Density]") -> tuple[Estimate, Estimate]:
        """Density and coverage."""
        counts = np.concatenate([share.counts for share in shares])
        covered = np.any([share.covered for share in shares], axis=0)
        covered_by = np.any([share.covered_by for share in shares], axis=0)
        return mean_estimate(counts / shares[0].k), _halves_estimate(covered, covered_by, len(counts))


def realism(reference: Array, samples: Array, k: int = 3, run: Run | None = None) -> Array:
    """[N] largest ratio of a reference ball's radius to its distance from the sample (Kynkaanniemi et al. 2019, eq. 3).

    At least 1 means inside the reference's manifold; infinite for an exact copy. All balls are kept, also the
    widest; those of radius 0 (rows with k copies) can realise nothing but their copies and are left out.
    """
    check_features(reference, samples)
    run = run or here(reference, samples)
    radii = _own_neighbours(reference, k, run).squared[:, -1]
    if not (radii > 0).any():
        raise ValueError(f"every reference row has {k} exact copies; realism is not defined")
    found = dict(run(_realism_step, [(radii, rows) for rows in shares(len(samples), len(reference))]))
    return np.concatenate([found[begin] for begin in sorted(found)])


def _realism_step(reference: Array, samples: Array, radii: Array, rows: slice) -> tuple[int, Array]:
    wide = radii > 0
    with np.errstate(divide="ignore"):
        squared = nearest(samples[rows], reference[wide], 1, weights=1 / radii[wide]).squared[:, 0]
        return rows.start, 1 / np.sqrt(squared)


def authenticity(reference: Array, samples: Array) -> Estimate:
    """AuthPct: % of samples farther from their nearest reference row than that row is from its own nearest.

    Copies pull it down (Alaa et al. 2022). Value and interval are percentages, 0..100.
    """
    own = nearest(samples, reference, 1)
    return authentic_share(own.squared[:, 0], squared_radii(reference, 1)[own.index[:, 0]])


def authentic_share(squared: Array, own_squared: Array) -> Estimate:
    """AuthPct from squared distances: of each sample to its nearest reference row, of that row to its own nearest."""
    share = proportion_estimate(squared > own_squared)
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
