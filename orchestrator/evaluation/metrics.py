"""The table of metrics: name, function, requirements, direction and description of each metric.

`fid`, `sfid`, `kid` and `inception_score` are those of the Inception network with its published weights. With another
extractor, the name of the metric ends in the extractor's name, such as `fd_digits`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    cmmd,
    expand_frechet,
    frechet_estimate,
    inception_score,
    inception_score_10split,
    kid,
    kid_scores,
    proportion_estimate,
    softmax,
    vendi_score,
)
from models.scores import frechet_scores, inception_scores, recall_scores, share_scores
from orchestrator.evaluation.extraction import ArrayName

Estimates = dict[str, Estimate]


def describe(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON: value, bias, counts, interval (null if there is none) and note."""
    return {
        "value": estimate.value,
        "bias": estimate.bias,
        "n": estimate.n,
        "n_reference": estimate.n_reference,
        "interval": None if estimate.low is None else [estimate.low, estimate.high],
        "note": estimate.note,
    }


def bias_note(bias: float) -> str:
    """Return a note on the bias of a value."""
    return f"{bias:.2g} of it is bias at this n" if bias > 0 else f"too low by {-bias:.2g}, the bias at this n"


@dataclass(frozen=True)
class Rows:
    """Features of reference images and of samples, for metrics of pairs."""

    real: np.ndarray  # float32 [M, D], the chosen reference images
    samples: np.ndarray  # float32 [n, D], all or some of the samples
    manifolds: Manifolds  # metrics of these rows
    kernel: tuple[np.ndarray, np.ndarray]  # reference rows and samples for the kernel distance
    nearest: tuple[np.ndarray, np.ndarray] | None = None  # arguments of `authentic_share`; None = no training images
    num_training: int = 0  # number of training images among which the nearest ones were searched


@dataclass(frozen=True)
class Comparison:
    """Samples and a reference, from which metrics are computed."""

    extractor: str
    read: Callable[[ArrayName], np.ndarray | None]  # features of all samples, float32 [N, D]; None = no such features
    labels: np.ndarray  # int64 [N], -1 = no label
    statistics: dict[ArrayName, Moments | Gaussian]  # of the reference
    num_classes: int  # of the reference, 0 = it has no classes
    rows: Rows | None  # None = the reference has no images, or one of the sets has too few
    missing: dict[str, str] = field(default_factory=dict)  # why "rows", "spatial", "classes" or "accuracy" are missing
    strata: np.ndarray | None = None  # the labels, if they are balanced or given instead of random

    @cached_property
    def pool(self) -> np.ndarray:
        """Return the pooled features, which every extractor has."""
        return self.array("pool")

    @cached_property
    def logits(self) -> np.ndarray | None:
        """Return the extractor's logits float32 [N, K], or None if it has no classes."""
        return self.read("logits")

    @cached_property
    def probabilities(self) -> np.ndarray | None:
        """Return the extractor's class probabilities float [N, K], or None if it has no classes."""
        return None if self.logits is None else softmax(self.logits)

    @cached_property
    def expansion(self) -> FrechetExpansion:
        """Return the Fréchet distance of pooled features with its bias and spread."""
        return expand_frechet(self.pool, self.statistics["pool"], self.strata)

    @cached_property
    def spatial_expansion(self) -> FrechetExpansion:
        """Return the Fréchet distance of spatial features with its bias and spread."""
        return expand_frechet(self.array("spatial"), self.statistics["spatial"], self.strata)

    @cached_property
    def openai(self) -> tuple[float, float]:
        """Return precision and recall in the published evaluator's float16."""
        assert self.rows is not None
        return precision_recall_openai(self.rows.real, self.rows.samples)

    def array(self, name: ArrayName) -> np.ndarray:
        """Return an array of features of all samples; RuntimeError if the extractor does not have it."""
        features = self.logits if name == "logits" else self.read(name)
        if features is None:
            raise RuntimeError(f"the extractor {self.extractor} has no {name} features")
        return features


# ------------------------------------------------------------------------------------------------ needs

# A function that returns why a metric cannot be computed: None = it can, "" = the metric does not apply.
Need = Callable[[Comparison], str | None]


def _covariance(c: Comparison) -> str | None:
    return None if len(c.labels) > 1 else "a single sample has no covariance"


def _enough_samples(array: ArrayName) -> Need:
    """Return the need for more than 2 D samples, where D is the dimension of these features."""

    def need(c: Comparison) -> str | None:
        n, dimension = len(c.labels), len(c.statistics[array].mean)
        if n > MIN_INTERVAL_RATIO * dimension:
            return None
        return f"n={n} samples are too few: more than {MIN_INTERVAL_RATIO} D are needed, D={dimension}"

    return need


def _spatial(c: Comparison) -> str | None:
    return None if "spatial" in c.statistics else c.missing.get("spatial", "")


def _logits(c: Comparison) -> str | None:
    return "" if c.probabilities is None else None


