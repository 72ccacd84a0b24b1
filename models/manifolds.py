"""Fidelity, diversity and copies by balls around nearest neighbours: precision, recall, density, coverage, realism.

Pairs of samples and reference rows are shared out by a `Run`, in this process or on a pool; the numbers are the same
to the bit. As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over
samples has the interval of a mean; one that depends on the set of samples (recall, coverage) has one from random
halves.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import Z95, Array, Estimate, check_features, mean_estimate, proportion_estimate
from models.neighbours import (
    SPARE,
    Block,
    Indices,
    Mask,
    Neighbours,
    Shortlist,
    bounded_squares,
    list_length,
    measured,
    nearest,
    own_shortlist,
    pairs_in_balls,
    shares,
    squared_radii,
)

NUM_HALVES = 50  # random halves behind the interval of a metric of the whole set
OPENAI_BLOCK = 10_000  # rows and columns of one block in the published evaluator

# Does step(reference, samples, *task) for every task, and answers in any order.
Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterable[Any]]


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
    kept = list_length(len(reference), k, k + SPARE)
    return measured(reference, reference, _shared_shortlist(reference, kept, run, 0), k, own=True)


def _shared_shortlist(features: Array, kept: int, run: Run, which: int) -> Shortlist:
    """`own_shortlist` of the reference (which = 0) or the samples (1), its rows shared out."""
    tasks = [(which, kept, share) for share in shares(len(features), len(features))]
    shortlist = Shortlist.empty(len(features), kept)
    for begin, part in run(_shortlist_step, tasks):
        shortlist.merge(slice(begin, None), part)
    return shortlist


def _shortlist_step(reference: Array, samples: Array, which: int, kept: int, share: slice) -> tuple[int, Shortlist]:
    return share.start, own_shortlist((reference, samples)[which], kept, share)


class _Count(Protocol):
    """What a pass over all pairs of samples and reference rows adds up, for all samples or a share of them."""

    def share(self, rows: slice) -> "_Count": ...

    def add(self, reference: Array, samples: Array, block: Block, rows: slice) -> None: ...


def _count(reference: Array, samples: Array, counts: "Sequence[_Fidelity | _Density]", run: Run) -> list[list[Any]]:
    """For each of the counts its shares, filled, in the order of their rows."""
    tasks = [([count.share(rows) for count in counts], rows) for rows in shares(len(samples), len(reference))]
    answers = sorted(run(_count_step, tasks), key=lambda answer: answer[0])
    return [list(parts) for parts in zip(*(counts for _, counts in answers), strict=True)]


def _count_step(reference: Array, samples: Array, counts: "list[_Count]", share: slice) -> tuple[int, "list[_Count]"]:
    counts = [count.share(slice(None)) for count in counts]  # afresh: what came from a pool's driver is read-only
    for block in bounded_squares(samples, reference, share=share):
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
        shortlist = _shared_shortlist(samples, list_length(n, k, 4 * k + 16), run, 1)
        radii = measured(samples, samples, shortlist, k, own=True).squared[:, -1]
        half_radii = _radii_of_halves(samples, shortlist, k, _random_halves(n, k))
        return cls._empty(real_radii, radii, half_radii)

    @classmethod
    def _empty(cls, real_radii: Array, radii: Array, half_radii: NDArray[np.float32]) -> "_Fidelity":
        n, m, halves = len(radii), len(real_radii), len(half_radii)
        nothing = (np.zeros(shape, np.bool_) for shape in (n, m, (halves, m)))
        return cls(real_radii, radii, half_radii, *nothing)

    def share(self, rows: slice) -> "_Fidelity":
        return self._empty(self.real_radii, self.radii[rows], self.half_radii[:, rows])

    def add(self, reference: Array, samples: Array, block: Block, rows: slice) -> None:
        inside, _ = pairs_in_balls(samples, reference, block, self.real_radii)
        self.precise[rows][inside] = True
        recalled, _ = pairs_in_balls(reference, samples, block.transposed, self.radii[rows])
        self.recalled[recalled] = True
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

    def add(self, reference: Array, samples: Array, block: Block, rows: slice) -> None:
        inside, balls = pairs_in_balls(samples, reference, block, self.radii, strict=True)
        self.counts[rows] = np.bincount(inside, minlength=len(block.lower))
        self.covered[balls] = True
        for half, covered_by_half in zip(self.halves[:, rows], self.covered_by, strict=True):
            covered_by_half[balls[half[inside]]] = True

    @staticmethod
    def estimates(shares: "list[_Density]") -> tuple[Estimate, Estimate]:
        """Density and coverage."""
        counts = np.concatenate([share.counts for share in shares])
        covered = np.any([share.covered for share in shares], axis=0)
        covered_by = np.any([share.covered_by for share in shares], axis=0)
        density = mean_estimate(counts / shares[0].k)
        if density.low == density.high:
            density = Estimate(density.value, density.n, note="no interval: it is the same for every sample")
        return density, _halves_estimate(covered, covered_by, len(counts))


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


def _radii_of_halves(samples: Array, shortlist: Shortlist, k: int, halves: Mask) -> NDArray[np.float32]:
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


def _recall_by_halves(recalled_by: Mask, block: Block, half_radii: NDArray[np.float32]) -> None:
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
