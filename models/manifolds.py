"""Fidelity, diversity and copies by balls around nearest neighbours: precision, recall, density, coverage, realism.

Pairs of samples and reference rows are shared out by a `Run`, in this process or on a pool; the numbers are the same
to the bit. As in `models.metrics`, the reference is fixed and only the samples are random. A metric that is a mean over
samples has the interval of a mean. One that depends on the set of samples (recall, coverage) has the jackknife's: each
sample counts by what would be lost without it, which errs on the safe side (Efron & Stein 1981).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.metrics import Array, Estimate, Strata, check_features, mean_estimate, proportion_estimate, score_estimate
from models.neighbours import (
    Indices,
    Mask,
    Neighbours,
    Shortlist,
    bounded_squares,
    nearest,
    own_neighbours,
    own_shortlist,
    pairs_in_balls,
    shares,
    squared_radii,
)

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
    clipped_density: Estimate
    clipped_coverage: Estimate


def here(reference: Array, samples: Array) -> Run:
    """Does the shares one after another in this process."""
    return lambda step, tasks: (step(reference, samples, *task) for task in tasks)


def manifolds(
    reference: Array, samples: Array, k: int = 3, strict_k: int = 5, run: Run | None = None, strata: Strata = None
) -> Manifolds:
    """`precision_recall` (of k neighbours) of all rows, and `density_coverage` (of strict_k) at equal counts.

    Coverage saturates where samples outnumber the reference, so the larger set is cut to the size of the smaller one,
    by a fixed seed and in each class to its share.
    """
    check_features(reference, samples)
    fidelity = precision_recall(reference, samples, k, run, strata)
    rng, count = np.random.default_rng([len(reference), len(samples)]), min(len(reference), len(samples))
    if len(reference) > count:
        reference = reference[_drawn(rng, len(reference), count, None)]
    if len(samples) > count:
        rows = _drawn(rng, len(samples), count, strata)
        samples, strata = samples[rows], None if strata is None else strata[rows]
    return Manifolds(*fidelity, *density_coverage(reference, samples, strict_k, strata))


def _drawn(rng: np.random.Generator, n: int, count: int, strata: Strata) -> Indices:
    """Sorted rows, `count` of n at random; with strata of each class its share."""
    order = rng.permutation(n) if strata is None else np.lexsort((rng.random(n), strata))
    return np.sort(order[np.floor((np.arange(count) + rng.random()) * (n / count)).astype(np.int64)])


def precision_recall(
    reference: Array, samples: Array, k: int = 3, run: Run | None = None, strata: Strata = None
) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2): in this order, each with its interval.

    Precision: the share of samples [N, D] inside a ball around a reference row [M, D] that reaches to its
    k-th neighbour; recall: the share of reference rows inside such a ball around a sample. Collapsed samples
    have high precision and low recall. Raises ValueError where a set has not more than k rows.
    """
    check_features(reference, samples)
    run, (n, m) = run or here(reference, samples), (len(samples), len(reference))
    real_radii, radii = (_shared_neighbours((reference, samples)[i], k, run, i).squared[:, -1] for i in (0, 1))
    found = sorted(run(_fidelity_step, [(real_radii, radii[rows], rows) for rows in shares(n, m)]), key=lambda f: f[0])
    precision = proportion_estimate(np.concatenate([precise for _, precise, _, _ in found]), strata)
    holders, last = sum(held for *_, held, _ in found), sum(index for *_, index in found)
    alone = np.bincount(last[holders == 1], minlength=n)  # reference rows that only this sample recalls
    recall = _set_estimate(float((holders > 0).mean()), alone / m, strata)
    return (
        replace(precision, n_reference=m).noted(_copies("reference", real_radii, k)),
        replace(recall, n_reference=m).noted(_copies("sample", radii, k)),
    )


def _fidelity_step(
    reference: Array, samples: Array, real_radii: Array, radii: Array, share: slice
) -> tuple[int, Mask, Indices, Indices]:
    """Which samples of the share lie in balls of the reference; of each reference row how many balls of these samples
    hold it, and the sum of their indices."""
    precise, holders, indices = np.zeros(len(radii), np.bool_), *np.zeros((2, len(reference)), np.int64)
    for block in bounded_squares(samples, reference, share=share):
        rows = slice(block.rows.start - share.start, block.rows.stop - share.start)
        inside, _ = pairs_in_balls(samples, reference, block, real_radii)
        precise[rows][inside] = True
        inside, by = pairs_in_balls(reference, samples, block.transposed, radii[rows])
        holders += np.bincount(inside, minlength=len(reference))
        np.add.at(indices, inside, by + block.rows.start)
    return share.start, precise, holders, indices


