"""From features to every metric: what `models` computes, by the names that reports carry.

`fid`, `sfid`, `kid` and `inception_score` are those of the Inception network with its published weights; all
others carry their extractor's name, such as `fd_digits`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cluster.workers import pool
from models.manifolds import (
    Run,
    authentic_share,
    here,
    manifolds,
    precision_recall,
    precision_recall_openai,
    realism,
)
from models.metrics import (
    MIN_INTERVAL_RATIO,
    Estimate,
    Gaussian,
    Moments,
    by_class,
    class_frechet_estimate,
    expand_frechet,
    frechet_estimate,
    inception_score,
    inception_score_10split,
    kid,
    moments,
    proportion_estimate,
    softmax,
)
from models.neighbours import shares
from orchestrator.evaluation.extraction import FeatureFiles, Labelled, chosen
from orchestrator.evaluation.memorization import nearest_training_features
from orchestrator.evaluation.references import Reference

NEIGHBOURS = 3  # k of precision and recall; a class with fewer rows has none
FEWEST = 6  # images of each set for all the metrics of neighbours

Estimates = dict[str, Estimate]


def describe(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON: value, n, interval (null where none is sound) and why."""
    interval = None if estimate.low is None else [estimate.low, estimate.high]
    return {"value": estimate.value, "n": estimate.n, "interval": interval, "note": estimate.note}


def metric_name(metric: str, extractor: str) -> str:
    """The name of a metric that depends on the extractor: `fd` by digits is `fd_digits`, by Inception `fid`."""
    if extractor == "inception":
        return {"fd": "fid", "fd_infinity": "fid_infinity", "sfd": "sfid"}.get(metric, metric)
    return f"{metric}_{extractor}"


def measure(samples: Labelled, reference: Labelled, name: str) -> Estimates:
    """Every metric of `samples` against `reference`, both in memory, by the extractor called `name`.

    Precision is the share of samples near the reference, recall the share of the reference near samples; accuracy
    is the share of samples that the extractor takes for the class that was asked for.
    """
    made, real = samples.features, reference.features
    found = distances(made.pool, moments(real.pool), name)
    found |= neighbour_metrics(real.pool, made.pool)
    found[metric_name("kid", name)] = kid(real.pool, made.pool)
    if made.logits is not None:
        found |= class_scores(made.logits, samples.labels, int(reference.labels.max()) + 1, name)
    return found


def distances(features: np.ndarray, reference: Moments | Gaussian, name: str, metric: str = "fd") -> Estimates:
    """The Frechet distance, and where n > 2 D what it is at infinite n."""
    n, dimension = features.shape
    if n <= MIN_INTERVAL_RATIO * dimension:
        return {metric_name(metric, name): frechet_estimate(features, reference)}
    expansion = expand_frechet(features, reference)
    found = {metric_name(metric, name): expansion.estimate}
    if metric == "fd":
        found[metric_name("fd_infinity", name)] = expansion.corrected
    return found


def neighbour_metrics(reference: np.ndarray, samples: np.ndarray, run: Run | None = None) -> Estimates:
    """Precision and recall of 3 neighbours, density and coverage of 5."""
    found = manifolds(reference, samples, k=NEIGHBOURS, run=run)
    return {
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }


def class_scores(logits: np.ndarray, labels: np.ndarray, num_classes: int, name: str) -> Estimates:
    """Inception Score by both protocols, and accuracy where the extractor knows the samples' classes."""
    probabilities = softmax(logits)
    found = {metric_name("inception_score", name): inception_score(probabilities)}
    if len(probabilities) >= 10:
        found[metric_name("inception_score_10split", name)] = inception_score_10split(probabilities)
    if num_classes == logits.shape[1] and labels.min() >= 0:
        found["accuracy"] = proportion_estimate(logits.argmax(axis=1) == labels)
    return found


# ------------------------------------------------------------------------------------------------ of sets on storage


