"""The table of metrics: conventions, names, requirements and scores."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from models.features import Features
from models.manifolds import manifolds
from models.metrics import Estimate, Gaussian, Moments, moments
from orchestrator.evaluation.extraction import ArrayName, Labelled
from orchestrator.evaluation.metrics import METRICS, Comparison, Rows, measure, metric_named


def labelled(rng: np.random.Generator, spread: float, n: int = 600) -> Labelled:
    """Return Gaussian features in 4 dimensions, and logits that are always right."""
    labels = np.arange(n) % 3
    pool = (spread * rng.standard_normal((n, 4))).astype(np.float32)
    return Labelled(Features(pool, None, 9 * np.eye(3, dtype=np.float32)[labels]), labels)


def compare(
    samples: Labelled,
    reference: Labelled,
    num_classes: int = 3,
    extractor: str = "toy",
    strata: np.ndarray | None = None,
) -> Comparison:
    """Return a comparison of all samples with the whole reference."""
    fake, real = samples.features, reference.features
    rows = Rows(real.pool, fake.pool, manifolds(real.pool, fake.pool, strata=strata), kernel=(real.pool, fake.pool))
    statistics: dict[ArrayName, Moments | Gaussian] = {"pool": moments(real.pool)}
    read: Any = vars(fake).get
    return Comparison(extractor, read, samples.labels, statistics, num_classes, rows, strata=strata)


def estimates(samples: Labelled, reference: Labelled) -> dict[str, Estimate]:
    return measure(compare(samples, reference))[0]


def test_collapsed_samples_have_precision_without_recall() -> None:
    rng = np.random.default_rng(3)
    by_name = estimates(labelled(rng, 0.3), labelled(rng, 1.0))
    assert by_name["precision"].value > 0.98 and by_name["recall"].value < 0.3
    assert by_name["fd_toy"].low is not None and by_name["fd_toy"].low > 1
    assert by_name["accuracy"].value == 1 and by_name["inception_score_toy"].value == pytest.approx(3, rel=0.01)
    assert all(estimate.n == 600 for estimate in by_name.values())
    assert next(iter(by_name)) == "fd_infinity_toy" and by_name["fd_toy"].bias is not None


def test_equal_distributions_have_small_distances() -> None:
    rng = np.random.default_rng(4)
    by_name = estimates(labelled(rng, 1.0), labelled(rng, 1.0))
    assert by_name["fd_toy"].value < 0.1
    assert by_name["kid_toy"].low is not None and by_name["kid_toy"].high is not None
    assert by_name["kid_toy"].low < 0.02 and abs(by_name["kid_toy"].value) < 0.05
    assert by_name["precision"].value > 0.85 and by_name["recall"].value > 0.85
    assert by_name["density"].value == pytest.approx(1, abs=0.2) and by_name["coverage"].value > 0.85


@pytest.mark.parametrize("extractor", ["inception", "digits", "efficientnet_lite0"])
def test_reported_names_identify_their_metric(extractor: str) -> None:
    for metric in METRICS.values():
        assert metric_named(metric.report_name(extractor)) is metric
    assert METRICS["fd"].report_name(extractor) == ("fid" if extractor == "inception" else f"fd_{extractor}")
    assert METRICS["recall"].report_name(extractor) == "recall"
    with pytest.raises(ValueError, match="no metric 'fvd'"):
        metric_named("fvd")


def test_accuracy_needs_the_extractor_to_know_the_classes() -> None:
    rng = np.random.default_rng(5)
    measured, missing = measure(compare(labelled(rng, 1.0), labelled(rng, 1.0), num_classes=7))  # three logits
    assert "accuracy" not in measured and "classes" in missing["accuracy"]


def test_accuracy_needs_the_same_class_names() -> None:
    rng = np.random.default_rng(9)
    comparison = compare(labelled(rng, 1.0), labelled(rng, 1.0))
    measured, missing = measure(replace(comparison, missing={"accuracy": "other names"}))
    assert "accuracy" not in measured and missing["accuracy"] == "other names"


def test_balanced_labels_make_shorter_intervals() -> None:
    rng = np.random.default_rng(10)
    comparison = compare(labelled(rng, 1.0), labelled(rng, 1.0))
    shifted = comparison.pool + comparison.labels[:, None] * np.array([2, 0, 0, 0], np.float32)
    comparison = replace(
        comparison, read={"pool": shifted, "logits": comparison.logits}.get, missing={"rows": "none"}, rows=None
    )
    drawn, balanced = measure(comparison)[0], measure(replace(comparison, strata=comparison.labels))[0]
    for name in ("fd_toy", "fd_infinity_toy"):
        (a, b), (c, d) = ((by_name[name].low or 0.0, by_name[name].high or 0.0) for by_name in (drawn, balanced))
        assert 0 < d - c < 0.8 * (b - a)
    assert drawn["fd_toy"].value == balanced["fd_toy"].value


def test_metrics_that_do_not_apply_are_neither_measured_nor_missing() -> None:
    rng = np.random.default_rng(6)
    measured, missing = measure(compare(labelled(rng, 1.0), labelled(rng, 1.0)))
    assert {"sfd_toy", "authpct", "precision_openai", "recall_openai"}.isdisjoint(measured.keys() | missing.keys())
    published, _ = measure(compare(labelled(rng, 1.0), labelled(rng, 1.0), extractor="inception"))
    assert {"fid", "precision_openai", "recall_openai"} <= published.keys()


def test_features_are_read_once() -> None:
    """Each read of an array reads all blocks from storage."""
    rng, reads = np.random.default_rng(8), list[str]()
    comparison = compare(labelled(rng, 1.0), labelled(rng, 1.0))

    def read(name: ArrayName) -> np.ndarray | None:
        reads.append(name)
        return comparison.read(name)

    measure(replace(comparison, read=read))
    assert sorted(reads) == ["logits", "pool"]


def test_scores_are_negative_where_more_is_better() -> None:
    """The mean of the scores is the metric itself, with its sign; of FD it is the bias-corrected one."""
    rng = np.random.default_rng(7)
    comparison = compare(labelled(rng, 0.9), labelled(rng, 1.0))
    measured, _ = measure(comparison)
    for name, value in (
        ("fd", measured["fd_infinity_toy"].value),
        ("kid", measured["kid_toy"].value),
        ("precision", -measured["precision"].value),
        ("accuracy", -1.0),
    ):
        metric = METRICS[name]
        assert metric.scores is not None and metric.sign == (1 if name in ("fd", "kid") else -1)
        assert metric.scores(comparison).mean() == pytest.approx(value, abs=1e-9)
