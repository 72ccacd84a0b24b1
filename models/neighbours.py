"""Exact nearest neighbours, and exact membership of balls, in blocks of bounded memory.

A float32 matrix product of centred features gives every squared distance with a bound on its error. Whatever the bound
leaves undecided, mostly ties, is decided by summing squared differences in float64. The results therefore depend on
neither the block size nor the device, a large mean of the features does no harm, and rows can be divided among workers.
Beside the features this needs a centred copy of them and a few blocks of `BLOCK_BYTES`. The products run on PyTorch's
default device, so `with torch.device("cuda"):` moves them to the GPU (without TF32). Arguments and results are NumPy
arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Array, check_features

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

BLOCK_BYTES = 64 * 2**20  # of one float32 block of distances
CHUNK = 128  # rows of features that are processed at once, so that they stay in the CPU's cache
SPARE = 3  # candidates beyond k that are measured exactly, so that rounding rarely hides a true neighbour
ALL = slice(None)


@dataclass(frozen=True)
class Neighbours:
    """The k nearest targets of each query in ascending order of distance; ties in ascending order of the index."""

    index: Indices  # [N, k]
    squared: Array  # [N, k] squared Euclidean distances, float64


def nearest(queries: Array, targets: Array, k: int, weights: Array | None = None, rows: slice = ALL) -> Neighbours:
    """Return the k targets [M, D] nearest to each query [N, D].

    If `queries is targets`, a row is not a neighbour of itself.

    Args:
        weights: [M] positive factors by which the squared distances to the targets are multiplied first.
        rows: the queries whose neighbours are returned, all by default.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or there are fewer than k targets.
    """
    check_features(queries, targets)
    own = queries is targets
    if len(targets) - own < k:
        raise ValueError(f"{len(targets)} rows have no k={k} neighbours; give at least {k + own} rows")
    weight = np.ones(len(targets)) if weights is None else np.asarray(weights, np.float64)
    parts = [_block_nearest(queries, targets, block, k, weight, own) for block in blocks(queries, targets, rows)]
    return Neighbours(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _block_nearest(
    queries: Array, targets: Array, block: "Block", k: int, weight: Array, own: bool
) -> tuple[Indices, Array]:
    """Return index and squared distance [b, k] of the true neighbours of a block's rows."""
    positions = np.arange(block.rows.start, block.rows.stop)
    lower = block.lower.mul_(torch.as_tensor(weight, dtype=torch.float32))
    if own:
        lower[torch.arange(len(positions)), torch.as_tensor(positions)] = torch.inf
    num_others = len(targets) - own
    smallest = lower.topk(min(k + SPARE, num_others), dim=1, largest=False)
    bounds, candidates = smallest.values.cpu().numpy(), smallest.indices.cpu().numpy()
    exact = squared_distances(queries, np.repeat(positions, candidates.shape[1]), targets, candidates.ravel())
    index, squared = _sorted(weight[candidates] * exact.reshape(candidates.shape), candidates, k)
    if candidates.shape[1] < num_others:  # where another target could be as near, measure all of them
        everything = np.arange(len(targets))
        for row in np.flatnonzero(bounds[:, -1] <= squared[:, -1]):
            full = weight * squared_distances(queries, np.full(len(targets), positions[row]), targets, everything)
            if own:
                full[positions[row]] = np.inf
            index[row], squared[row] = _sorted(full[None], everything[None], k)
    return index, squared


def _sorted(values: Array, index: Indices, k: int) -> tuple[Indices, Array]:
    order = np.lexsort((index, values), axis=1)[:, :k]
    return np.take_along_axis(index, order, axis=1), np.take_along_axis(values, order, axis=1)


def squared_radii(features: Array, k: int, rows: slice = ALL) -> Array:
    """Return the squared distance [N] of each row of features to its k-th nearest other row."""
    return nearest(features, features, k, rows=rows).squared[:, -1]