@dataclass(frozen=True)
class Limits:
    """How many images, drawn by a fixed seed, serve the metrics whose cost grows with pairs; the others take all."""

    samples: int  # of precision, recall, density, coverage, realism
    references: int  # likewise
    pairs: int = 10_000  # of each set for the kernel distance, and of samples for their nearest training images
    class_references: int = 50_000  # over all classes


@dataclass
class Measurement:
    """Every metric that can be had, and why the others cannot."""

    estimates: Estimates = field(default_factory=dict)
    per_class: dict[int, Estimates] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # samples with a realism
    realism: np.ndarray = field(default_factory=lambda: np.empty(0))  # of these samples
    closest: "Closest | None" = None


@dataclass(frozen=True)
class Closest:
    """Samples and their nearest training images, by features."""

    rows: np.ndarray  # [Q] indices of samples
    nearest: np.ndarray  # [Q] indices of training images
    distances: np.ndarray  # [Q]
    own_distances: np.ndarray  # [Q] of these training images to the nearest other one

    def first(self, count: int) -> list[dict[str, float]]:
        """The pairs that are closest, as measured by how far the training image is from its own nearest."""
        ratios = self.distances / np.maximum(self.own_distances, np.finfo(np.float64).tiny)
        return [
            {
                "sample": int(self.rows[i]),
                "training_image": int(self.nearest[i]),
                "distance": float(self.distances[i]),
                "its_own_nearest": float(self.own_distances[i]),
            }
            for i in np.argsort(ratios, kind="stable")[:count]
        ]


def measure_files(made: FeatureFiles, reference: Reference, name: str, limits: Limits, num_workers: int) -> Measurement:
    """Every metric of the samples' features against the reference, by the extractor called `name`.

    One array of one set is held at a time: n x D x 4 bytes, 0.4 GB for 50,000 x 2,048, and for metrics of pairs twice
    that beside the chosen reference rows.

    Raises:
        ValueError: the two sets of features come from different extractors.
    """
    if made.fingerprint != reference.fingerprint:
        raise ValueError(
            f"samples were seen by {made.fingerprint}, the reference by {reference.fingerprint}: "
            "statistics of different extractors are never compared"
        )
    result, fd, fd_infinity = Measurement(), metric_name("fd", name), metric_name("fd_infinity", name)
    pool_features = made.pool()
    if made.count < 2:
        result.missing |= dict.fromkeys((fd, fd_infinity), "a single sample has no covariance")
    else:
        result.estimates |= distances(pool_features, reference.statistics["pool"], name)
        if fd_infinity not in result.estimates:
            n, dimension = pool_features.shape
            result.missing[fd_infinity] = f"n={n} samples are not above {MIN_INTERVAL_RATIO} D, D={dimension}"
    if "spatial" in reference.statistics and (spatial := made.array("spatial")) is not None and made.count > 1:
        result.estimates |= distances(spatial, reference.statistics["spatial"], name, "sfd")
        del spatial
    elif "spatial" in reference.missing:
        result.missing[metric_name("sfd", name)] = reference.missing["spatial"]
    logits, labels = made.array("logits"), made.labels()
    if logits is not None:
        result.estimates |= class_scores(logits, labels, len(reference.classes), name)
        if "accuracy" not in result.estimates:
            result.missing["accuracy"] = "the extractor's classes are not the samples' labels"
    of_rows = ("precision", "recall", "density", "coverage", metric_name("kid", name), "authpct", "per_class")
    if reference.files is None:
        result.missing |= dict.fromkeys(of_rows, reference.missing["rows"])
    elif (fewest := min(made.count, reference.files.count)) < FEWEST:
        result.missing |= dict.fromkeys(of_rows, f"{fewest} images of one set are too few, {FEWEST} are needed")
    else:
        _measure_rows(result, made, pool_features, labels, reference, name, limits, num_workers)
    return result