def _ten_samples(c: Comparison) -> str | None:
    return None if len(c.labels) >= 10 else ""


def _classes(c: Comparison) -> str | None:
    if reason := c.missing.get("classes") or c.missing.get("accuracy"):
        return reason
    if c.probabilities is not None and c.num_classes == c.probabilities.shape[1] and c.labels.min() >= 0:
        return None
    return "the extractor's classes are not those of the samples' labels"


def _rows(c: Comparison) -> str | None:
    return None if c.rows is not None else c.missing.get("rows", "")


def _nearest(c: Comparison) -> str | None:
    return None if c.rows is not None and c.rows.nearest is not None else ""


def _only(extractor: str) -> Need:
    """Return the need for this extractor."""
    return lambda c: None if c.extractor == extractor else ""


# ------------------------------------------------------------------------------------------------ the table

# Names in the table, and the names that are reserved for the Inception network with its published weights.
INCEPTION_NAMES = {"fd": "fid", "fd_infinity": "fid_infinity", "sfd": "sfid", "sfd_infinity": "sfid_infinity"}


@dataclass(frozen=True)
class Metric:
    """An entry of the table."""

    name: str
    compute: Callable[[Any], Estimate]  # takes a Comparison that satisfies `needs`
    needs: tuple[Need, ...]
    better: Literal["lower", "higher"]
    text: str  # description, one sentence
    code: str  # the function in models/ that computes it
    of_extractor: bool = False  # whether its name ends in the extractor's name
    scores: Callable[[Any], np.ndarray] | None = None  # [n] for paired tests, less is better; None = not an objective

    @property
    def sign(self) -> int:
        """Return 1 if less is better, and -1 if more is better."""
        return 1 if self.better == "lower" else -1

    def missing_reason(self, comparison: Comparison) -> str | None:
        """Return why it cannot be computed; "" if it does not apply, and None if it can be computed."""
        for need in self.needs:
            reason = need(comparison)
            if reason is not None:
                return reason
        return None

    def report_name(self, extractor: str) -> str:
        """Return its name in reports: `fd` is `fd_digits` with the extractor digits, and `fid` with Inception."""
        if extractor == "inception":
            return INCEPTION_NAMES.get(self.name, self.name)
        return f"{self.name}_{extractor}" if self.of_extractor else self.name


def _frechet(c: Comparison, array: ArrayName) -> Estimate:
    if _enough_samples(array)(c) is None:
        return (c.expansion if array == "pool" else c.spatial_expansion).estimate
    return frechet_estimate(c.array(array), c.statistics[array])


def _openai(c: Comparison, index: Literal[0, 1]) -> Estimate:
    """Return precision (0) or recall (1) in the published evaluator's arithmetic."""
    note = "no interval: float16 arithmetic of the published evaluator, only for comparison with published numbers"
    assert c.rows is not None
    return Estimate(c.openai[index], len(c.rows.samples), note=note, n_reference=len(c.rows.real))


def vendi_estimate(samples: np.ndarray) -> Estimate:
    """Return the Vendi score of samples [n, D], without an interval."""
    return Estimate(vendi_score(samples), len(samples), note="no interval: it grows with n, so compare it at equal n")


def _strata(c: Comparison, count: int) -> np.ndarray | None:
    """Return the strata of `count` samples: None for a random subset, because its class counts are random."""
    return c.strata if count == len(c.labels) else None


def _kernel_distance(c: Comparison, distance: Callable[..., Estimate]) -> Estimate:
    assert c.rows is not None
    real, samples = c.rows.kernel
    return distance(real, samples, strata=_strata(c, len(samples)))


def _authentic(c: Comparison) -> Estimate:
    assert c.rows is not None and c.rows.nearest is not None
    squared, own_squared = c.rows.nearest
    copies = int((squared == 0).sum())
    note = f"{copies:,} samples have exactly the features of a training image" if copies else ""
    estimate = authentic_share(squared, own_squared, _strata(c, len(squared))).with_notes(note)
    return replace(estimate, n_reference=c.rows.num_training)


def _hits(c: Comparison) -> np.ndarray:
    """Return bool [N]: whether the extractor's prediction is the sample's label."""
    return c.array("logits").argmax(axis=1) == c.labels