@dataclass(frozen=True)
class Block:
    """Lower bounds on the squared distances of some points to all centres, and how far above them the truth can be."""

    rows: slice  # of the points
    lower: Tensor  # [b, M] float32; the squared distance is at most lower + point_slack + centre_slack
    point_slack: Tensor  # [b]
    centre_slack: Tensor  # [M]


def blocks(points: Array, centres: Array, rows: slice = ALL) -> Iterator[Block]:
    """Yield the given rows of points [N, D] block by block; each block's memory is reused for the next one.

    |u|^2 - 2 u.v + |v|^2 in float32 has an error of at most a multiple of eps (|u|^2 + |v|^2): a few roundings, and
    those of a sum of D products, which stay below 8 sqrt(D) eps except with probability 1e-13 (Higham & Mary 2019,
    theorem 2.4).
    """
    mean = centres.mean(axis=0, dtype=np.float64)
    v, v_squares = _centred(centres, mean)
    slack = (32 + 8 * np.sqrt(points.shape[1])) * 2.0**-24
    begin, end, _ = rows.indices(len(points))
    size = min(max(1, BLOCK_BYTES // (4 * len(centres))), max(end - begin, 1))
    memory = torch.empty(size, len(centres))
    for start in range(begin, end, size):
        part = slice(start, min(start + size, end))
        u, u_squares = (v[part], v_squares[part]) if points is centres else _centred(points[part], mean)
        lower = torch.addmm(v_squares * (1 - slack), u, v.T, alpha=-2, out=memory[: len(u)])
        lower.add_(u_squares[:, None], alpha=1 - slack)
        yield Block(part, lower, 2 * slack * u_squares, 2 * slack * v_squares)


def pairs_within(
    points: Array, centres: Array, block: Block, squared: Array, strict: bool = False
) -> tuple[Indices, Indices]:
    """Return (row of the block, centre) of all pairs whose squared distance is at most `squared`, or below if strict.

    `squared` is broadcast to [b, M]: shape [M] means balls around the centres, [b, 1] balls around the points.
    """
    threshold = torch.as_tensor(np.asarray(squared, np.float32)).expand(block.lower.shape)
    at = torch.nonzero(block.lower <= threshold, as_tuple=True)
    upper = block.lower[at] + block.point_slack[at[0]] + block.centre_slack[at[1]]
    within = (upper < threshold[at]).cpu().numpy()
    rows, columns = (index.cpu().numpy() for index in at)
    open_rows, open_columns = rows[~within], columns[~within]
    distances = squared_distances(points, open_rows + block.rows.start, centres, open_columns)
    limits = np.broadcast_to(squared, block.lower.shape)[open_rows, open_columns]
    within[~within] = distances < limits if strict else distances <= limits
    return rows[within], columns[within]


def _centred(features: Array, mean: Array) -> tuple[Tensor, Tensor]:
    """Return features less mean and their squared norms in float32, to within a few roundings.

    A float32 row less the mean's float32 part is exact where the two are close, which is where it matters.
    """
    coarse = mean.astype(np.float32)
    rest = (mean - coarse).astype(np.float32)
    centred, squares = np.empty(features.shape, np.float32), np.empty(len(features), np.float32)
    for start in range(0, len(features), CHUNK):
        rows = features[start : start + CHUNK]
        part = (rows - coarse) - rest if rows.dtype == np.float32 else (rows - mean).astype(np.float32)
        centred[start : start + CHUNK], squares[start : start + CHUNK] = part, (part * part).sum(axis=1)
    if not float(squares.max()) < 1e36:
        raise ValueError("features spread too far for float32 distances; scale them down")
    return torch.as_tensor(centred), torch.as_tensor(squares)


def squared_distances(queries: Array, rows: Indices, targets: Array, columns: Indices) -> Array:
    """Return the squared distances of the pairs (rows[p], columns[p]), summed directly in float64: equal pairs tie."""
    squares = np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        difference = np.asarray(queries[rows[part]], np.float64) - targets[columns[part]]
        squares[part] = np.square(difference, out=difference).sum(axis=1)
    return squares