def _measure_rows(
    result: Measurement,
    made: FeatureFiles,
    features: np.ndarray,
    labels: np.ndarray,
    reference: Reference,
    name: str,
    limits: Limits,
    num_workers: int,
) -> None:
    """The metrics that need the features of single reference images."""
    files = reference.files
    assert files is not None
    rows, real = chosen(made.count, limits.samples), files.chosen_pool(limits.references)
    samples = features[rows] if len(rows) < made.count else features
    with _pairs(files, limits, real, made, samples, num_workers) as run:
        result.estimates |= neighbour_metrics(real, samples, run)
        try:
            result.rows, result.realism = rows, realism(real, samples, run=run)
        except ValueError as error:
            result.missing["realism"] = str(error)
    if name == "inception":
        for metric, value in zip(("precision", "recall"), precision_recall_openai(real, samples), strict=True):
            note = "no interval: float16 arithmetic of the published evaluator, for parity alone"
            result.estimates[f"{metric}_openai"] = Estimate(value, len(rows), note=note)
    few = samples[chosen(len(samples), limits.pairs)]
    result.estimates[metric_name("kid", name)] = kid(real[chosen(len(real), limits.pairs)], few)

    pair_rows = chosen(made.count, limits.pairs)
    found, own = nearest_training_features(made, pair_rows, files, num_workers)
    result.estimates["authpct"] = authentic_share(found.squared[:, 0], own)
    result.closest = Closest(pair_rows, found.index[:, 0], np.sqrt(found.squared[:, 0]), np.sqrt(own))
    result.per_class = _per_class(result, reference, features, labels, limits)


def _per_class(
    result: Measurement, reference: Reference, features: np.ndarray, labels: np.ndarray, limits: Limits
) -> dict[int, Estimates]:
    """Frechet distance, precision and recall within each class that both sets hold twice or more."""
    files = reference.files
    assert files is not None
    if labels.min() < 0:
        result.missing["per_class"] = "the samples have no labels"
        return {}
    real_labels = reference.labels if reference.labels is not None else files.labels()
    if real_labels.min() < 0:
        result.missing["per_class"] = "the reference has no labels"
        return {}
    rows, real = chosen(files.count, limits.class_references), files.chosen_pool(limits.class_references)

    def metrics(reference: np.ndarray, samples: np.ndarray) -> Estimates:
        if min(len(reference), len(samples)) < 2:
            return {}
        found = {"fd": class_frechet_estimate(reference, samples)}
        if min(len(reference), len(samples)) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(reference, samples, NEIGHBOURS)
        return found

    found = by_class(metrics, real, real_labels[rows], features, labels)
    return {label: estimates for label, estimates in found.items() if estimates}


# ------------------------------------------------------------------------------------------------ over the pool


@contextlib.contextmanager
def _pairs(
    files: FeatureFiles, limits: Limits, real: np.ndarray, made: FeatureFiles, samples: np.ndarray, num_workers: int
) -> Iterator[Run]:
    """Does shares of the pairs of samples and reference rows: over a pool where there is more than one, else here."""
    if num_workers == 0 or len(shares(len(samples), len(real))) == 1:
        yield here(real, samples)
        return
    with pool(partial(_make_pairs, files, made, limits), num_workers) as workers:

        def run(step: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterable[Any]:
            return (answer for _, answer in workers.map([_Share(step, task) for task in tasks]))

        yield run


@dataclass(frozen=True, repr=False)
class _Share:
    """A share of the pairs, on its way to a worker."""

    step: Callable[..., Any]
    task: tuple[Any, ...]

    def __repr__(self) -> str:  # in the message of its failure; its arrays would fill pages
        return f"a share of {self.step.__name__}"


def _make_pairs(files: FeatureFiles, made: FeatureFiles, limits: Limits) -> Callable[[_Share], Any]:
    """A worker: both sets of features loaded once, then shares."""
    real, samples = files.chosen_pool(limits.references), made.pool(chosen(made.count, limits.samples))
    return lambda share: share.step(real, samples, *share.task)