_TABLE = (
    Metric(
        "fd_infinity", lambda c: c.expansion.corrected, (_covariance, _enough_samples("pool")), "lower",
        "Fréchet distance between features of samples and reference, corrected for its bias at this n.",
        "metrics.expand_frechet", of_extractor=True,
    ),
    Metric(
        "fd", lambda c: _frechet(c, "pool"), (_covariance,), "lower",
        "Fréchet distance with its bias, as in published protocols; compare it only at equal n.",
        "metrics.frechet_distance", of_extractor=True,
        scores=lambda c: frechet_scores(c.pool, c.statistics["pool"], c.strata),
    ),
    Metric(
        "sfd_infinity", lambda c: c.spatial_expansion.corrected,
        (_covariance, _spatial, _enough_samples("spatial")), "lower",
        "Fréchet distance of features that keep positions, corrected for its bias at this n.",
        "metrics.expand_frechet", of_extractor=True,
    ),
    Metric(
        "sfd", lambda c: _frechet(c, "spatial"), (_covariance, _spatial), "lower",
        "Fréchet distance of features that keep positions, with its bias, as in published protocols.",
        "metrics.frechet_distance", of_extractor=True,
        scores=lambda c: frechet_scores(c.array("spatial"), c.statistics["spatial"], c.strata),
    ),
    Metric(
        "inception_score", lambda c: inception_score(c.probabilities, strata=c.strata), (_logits,), "higher",
        "exp of the mean KL(p(y|x) ‖ p(y)), over splits of 5,000 consecutive samples.", "metrics.inception_score",
        of_extractor=True, scores=lambda c: inception_scores(softmax(c.array("logits"))),
    ),
    Metric(
        "inception_score_10split", lambda c: inception_score_10split(c.probabilities, strata=c.strata),
        (_logits, _ten_samples), "higher",
        "Inception Score over 10 shuffled splits.", "metrics.inception_score_10split", of_extractor=True,
    ),
    Metric(
        "accuracy", lambda c: proportion_estimate(_hits(c), c.strata), (_logits, _classes), "higher",
        "Share of samples whose class the extractor predicts correctly.", "metrics.proportion_estimate",
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
        "Number of the reference's 5-neighbour balls around a sample, divided by 5; at equal counts of both sets.",
        "manifolds.density_coverage",
    ),
    Metric(
        "coverage", lambda c: c.rows.manifolds.coverage, (_rows,), "higher",
        "Share of the reference's 5-neighbour balls that contain a sample; at equal counts of both sets.",
        "manifolds.density_coverage",
    ),
    Metric(
        "clipped_density", lambda c: c.rows.manifolds.clipped_density, (_rows,), "higher",
        "Density without the effect of outliers, relative to that of the reference; like a share of good samples.",
        "manifolds.density_coverage",
    ),
    Metric(
        "clipped_coverage", lambda c: c.rows.manifolds.clipped_coverage, (_rows,), "higher",
        "Share of good samples that would have the same coverage.", "manifolds.density_coverage",
    ),
    Metric(
        "precision_openai", lambda c: _openai(c, 0), (_only("inception"), _rows), "higher",
        "Precision in the float16 arithmetic of the published evaluator.", "manifolds.precision_recall_openai",
    ),
    Metric(
        "recall_openai", lambda c: _openai(c, 1), (_only("inception"), _rows), "higher",
        "Recall in the float16 arithmetic of the published evaluator.", "manifolds.precision_recall_openai",
    ),
    Metric(
        "kid", lambda c: _kernel_distance(c, kid), (_rows,), "lower",
        "Squared MMD with the kernel (x·y/D + 1)³, unbiased at any n.", "metrics.kid",
        of_extractor=True, scores=lambda c: kid_scores(*c.rows.kernel),
    ),
    Metric(
        "cmmd", lambda c: _kernel_distance(c, cmmd), (_only("clip"), _rows), "lower",
        "1,000 times the squared MMD of normalised CLIP features with the kernel exp(-|x-y|²/200).", "metrics.cmmd",
    ),
    Metric(
        "vendi_score", lambda c: vendi_estimate(c.pool), (), "higher",
        "Effective number of distinct samples.", "metrics.vendi_score",
    ),
    Metric(
        "authpct", _authentic, (_rows, _nearest), "higher",
        "% of samples that are farther from their nearest training image than it is from its own nearest one.",
        "manifolds.authenticity",
    ),
)  # fmt: skip

METRICS = {metric.name: metric for metric in _TABLE}


def metric_named(name: str) -> Metric:
    """Return the entry for a metric's name in reports, with or without an extractor; ValueError if there is none."""
    table_names = {inception_name: table_name for table_name, inception_name in INCEPTION_NAMES.items()}
    base = table_names.get(name, name)
    candidates = [metric for metric in _TABLE if base == metric.name or base.startswith(f"{metric.name}_")]
    if not candidates:
        raise ValueError(f"there is no metric {name!r}; the metrics are {', '.join(METRICS)}")
    return max(candidates, key=lambda metric: len(metric.name))


def measure(comparison: Comparison) -> tuple[Estimates, dict[str, str]]:
    """Compute all possible metrics; return their estimates, and the reasons why others are missing, by name."""
    estimates: Estimates = {}
    missing: dict[str, str] = {}
    for metric in _TABLE:
        name = metric.report_name(comparison.extractor)
        reason = metric.missing_reason(comparison)
        if reason is None:
            estimates[name] = metric.compute(comparison)
        elif reason:  # "" = the metric does not apply
            missing[name] = reason
    return estimates, missing
