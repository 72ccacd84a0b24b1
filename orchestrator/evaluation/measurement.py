"""All metrics of stored features, with the realism of samples, the closest pairs and metrics of each class."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cluster.workers import map_items
from models.manifolds import Manifolds, manifolds, precision_recall, realism
from models.metrics import Strata, by_class, class_frechet_estimate, expand_frechet, moments
from orchestrator.arithmetic import prepare_device
from orchestrator.evaluation.extraction import ArrayName, FeatureFiles, choose_rows
from orchestrator.evaluation.memorization import nearest_training_features
from orchestrator.evaluation.metrics import Comparison, Estimates, Rows, measure, vendi_estimate
from orchestrator.evaluation.references import Reference

NEIGHBOURS = 3  # k of precision and recall; a class with at most k images in one of the sets has neither
MIN_IMAGES = 6  # images of each set that the metrics of pairs need


@dataclass(frozen=True)
class Limits:
    """Numbers of images, drawn with a fixed seed, for metrics of pairs; other metrics use all images."""

    samples: int = 50_000  # for precision, recall, density, coverage and realism, as in ADM
    references: int = 10_000  # for the same metrics
    pairs: int = 10_000  # of each set for the kernel distance, and of samples for their nearest training images
    class_references: int = 50_000  # of all classes together


@dataclass
class Measurement:
    """All metrics of samples, and the reasons why others are missing."""

    estimates: Estimates = field(default_factory=dict)
    per_class: dict[int, Estimates] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # reasons by the names of metrics
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # indices of samples with a realism
    realism: np.ndarray = field(default_factory=lambda: np.empty(0))  # realism of these samples
    closest: "Closest | None" = None
    same_images: bool = False  # whether samples and reference are the same images


@dataclass(frozen=True)
class Closest:
    """Samples and their nearest training images in feature space."""

    rows: np.ndarray  # [Q] indices of samples
    nearest: np.ndarray  # [Q] indices of training images
    distances: np.ndarray  # [Q]
    own_distances: np.ndarray  # [Q] of these training images to the nearest other one

    def first(self, count: int) -> list[dict[str, float]]:
        """Return the pairs with the smallest ratios of the two distances, smallest first.

        If another training image is an exact copy of this one, the ratio is infinite, or 0 if the sample is a copy too.
        """
        with np.errstate(over="ignore"):
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


def strata_of(labels: np.ndarray, policy: str | None) -> np.ndarray | None:
    """Return the labels if the number of samples in each class is fixed, and None if it is random.

    Args:
        policy: the `labels` setting of samples that Admiral generated. Other samples count as balanced if all classes
            have equal counts.
    """
    if labels.min() < 0 or policy == "uniform":
        return None
    counts = np.unique(labels, return_counts=True)[1]
    is_list = policy is not None and "," in policy  # labels in turn from a list, so that their counts are fixed
    is_balanced = counts.max() - counts.min() <= 1
    return labels if counts.min() > 1 and (is_list or is_balanced) else None


def measure_files(
    sample_files: FeatureFiles,
    reference: Reference,
    name: str,
    limits: Limits,
    num_workers: int,
    num_gpus: float = 0.0,
    policy: str | None = None,
) -> Measurement:
    """Compute all metrics of the samples' features against the reference.

    One feature array is in memory at a time: n x D x 4 bytes, which is 0.4 GB for 50,000 x 2,048. Metrics of pairs need
    twice that, and the chosen reference rows.

    Args:
        name: the extractor's name.
        num_gpus: GPUs for each worker, for metrics of pairs.
        policy: see `strata_of`.

    Raises:
        ValueError: the two sets of features come from different extractors.
    """
    if sample_files.fingerprint != reference.fingerprint:
        raise ValueError(
            f"the features of the samples come from {sample_files.fingerprint}, those of the reference from "
            f"{reference.fingerprint}; they must come from the same extractor"
        )
    result, labels, features, rows = Measurement(), sample_files.labels(), sample_files.pool(), None
    strata = strata_of(labels, policy)
    missing = dict(reference.missing)
    if reference.files is not None:
        smaller = min(sample_files.count, reference.files.count)
        if smaller < MIN_IMAGES:
            missing["rows"] = f"one of the sets has {smaller} images, but {MIN_IMAGES} are needed"
        else:
            rows = _pair_metrics(result, sample_files, features, reference, limits, num_workers, num_gpus, strata)
            result.per_class = _per_class(result, reference, features, labels, limits)

    def read(array: ArrayName) -> np.ndarray | None:
        return features if array == "pool" else sample_files.array(array)

    num_classes = len(reference.classes)
    comparison = Comparison(name, read, labels, reference.statistics, num_classes, rows, missing, strata)
    result.estimates, reasons = measure(comparison)
    result.missing |= reasons
    if rows is None:
        result.missing["per_class"] = missing["rows"]
    return result


def _pair_metrics(
    result: Measurement,
    sample_files: FeatureFiles,
    features: np.ndarray,
    reference: Reference,
    limits: Limits,
    num_workers: int,
    num_gpus: float,
    strata: np.ndarray | None,
) -> Rows:
    """Compute metrics of pairs of samples and reference images; add realism and closest pairs to `result`."""
    files = reference.files
    assert files is not None
    rows, real = choose_rows(sample_files.count, limits.samples), files.pool_subset(limits.references)
    is_subset = len(rows) < sample_files.count
    samples = features[rows] if is_subset else features
    if is_subset:
        strata = None  # the class counts of a random subset are random
    if num_workers and num_gpus:  # this process may have no GPU
        make_worker = partial(_make_manifold_metrics, sample_files, files, limits, strata, num_gpus)
        ((_, (manifold_metrics, realism_or_reason)),) = map_items(
            make_worker, ["metrics of neighbours"], 1, num_gpus=num_gpus
        )
    else:
        manifold_metrics, realism_or_reason = _manifold_metrics(real, samples, strata, 0 if num_workers else num_gpus)
    if isinstance(realism_or_reason, str):
        result.missing["realism"] = realism_or_reason
    else:
        result.rows, result.realism = rows, realism_or_reason
    kernel = real[choose_rows(len(real), limits.pairs)], samples[choose_rows(len(samples), limits.pairs)]
    result.same_images = sample_files.count == files.count and _contains_rows(features, real)
    if not reference.training:  # only copies of training images are of interest
        return Rows(real, samples, manifold_metrics, kernel)
    queries = choose_rows(sample_files.count, limits.pairs)
    neighbours, own_squared = nearest_training_features(sample_files, queries, files, num_workers, num_gpus)
    squared = neighbours.squared[:, 0]
    result.closest = Closest(queries, neighbours.index[:, 0], np.sqrt(squared), np.sqrt(own_squared))
    return Rows(real, samples, manifold_metrics, kernel, nearest=(squared, own_squared), num_training=files.count)


def _manifold_metrics(
    real: np.ndarray, samples: np.ndarray, strata: Strata, num_gpus: float
) -> tuple[Manifolds, np.ndarray | str]:
    """Return the metrics of neighbours, and the realism of each sample or the reason why it is not defined."""
    with prepare_device(num_gpus):
        metrics = manifolds(real, samples, k=NEIGHBOURS, strata=strata)
        try:
            return metrics, realism(real, samples)
        except ValueError as error:
            return metrics, str(error)


def _make_manifold_metrics(
    sample_files: FeatureFiles, reference_files: FeatureFiles, limits: Limits, strata: Strata, num_gpus: float
) -> Callable[[str], tuple[Manifolds, np.ndarray | str]]:
    """Load both sets of features in a worker, and return the function that computes the metrics of neighbours."""
    real = reference_files.pool_subset(limits.references)
    samples = sample_files.pool(choose_rows(sample_files.count, limits.samples))
    return lambda _: _manifold_metrics(real, samples, strata, num_gpus)


def _contains_rows(features: np.ndarray, rows: np.ndarray) -> bool:
    """Return whether all `rows` are among the rows of `features`, in any order."""
    hashes = {hash(row.tobytes()) for row in features}
    return all(hash(row.tobytes()) in hashes for row in rows)


def _per_class(
    result: Measurement, reference: Reference, features: np.ndarray, labels: np.ndarray, limits: Limits
) -> dict[int, Estimates]:
    """Return metrics of each class of which both sets have at least two images; if none, add the reason to `result`."""
    files = reference.files
    assert files is not None
    if reason := reference.missing.get("classes"):
        result.missing["per_class"] = reason
        return {}
    if labels.min() < 0:
        result.missing["per_class"] = "the samples have no labels"
        return {}
    real_labels = reference.labels if reference.labels is not None else files.labels()
    if real_labels.min() < 0:
        result.missing["per_class"] = "the reference has no labels"
        return {}
    rows, real = choose_rows(files.count, limits.class_references), files.pool_subset(limits.class_references)

    def metrics(real: np.ndarray, samples: np.ndarray) -> Estimates:
        smaller = min(len(real), len(samples))
        if smaller < 2:
            return {}
        estimates = {"fd": class_frechet_estimate(real, samples), "vendi_score": vendi_estimate(samples)}
        if estimates["fd"].bias is not None:
            estimates["fd_infinity"] = expand_frechet(samples, moments(real)).corrected
        if smaller > NEIGHBOURS:
            estimates["precision"], estimates["recall"] = precision_recall(real, samples, NEIGHBOURS)
        return estimates

    by_label = by_class(metrics, real, real_labels[rows], features, labels)
    return {label: estimates for label, estimates in by_label.items() if estimates}
