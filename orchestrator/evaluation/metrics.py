"""The table of metrics: of each its name, its function, what it needs, which way is better, and what it is.

`fid`, `sfid`, `kid` and `inception_score` are those of the Inception network with its published weights; all others
carry their extractor's name, such as `fd_digits`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from models.manifolds import Manifolds, authentic_share, precision_recall_openai, realism
from models.metrics import (
    MIN_INTERVAL_RATIO,
    Estimate,
    FrechetExpansion,
    Gaussian,
    Moments,
    expand_frechet,
    frechet_estimate,
    inception_score,
    inception_score_10split,
    kid,
    kid_scores,
    proportion_estimate,
    softmax,
)
from models.scores import frechet_scores, inception_scores, recall_scores, share_scores
from orchestrator.evaluation.extraction import ArrayName

Estimates = dict[str, Estimate]


def describe(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON: value, n, interval (null where none is sound) and why."""
    interval = None if estimate.low is None else [estimate.low, estimate.high]
    return {"value": estimate.value, "n": estimate.n, "interval": interval, "note": estimate.note}


@dataclass(frozen=True)
class Rows:
    """Features of single reference images beside those of samples, for the metrics that need pairs of them."""

    real: np.ndarray  # float32 [M, D]
    samples: np.ndarray  # float32 [n, D], all or some of the samples
    manifolds: Manifolds
    kernel: tuple[np.ndarray, np.ndarray]  # reference rows and samples that the kernel distance is formed of
    nearest: tuple[np.ndarray, np.ndarray] | None = None  # see `models.manifolds.authentic_share`


@dataclass(frozen=True)
class Comparison:
    """Samples beside a reference: all that a metric is computed from."""

    extractor: str
    read: Callable[[ArrayName], np.ndarray | None]  # features of all samples, float32 [N, D]; None = no such features
    labels: np.ndarray  # int64 [N], -1 = none
    statistics: dict[ArrayName, Moments | Gaussian]  # of the reference
    num_classes: int  # of the reference, 0 where it has none
    rows: Rows | None  # None = the reference has no single images, or one of the sets has too few
    missing: dict[str, str] = field(default_factory=dict)  # why there are no "rows", "spatial" or common "classes"
    strata: np.ndarray | None = None  # [N] by `models.metrics.strata_of`, where the labels are given; None = drawn

    @cached_property
    def pool(self) -> np.ndarray:
        """Return the pooled features, which every extractor has."""
        return self.array("pool")

    @cached_property
    def logits(self) -> np.ndarray | None:
        """Return the extractor's logits float32 [N, K], where it has classes; they are read once."""
        return self.read("logits")

    @cached_property
    def probabilities(self) -> np.ndarray | None:
        """Return the extractor's class probabilities float [N, K], where it has classes."""
        return None if self.logits is None else softmax(self.logits)

    @cached_property
    def expansion(self) -> FrechetExpansion:
        """Return the Fréchet distance of pooled features with its bias and spread."""
        return expand_frechet(self.pool, self.statistics["pool"])

    @cached_property
    def openai(self) -> tuple[float, float]:
        """Return precision and recall in the published evaluator's float16."""
        assert self.rows is not None
        return precision_recall_openai(self.rows.real, self.rows.samples)

    def array(self, name: ArrayName) -> np.ndarray:
        """Return features of all samples; RuntimeError where the extractor has none of this kind."""
        found = self.logits if name == "logits" else self.read(name)
        if found is None:
            raise RuntimeError(f"the extractor {self.extractor} has no {name} features")
        return found


# ------------------------------------------------------------------------------------------------ needs

# Why a comparison lacks what a metric needs; "" = the metric does not apply to it, and None = nothing is lacking.
Need = Callable[[Comparison], str | None]


def _covariance(c: Comparison) -> str | None:
    return None if len(c.labels) > 1 else "a single sample has no covariance"


def _correction(c: Comparison) -> str | None:
    n, dimension = c.pool.shape
    few = f"n={n} samples are not above {MIN_INTERVAL_RATIO} D, D={dimension}"
    return None if n > MIN_INTERVAL_RATIO * dimension else few


def _spatial(c: Comparison) -> str | None:
    return None if "spatial" in c.statistics else c.missing.get("spatial", "")


def _logits(c: Comparison) -> str | None:
    return "" if c.probabilities is None else None


def _ten_samples(c: Comparison) -> str | None:
    return None if len(c.labels) >= 10 else ""


def _classes(c: Comparison) -> str | None:
    if reason := c.missing.get("classes"):
        return reason
    same = c.probabilities is not None and c.num_classes == c.probabilities.shape[1] and c.labels.min() >= 0
    return None if same else "the extractor's classes are not the samples' labels"


def _rows(c: Comparison) -> str | None:
    return None if c.rows is not None else c.missing.get("rows", "")


def _nearest(c: Comparison) -> str | None:
    return None if c.rows is not None and c.rows.nearest is not None else ""


def _inception(c: Comparison) -> str | None:
    return None if c.extractor == "inception" else ""


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    name: str
    compute: Callable[[Any], Estimate]  # of a Comparison that has what is needed
    needs: tuple[Need, ...]
    better: Literal["lower", "higher"]
    text: str  # what it is, in a sentence
    code: str  # the function in models/ that computes it
    of_extractor: bool = False  # its name ends in the extractor's
    scores: Callable[[Any], np.ndarray] | None = None  # [n] for paired tests, less is better; None = no objective

    @property
    def sign(self) -> int:
        """Return 1 for a metric of which less is better, and -1 where more is."""
        return 1 if self.better == "lower" else -1

    def lacks(self, comparison: Comparison) -> str | None:
        """Return why it cannot be computed; "" where it does not apply, and None where it can."""
        return next((reason for need in self.needs if (reason := need(comparison)) is not None), None)

    def named(self, extractor: str) -> str:
        """Return its name in reports: `fd` by digits is `fd_digits`, by Inception `fid`."""
        if extractor == "inception":
            return {"fd": "fid", "fd_infinity": "fid_infinity", "sfd": "sfid"}.get(self.name, self.name)
        return f"{self.name}_{extractor}" if self.of_extractor else self.name


