"""Exact nearest neighbours, and exact membership of balls, in blocks of bounded memory.

A float32 matrix product of centred features gives every squared distance with a bound on its error. Comparisons that
the bound leaves undecided, which are mostly ties, are decided by sums of squared differences in float64. Therefore the
results depend on neither the block size nor the device, and a large mean of the features does no harm. The products run
on PyTorch's default device, so `with torch.device("cuda"):` moves them to the GPU (without TF32). Arguments and results
are NumPy arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Array, check_features

Indices = NDArray[np.int64]

BLOCK_BYTES = 16 * 2**20  # of one float32 block of distances, small enough for the allocator to reuse its memory
CHUNK = 128  # rows of features that are processed at once, so that they stay in the CPU's cache


@dataclass(frozen=True)
class Neighbours:
    """The k nearest targets of each query in ascending order of distance; ties in ascending order of the index."""

    index: Indices  # [N, k]
    squared: Array  # [N, k] squared Euclidean distances, float64


def nearest(queries: Array, targets: Array, k: int, weights: Array | None = None) -> Neighbours:
    """Return the k targets [M, D] nearest to each query [N, D].

    If both arguments are the same array, a row is not a neighbour of itself.

    Args:
        weights: [M] positive factors by which the squared distances to the targets are multiplied first.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or there are fewer than k targets.
    """
    check_features(queries, targets)
    same_set = queries is targets
    if len(targets) - same_set < k:
        raise ValueError(f"{len(targets)} rows are too few for k={k} neighbours; at least {k + same_set} are needed")
    index, squared = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for block in blocks(queries, targets):
        lower, upper = block.lower, block.upper
        if weights is not None:
            factor = torch.as_tensor(weights, dtype=torch.float32)
            lower, upper = lower * factor, upper * factor
        if same_set:
            lower.diagonal(block.rows.start).fill_(torch.inf)
            upper.diagonal(block.rows.start).fill_(torch.inf)
        # Targets that are certainly farther than k others are no candidates.
        limit = upper.topk(k, dim=1, largest=False).values[:, -1:]
        rows, columns = (indices.cpu().numpy() for indices in torch.nonzero(lower <= limit, as_tuple=True))
        exact = squared_distances(queries, rows + block.rows.start, targets, columns)
        if weights is not None:
            exact *= weights[columns]
        order = np.lexsort((columns, exact, rows))  # by row, then by distance, then by index
        first_k = order[np.searchsorted(rows, np.arange(len(lower)))[:, None] + np.arange(k)]
        index[block.rows], squared[block.rows] = columns[first_k], exact[first_k]
    return Neighbours(index, squared)


def squared_radii(features: Array, k: int) -> Array:
    """Return the squared distance [N] of each row of features to its k-th nearest other row."""
    return nearest(features, features, k).squared[:, -1]


@dataclass(frozen=True)
class Block:
    """Bounds on the squared distances of b consecutive points to all centres."""

    points: Array  # [N, D], all points
    centres: Array  # [M, D]
    rows: slice  # indices of the b points of this block
    lower: Tensor  # float32 [b, M]
    upper: Tensor  # float32 [b, M]

    def within(self, squared: Array) -> tuple[Indices, Indices]:
        """Return the indices (points, centres) of all pairs whose squared distance is at most `squared`.

        Args:
            squared: [M] for balls around the centres, or [b, 1] for balls around the points of this block.
        """
        threshold = torch.as_tensor(np.asarray(squared, np.float32))
        candidates = torch.nonzero(self.lower <= threshold, as_tuple=True)
        within = (self.upper[candidates] < threshold.expand_as(self.upper)[candidates]).cpu().numpy()
        undecided = ~within
        rows, columns = (indices.cpu().numpy() for indices in candidates)
        limits = np.broadcast_to(squared, self.lower.shape)[rows[undecided], columns[undecided]]
        rows += self.rows.start
        exact = squared_distances(self.points, rows[undecided], self.centres, columns[undecided])
        within[undecided] = exact <= limits
        return rows[within], columns[within]


def blocks(points: Array, centres: Array) -> Iterator[Block]:
    """Yield bounds on the squared distances of points [N, D] to centres [M, D], block by block.

    The float32 error of |u|^2 - 2 u.v + |v|^2 is at most a multiple of eps (|u|^2 + |v|^2). It consists of a few
    roundings and of those in a sum of D products, which stay below 8 sqrt(D) eps except with probability 1e-13 (Higham
    & Mary 2019, theorem 2.4).
    """
    mean = centres.mean(axis=0, dtype=np.float64)
    v, v_squares = _centre(centres, mean)
    slack = (32 + 8 * np.sqrt(points.shape[1])) * 2.0**-24
    size = max(1, BLOCK_BYTES // (4 * len(centres)))
    for start in range(0, len(points), size):
        rows = slice(start, min(start + size, len(points)))
        u, u_squares = (v[rows], v_squares[rows]) if points is centres else _centre(points[rows], mean)
        lower = torch.addmm(v_squares * (1 - slack), u, v.T, alpha=-2).add_(u_squares[:, None], alpha=1 - slack)
        yield Block(points, centres, rows, lower, lower + 2 * slack * u_squares[:, None] + 2 * slack * v_squares)


def _centre(features: Array, mean: Array) -> tuple[Tensor, Tensor]:
    """Return features minus mean, and their squared norms, both rounded to float32."""
    centred, squares = np.empty(features.shape, np.float32), np.empty(len(features), np.float32)
    for start in range(0, len(features), CHUNK):
        chunk = features[start : start + CHUNK] - mean  # float64
        centred[start : start + CHUNK] = chunk
        squares[start : start + CHUNK] = np.square(chunk).sum(axis=1)
    if not float(squares.max()) < 1e36:
        raise ValueError("features are too far from their mean for float32 distances; scale them down")
    return torch.as_tensor(centred), torch.as_tensor(squares)


def squared_distances(queries: Array, rows: Indices, targets: Array, columns: Indices) -> Array:
    """Return the squared distances [P] of the pairs (queries[rows[p]], targets[columns[p]]).

    The squared differences are summed directly in float64, so that equal pairs have equal distances.
    """
    squares = np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        difference = np.asarray(queries[rows[chunk]], np.float64) - targets[columns[chunk]]
        squares[chunk] = np.square(difference, out=difference).sum(axis=1)
    return squares
