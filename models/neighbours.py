"""Nearest neighbours and balls around them, decided exactly.

A float32 matrix product of centred features gives each squared distance with a bound on its error, and only what the
bound leaves open (ties, mostly) is decided by summing squared differences in float64. So the answers depend neither on
block sizes nor on the device, a large mean does no harm, and rows may be shared out among workers. Memory beyond the
features and one centred copy of them is a few blocks of `BLOCK_BYTES`. The products run on torch's current device:
`with torch.device("cuda"):` puts them there, without TF32. Features come from the host, and results go there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Array, check_features

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

BLOCK_BYTES = 128 * 2**20  # of one float32 block of distances
MAX_ROWS = 512  # of one block: small, so that one triangle of a set's own distances is little more than half
CACHED_ROWS = 128  # rows of features that are worked on at once: they stay in the cache
SPARE = 3  # candidates beyond k that are measured exactly, so that rounding rarely hides a true neighbour
SHARE_BLOCKS = 16  # blocks of rows in one share of the work


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
        return own_neighbours(queries, k, [(0, own_shortlist(queries, k, slice(0, len(queries))))])
    if len(targets) < k:
        raise ValueError(f"k={k} neighbours of each row need more than the {len(targets)} rows given")
    weight = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    shortlist, factors = Shortlist.empty(len(queries), len(targets), k), torch.as_tensor(weight, dtype=torch.float32)
    for block in bounded_squares(queries, targets):
        shortlist.offer(block.rows, block.lower.mul_(factors), 0)
    return _measured(queries, targets, shortlist, k, weight)


@dataclass(frozen=True)
class Shortlist:
    """The targets with the smallest lower bounds of (weighted) squared distance to each query, smallest first."""

    bounds: Tensor  # [N, kept] float32; every other target's bound is at least the last
    index: Tensor  # [N, kept] int32

    @classmethod
    def empty(cls, num_rows: int, num_targets: int, k: int) -> "Shortlist":
        """One on which every target will find a place, a few longer than k."""
        shape = num_rows, min(k + SPARE, num_targets)
        return cls(torch.full(shape, torch.inf), torch.zeros(shape, dtype=torch.int32))

    def offer(self, rows: slice, bounds: Tensor, first: int) -> None:
        """Lets bounds [rows, c] of the targets from `first` on compete with those that are listed."""
        values, columns = bounds.topk(min(self.bounds.shape[1], bounds.shape[1]), dim=1, largest=False)
        self.compete(rows, values, (columns + first).to(torch.int32))

    def compete(self, rows: slice, bounds: Tensor, index: Tensor) -> None:
        """Lets other targets, by their bounds and indices, compete with those that are listed."""
        bounds = torch.cat([self.bounds[rows], bounds.to(self.bounds.device)], 1)
        index = torch.cat([self.index[rows], index.to(self.index.device)], 1)
        self.bounds[rows], order = bounds.topk(self.bounds.shape[1], dim=1, largest=False)
        self.index[rows] = index.gather(1, order)


def own_shortlist(features: Array, k: int, share: slice) -> Shortlist:
    """The nearest other rows of each row from share.start on, as far as the rows of the share say: one triangle of the
    distances, since earlier rows have met these."""
    shortlist = Shortlist.empty(len(features) - share.start, len(features) - 1, k)
    for block in bounded_squares(features, features, triangle=True, share=share):
        rows, height = slice(block.rows.start - share.start, block.rows.stop - share.start), len(block.lower)
        shortlist.offer(rows, block.lower.fill_diagonal_(torch.inf), block.columns.start)
        if block.lower.shape[1] > height:
            shortlist.offer(slice(rows.stop, None), block.lower[:, height:].T.contiguous(), block.rows.start)
    return Shortlist(shortlist.bounds.cpu(), shortlist.index.cpu())  # it may travel to a process without a GPU


def own_neighbours(features: Array, k: int, parts: Iterable[tuple[int, Shortlist]]) -> Neighbours:
    """The k nearest other rows of each row, from the `own_shortlist` of every share and where that begins."""
    if len(features) <= k:
        raise ValueError(f"k={k} neighbours of each row need more than the {len(features)} rows given")
    shortlist = Shortlist.empty(len(features), len(features) - 1, k)
    for begin, part in parts:
        shortlist.compete(slice(begin, None), part.bounds, part.index)
    return _measured(features, features, shortlist, k, np.ones(len(features)), own=True)


def _measured(
    queries: Array, targets: Array, shortlist: Shortlist, k: int, weight: Array, own: bool = False
) -> Neighbours:
    """The k nearest in truth: those of the shortlist are measured, and all where it could have missed one."""
    bounds, candidates = shortlist.bounds.cpu().numpy(), shortlist.index.cpu().numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(queries)), candidates.shape[1])
    exact = _squares(queries, rows, targets, candidates.ravel()).reshape(candidates.shape)
    index, squared = _first(weight[candidates] * exact, candidates, k)
    if candidates.shape[1] == len(targets) - own:
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


def pairs_in_balls(
    points: Array, centres: Array, block: "Block", radii: Array, strict: bool = False
) -> tuple[Indices, Indices]:
    """(row, column) in the block of every point and ball around a centre that holds it: by the bounds, and measured
    where they are open."""
    threshold = torch.as_tensor(np.asarray(radii, np.float32))
    at = torch.nonzero(block.lower <= threshold, as_tuple=True)
    held = (block.lower[at] + block.row_slack[at[0]] < (threshold - block.column_slack)[at[1]]).cpu().numpy()
    rows, columns = (index.cpu().numpy() for index in at)
    open_rows, open_columns = rows[~held], columns[~held]
    squares = _squares(points, open_rows + block.rows.start, centres, open_columns + block.columns.start)
    held[~held] = squares < radii[open_columns] if strict else squares <= radii[open_columns]
    return rows[held], columns[held]


@dataclass(frozen=True)
class Block:
    """Lower bounds of the squared distances between some points and some centres, and the width of the bounds."""

    rows: slice  # of the points
    columns: slice  # of the centres
    lower: Tensor  # [b, c] float32; the distance is at most lower + row_slack + column_slack
    row_slack: Tensor  # [b]
    column_slack: Tensor  # [c]

    @property
    def transposed(self) -> "Block":
        return Block(self.columns, self.rows, self.lower.T, self.column_slack, self.row_slack)


def bounded_squares(
    points: Array, centres: Array, triangle: bool = False, share: slice | None = None
) -> Iterator[Block]:
    """Blocks of rows (those of `share`); with `triangle` (points and centres being one set) only the columns from
    the block's first row on. Shares begin at multiples of `_block_rows`, so that all blocks are as without them.
    A block is good until the next one, which takes its memory.

    |u|^2 - 2 u.v + |v|^2 in float32 errs by a multiple of eps (|u|^2 + |v|^2): a few roundings, and those of
    a sum of D products, which stay below 8 sqrt(D) eps but for a chance of 1e-13 (Higham & Mary 2019, theorem
    2.4).
    """
    mean = centres.mean(axis=0, dtype=np.float64)
    v, v_squares = _centred(centres, mean)
    slack = (32 + 8 * np.sqrt(points.shape[1])) * 2.0**-24
    size = _block_rows(len(centres))
    begin, end = (share.start, share.stop) if share else (0, len(points))
    memory = torch.empty(size * len(centres))
    for start in range(begin, end, size):
        rows = slice(start, min(start + size, end))
        columns = slice(start if triangle else 0, len(centres))
        u, u_squares = (v[rows], v_squares[rows]) if triangle else _centred(points[rows], mean)
        lower = memory[: len(u) * (columns.stop - columns.start)].view(len(u), -1)
        torch.addmm(v_squares[columns] * (1 - slack), u, v[columns].T, alpha=-2, out=lower)
        lower.add_(u_squares[:, None], alpha=1 - slack)
        yield Block(rows, columns, lower, 2 * slack * u_squares, 2 * slack * v_squares[columns])


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
    return torch.as_tensor(centred), torch.as_tensor(squares)


def _squares(queries: Array, rows: Indices, targets: Array, columns: Indices) -> Array:
    """Squared distances of the pairs (rows[p], columns[p]), summed directly in float64: equal pairs tie exactly."""
    squares = np.empty(len(rows))
    for start in range(0, len(rows), CACHED_ROWS):
        part = slice(start, start + CACHED_ROWS)
        difference = np.asarray(queries[rows[part]], np.float64) - targets[columns[part]]
        squares[part] = np.square(difference, out=difference).sum(axis=1)
    return squares