def _frechet(c: Comparison) -> Estimate:
    if _correction(c) is None:
        return c.expansion.estimate
    return frechet_estimate(c.pool, c.statistics["pool"])


def _openai(c: Comparison, which: int) -> Estimate:
    note = "no interval: float16 arithmetic of the published evaluator, for parity alone"
    assert c.rows is not None
    return Estimate(c.openai[which], len(c.rows.samples), note=note)


def _hits(c: Comparison) -> np.ndarray:
    """Return bool [N]: whether the extractor takes a sample for the class that was asked for."""
    return c.array("logits").argmax(axis=1) == c.labels


_TABLE = (
    Metric(
        "fd", _frechet, (_covariance,), "lower",
        "Fréchet distance between features of samples and reference.", "metrics.frechet_distance",
        of_extractor=True, scores=lambda c: frechet_scores(c.pool, c.statistics["pool"], c.strata),
    ),
    Metric(
        "fd_infinity", lambda c: c.expansion.corrected, (_covariance, _correction), "lower",
        "The same with its bias at this n removed.", "metrics.expand_frechet", of_extractor=True,
    ),
    Metric(
        "sfd", lambda c: frechet_estimate(c.array("spatial"), c.statistics["spatial"]), (_covariance, _spatial),
        "lower",
        "Fréchet distance of features that keep positions.", "metrics.frechet_distance",
        of_extractor=True,
        scores=lambda c: frechet_scores(c.array("spatial"), c.statistics["spatial"], c.strata),
    ),
    Metric(
        "inception_score", lambda c: inception_score(c.probabilities), (_logits,), "higher",
        "exp of the mean KL(p(y|x) ‖ p(y)), splits of 5,000 in order.", "metrics.inception_score",
        of_extractor=True, scores=lambda c: inception_scores(softmax(c.array("logits"))),
    ),
    Metric(
        "inception_score_10split", lambda c: inception_score_10split(c.probabilities), (_logits, _ten_samples),
        "higher",
        "The same over 10 shuffled splits.", "metrics.inception_score_10split", of_extractor=True,
    ),
    Metric(
        "accuracy", lambda c: proportion_estimate(_hits(c)), (_logits, _classes), "higher",
        "Share that the extractor takes for the class asked for.", "metrics.proportion_estimate",
        scores=lambda c: share_scores(_hits(c)),
    ),
    Metric(
        "precision", lambda c: c.rows.manifolds.precision, (_rows,), "higher",
        "Share of samples inside the reference's neighbourhoods, k = 3.", "manifolds.precision_recall",
        scores=lambda c: share_scores(realism(c.rows.real, c.pool) >= 1),
    ),
    Metric(
        "recall", lambda c: c.rows.manifolds.recall, (_rows,), "higher",
        "Share of the reference inside the samples' neighbourhoods, k = 3.", "manifolds.precision_recall",
        scores=lambda c: recall_scores(c.rows.real, c.pool),
    ),
    Metric(
        "density", lambda c: c.rows.manifolds.density, (_rows,), "higher",
        "How many of the reference's 5-neighbour balls hold a sample, over 5.", "manifolds.density_coverage",
    ),
    Metric(
        "coverage", lambda c: c.rows.manifolds.coverage, (_rows,), "higher",
        "Share of these balls that hold a sample.", "manifolds.density_coverage",
    ),
    Metric(
        "precision_openai", lambda c: _openai(c, 0), (_inception, _rows), "higher",
        "Precision in the published evaluator's float16.", "manifolds.precision_recall_openai",
    ),
    Metric(
        "recall_openai", lambda c: _openai(c, 1), (_inception, _rows), "higher",
        "Recall in the published evaluator's float16.", "manifolds.precision_recall_openai",
    ),
    Metric(
        "kid", lambda c: kid(*c.rows.kernel), (_rows,), "lower",
        "Kernel distance (x·y/D + 1)³, unbiased at any n.", "metrics.kid",
        of_extractor=True, scores=lambda c: kid_scores(*c.rows.kernel),
    ),
    Metric(
        "authpct", lambda c: authentic_share(*c.rows.nearest), (_rows, _nearest), "higher",
        "% of samples farther from their nearest training image than that is from its own nearest.",
        "manifolds.authenticity",
    ),
)  # fmt: skip

METRICS = {metric.name: metric for metric in _TABLE}


def metric_named(name: str) -> Metric:
    """Return the entry of a metric's name in reports, whatever extractor that ends in; ValueError where none is."""
    base = {"fid": "fd", "fid_infinity": "fd_infinity", "sfid": "sfd"}.get(name, name)
    known = [metric for metric in _TABLE if base == metric.name or base.startswith(f"{metric.name}_")]
    if not known:
        raise ValueError(f"there is no metric {name!r}; the metrics are {', '.join(METRICS)}")
    return max(known, key=lambda metric: len(metric.name))


def measure(comparison: Comparison) -> tuple[Estimates, dict[str, str]]:
    """Compute every metric that can be had; return the estimates, and for the others why they cannot, by name."""
    estimates, missing = Estimates(), dict[str, str]()
    for metric in _TABLE:
        name = metric.named(comparison.extractor)
        if (reason := metric.lacks(comparison)) is None:
            estimates[name] = metric.compute(comparison)
        elif reason:
            missing[name] = reason
    return estimates, missing