def density_coverage(
    reference: Array, samples: Array, k: int = 5, strata: Strata = None
) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Density and coverage (Naeem et al. 2020, eq. 4-5, strict as in their code), then both clipped.

    Density: in how many of the reference's k-neighbour balls a sample lies, over k; it can exceed 1. Coverage: the
    share of those balls that hold a sample. Clipped (Salvy, Talbot & Thirion 2026): no sample counts for more than k
    balls and no ball is wider than the median, relative to what the reference's own rows score; and up to k samples
    count in each ball, read as the share of good samples that covers as much.
    """
    check_features(reference, samples)
    n, m, own = len(samples), len(reference), nearest(reference, reference, k)
    radii = own.squared[:, -1]
    clipped = np.minimum(radii, np.median(radii))
    counts, narrow, held = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(m, np.int64)
    pairs = []  # sample and ball, as far as a ball holds few
    for block in bounded_squares(samples, reference):
        rows, balls = pairs_in_balls(samples, reference, block, radii, strict=True)
        counts[block.rows] = np.bincount(rows, minlength=len(block.lower))
        few = held[balls] <= k
        pairs.append(np.stack([rows[few] + block.rows.start, balls[few]]))
        held += np.bincount(balls, minlength=m)
        rows, _ = pairs_in_balls(samples, reference, block, clipped)
        narrow[block.rows] = np.bincount(rows, minlength=len(block.lower))
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
    """[n + 1] expected clipped coverage of m balls by n samples of which 0 to n are as good as reference rows.

    A ball that reaches to the k-th of m - 1 others holds J of g good samples, where J is beta-binomial with parameters
    k and m - k; so E min(J, k) / k = 1 - sum over j < k of (1 - j / k) P(J = j).
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
    """A share of the reference with the jackknife's interval, from what of it would be lost without each sample [n]."""
    if not lost.any():
        return Estimate(value, len(lost), note="no interval: no single sample changes it")
    found = score_estimate(value, len(lost) * lost, strata)
    return _mapped(found, lambda x: float(np.clip(x, 0, 1)))


def _mapped(found: Estimate, function: Callable[[float], float]) -> Estimate:
    low, high = (None if end is None else function(end) for end in (found.low, found.high))
    return replace(found, value=function(found.value), low=low, high=high)


def _same_for_all(found: Estimate) -> Estimate:
    if found.low is not None and found.low != found.high:
        return replace(found, low=max(found.low, 0.0))
    return Estimate(found.value, found.n, note="no interval: it is the same for every sample")


def _copies(what: str, radii: Array, k: int) -> str:
    """A note on balls that hold nothing but copies, of their squared radii."""
    count = int((radii == 0).sum())
    return f"{count:,} {what} rows have {k} or more exact copies, so their balls have no size" if count else ""


def _shared_neighbours(features: Array, k: int, run: Run, which: int) -> Neighbours:
    """The neighbours of each row within the reference (which = 0) or the samples (1), the work shared out."""
    tasks = [(which, k, share) for share in shares(len(features), len(features))]
    return own_neighbours(features, k, run(_shortlist_step, tasks))


def _shortlist_step(reference: Array, samples: Array, which: int, k: int, share: slice) -> tuple[int, Shortlist]:
    return share.start, own_shortlist((reference, samples)[which], k, share)


def realism(reference: Array, samples: Array, k: int = 3, run: Run | None = None) -> Array:
    """[N] largest ratio of a reference ball's radius to its distance from the sample (Kynkaanniemi et al. 2019, eq. 3).

    At least 1 means inside the reference's manifold; infinite for an exact copy. All balls are kept, also the
    widest; those of radius 0 (rows with k copies) can realise nothing but their copies and are left out.
    """
    check_features(reference, samples)
    run = run or here(reference, samples)
    radii = _shared_neighbours(reference, k, run, 0).squared[:, -1]
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


def authentic_share(squared: Array, own_squared: Array, strata: Strata = None) -> Estimate:
    """AuthPct from squared distances: of each sample to its nearest reference row, of that row to its own nearest."""
    share = proportion_estimate(squared > own_squared, strata)
    low, high = (None if x is None else 100 * x for x in (share.low, share.high))
    return Estimate(100 * share.value, share.n, low, high)


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
