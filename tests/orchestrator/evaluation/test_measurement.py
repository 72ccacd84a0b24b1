"""Every metric by its name, from arrays and from files, over the pool as without it."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import neighbours
from models.features import Features
from orchestrator.evaluation.extraction import FeatureFiles, Labelled, chosen, extract_all
from orchestrator.evaluation.extractors import own_extractor
from orchestrator.evaluation.inputs import open_images
from orchestrator.evaluation.measurement import Limits, describe, measure, measure_files, metric_name
from orchestrator.evaluation.references import Reference

TOY = partial(own_extractor, "tests.orchestrator.evaluation.toy_extractor.ToyExtractor")
LIMITS = Limits(samples=50_000, references=10_000)


def labelled(rng: np.random.Generator, spread: float, n: int = 600) -> Labelled:
    """Gaussian features in 4 dimensions, and logits that are always right."""
    labels = np.arange(n) % 3
    pool = (spread * rng.standard_normal((n, 4))).astype(np.float32)
    return Labelled(Features(pool, None, 9 * np.eye(3, dtype=np.float32)[labels]), labels)


def test_collapsed_samples_have_precision_without_recall() -> None:
    rng = np.random.default_rng(3)
    found = measure(labelled(rng, 0.3), labelled(rng, 1.0), "toy")
    assert found["precision"].value > 0.98 and found["recall"].value < 0.3
    assert found["fd_toy"].low is not None and found["fd_toy"].low > 1
    assert found["accuracy"].value == 1 and found["inception_score_toy"].value == pytest.approx(3, rel=0.01)
    assert all(estimate.n == 600 for estimate in found.values())


def test_equal_distributions_are_near() -> None:
    rng = np.random.default_rng(4)
    found = measure(labelled(rng, 1.0), labelled(rng, 1.0), "toy")
    assert found["fd_toy"].value < 0.1
    assert found["kid_toy"].low is not None and found["kid_toy"].high is not None
    assert found["kid_toy"].low < 0.02 and abs(found["kid_toy"].value) < 0.05
    assert found["precision"].value > 0.85 and found["recall"].value > 0.85
    assert found["density"].value == pytest.approx(1, abs=0.2) and found["coverage"].value > 0.85


def test_names_belong_to_their_extractor() -> None:
    assert [metric_name(m, "inception") for m in ("fd", "sfd", "kid", "inception_score")] == [
        "fid", "sfid", "kid", "inception_score",
    ]  # fmt: skip
    assert metric_name("fd", "digits") == "fd_digits"


def test_accuracy_needs_the_extractor_to_know_the_classes() -> None:
    rng = np.random.default_rng(5)
    samples, reference = labelled(rng, 1.0), labelled(rng, 1.0)
    other = Labelled(reference.features, np.arange(600) % 7)  # of seven classes, which the three logits are not
    assert "accuracy" not in measure(samples, other, "toy")


def test_subsets_are_drawn_over_all_classes() -> None:
    rows = chosen(1000, 100)
    assert len(rows) == len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
    assert set(rows % 10) == set(range(10))  # samples of index i are of class i % 10
    np.testing.assert_array_equal(chosen(5, 9), np.arange(5))


def make_sets(folder: Path, num_samples: int) -> tuple[FeatureFiles, Reference]:
    """Samples, darker in one class, and a reference of 700 images, by the toy extractor."""
    rng, files = np.random.default_rng([71]), []
    for name, count in (("made", num_samples), ("real", 700)):
        images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        labels = np.arange(count) % 3
        if name == "made":
            images[labels == 2] //= 2
        np.savez(folder / name, images, labels)
        files.append(extract_all(open_images(str(folder / f"{name}.npz")), str(folder / f"{name}-features"), TOY, 0))
    made, real = files
    statistics: Any = {"pool": real.moments("pool", 0), "spatial": real.moments("spatial", 0)}
    return made, Reference("real", real.fingerprint, statistics, 700, None, real, ("a", "b", "c"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureFiles, Reference]:
    """900 samples and their reference."""
    return make_sets(tmp_path_factory.mktemp("sets"), 900)


def test_files_give_what_arrays_give_and_more(sets: tuple[FeatureFiles, Reference]) -> None:
    made, reference = sets
    assert reference.files is not None
    found = measure_files(made, reference, "toy", LIMITS, num_workers=0)
    in_memory = measure(made.whole(), reference.files.whole(), "toy")
    assert in_memory.items() <= found.estimates.items()
    assert set(found.estimates) - set(in_memory) == {"sfd_toy", "authpct"}
    assert found.missing == {}
    assert all(estimate.n == 900 for estimate in found.estimates.values())
    assert found.per_class[2]["fd"].value > 10 * found.per_class[0]["fd"].value
    assert found.per_class[0]["precision"].value > found.per_class[2]["precision"].value
    assert len(found.realism) == 900 and found.closest is not None and len(found.closest.first(10)) == 10


@pytest.mark.ray
def test_the_pool_changes_nothing(tmp_path: Path, ray_session: None) -> None:
    made, reference = make_sets(tmp_path, neighbours.SHARE_BLOCKS * neighbours.MAX_ROWS + 100)  # two shares
    here, pooled = (measure_files(made, reference, "toy", LIMITS, workers) for workers in (0, 2))
    assert pooled.estimates == here.estimates and pooled.per_class == here.per_class
    np.testing.assert_array_equal(pooled.realism, here.realism)


def test_features_of_different_extractors_are_not_compared(sets: tuple[FeatureFiles, Reference]) -> None:
    made, reference = sets
    other = FeatureFiles(made.folder, made.count, "inception-0123456789ab")
    with pytest.raises(ValueError, match=r"seen by inception-\w+, the reference by toy-quarters"):
        measure_files(other, reference, "toy", LIMITS, num_workers=0)


def test_statistics_alone_leave_out_what_needs_images(sets: tuple[FeatureFiles, Reference]) -> None:
    made, reference = sets
    alone = Reference("r", reference.fingerprint, {"pool": reference.statistics["pool"]}, None,
                      missing={"rows": "no images", "spatial": "no mu_s"})  # fmt: skip
    found = measure_files(made, alone, "toy", LIMITS, num_workers=0)
    assert found.estimates["fd_toy"].value > 0 and "precision" not in found.estimates
    assert found.missing["precision"] == "no images" and found.missing["sfd_toy"] == "no mu_s"


@pytest.mark.parametrize("count", [1, 4, 20])
def test_few_samples_are_told_what_they_cannot_give(
    count: int, tmp_path: Path, sets: tuple[FeatureFiles, Reference]
) -> None:
    _, reference = sets
    np.savez(tmp_path / "few", np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))
    made = extract_all(open_images(str(tmp_path / "few.npz")), str(tmp_path / "features"), TOY, 0)
    found = measure_files(made, reference, "toy", LIMITS, num_workers=0)
    assert ("fd_toy" in found.missing) == (count == 1) and ("precision" in found.missing) == (count <= 5)
    assert "fd_infinity_toy" in found.missing and "labels" in found.missing["accuracy"]
    if count > 1:
        fd = found.estimates["fd_toy"]
        assert fd.low is None and f"n={count}" in fd.note
    assert describe(found.estimates["inception_score_toy"])["n"] == count
