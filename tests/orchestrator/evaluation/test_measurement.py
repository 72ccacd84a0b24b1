"""All metrics from stored features, with and without a pool."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.evaluation.extraction import FeatureFiles, choose_rows, concatenate, extract_all
from orchestrator.evaluation.extractors import own_extractor
from orchestrator.evaluation.inputs import open_images
from orchestrator.evaluation.measurement import Closest, Limits, measure_files, strata_of
from orchestrator.evaluation.metrics import describe, measure
from orchestrator.evaluation.references import Reference
from tests.orchestrator.evaluation.test_metrics import compare

TOY = partial(own_extractor, "tests.orchestrator.evaluation.toy_extractor.ToyExtractor")
LIMITS = Limits()


def test_subsets_are_drawn_over_all_classes() -> None:
    rows = choose_rows(1000, 100)
    assert len(rows) == len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
    assert set(rows % 10) == set(range(10))  # samples of index i are of class i % 10
    np.testing.assert_array_equal(choose_rows(5, 9), np.arange(5))


@pytest.mark.filterwarnings("error")
def test_training_images_with_exact_copies_come_last_among_the_closest_and_cause_no_warning() -> None:
    closest = Closest(np.arange(3), np.arange(3), np.array([5.0, 3.0, 1.0]), np.array([0.0, 1.0, 2.0]))
    assert [pair["sample"] for pair in closest.first(3)] == [2, 1, 0]


def make_sets(folder: Path, num_samples: int) -> tuple[FeatureFiles, Reference]:
    """Return samples that are darker in one class, and a reference of 700 images, by the toy extractor."""
    rng, files = np.random.default_rng([71]), []
    for name, count in (("made", num_samples), ("real", 700)):
        images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        labels = np.arange(count) % 3
        if name == "made":
            images[labels == 2] //= 2
        np.savez(folder / name, images, labels)
        files.append(extract_all(open_images(str(folder / f"{name}.npz")), str(folder / f"{name}-features"), TOY, 0))
    samples, real = files
    statistics: Any = {"pool": real.moments("pool", 0), "spatial": real.moments("spatial", 0)}
    return samples, Reference("real", real.fingerprint, statistics, 700, None, real, ("a", "b", "c"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureFiles, Reference]:
    """Return 900 samples and their reference."""
    return make_sets(tmp_path_factory.mktemp("sets"), 900)


def test_files_give_the_estimates_of_arrays_and_more(sets: tuple[FeatureFiles, Reference]) -> None:
    samples, reference = sets
    assert reference.files is not None
    measured = measure_files(samples, reference, "toy", LIMITS, num_workers=0)
    in_samples, in_reference = (
        concatenate(files.block(number) for number in range(2)) for files in (samples, reference.files)
    )
    in_memory, _ = measure(compare(in_samples, in_reference, strata=samples.labels()))
    assert in_memory.items() <= measured.estimates.items()
    assert set(measured.estimates) - set(in_memory) == {"sfd_toy", "sfd_infinity_toy", "authpct"}
    assert measured.missing == {}
    at_equal_counts = {"density", "coverage", "clipped_density", "clipped_coverage"}
    assert all(estimate.n == (700 if name in at_equal_counts else 900) for name, estimate in measured.estimates.items())
    assert measured.per_class[2]["fd"].value > 10 * measured.per_class[0]["fd"].value
    assert measured.per_class[0]["precision"].value > measured.per_class[2]["precision"].value
    assert len(measured.realism) == 900 and measured.closest is not None and len(measured.closest.first(10)) == 10


def test_labels_are_strata_where_their_counts_are_fixed() -> None:
    balanced, drawn = np.arange(30) % 3, np.random.default_rng(1).integers(0, 3, 30)
    assert strata_of(balanced, None) is balanced and strata_of(balanced, "balanced") is balanced
    assert strata_of(balanced, "uniform") is None and strata_of(drawn, None) is None
    assert strata_of(np.array([3, 7, 7] * 9), "3,7,7") is not None and strata_of(np.full(30, -1), None) is None
    assert strata_of(np.arange(30), None) is None  # one sample of each class has no spread of its own


@pytest.mark.ray
def test_the_pool_changes_nothing(tmp_path: Path, ray_session: None) -> None:
    samples, reference = make_sets(tmp_path, 900)
    unpooled, pooled = (measure_files(samples, reference, "toy", LIMITS, num_workers) for num_workers in (0, 2))
    assert pooled.estimates == unpooled.estimates and pooled.per_class == unpooled.per_class
    np.testing.assert_array_equal(pooled.realism, unpooled.realism)


def test_features_of_different_extractors_are_not_compared(sets: tuple[FeatureFiles, Reference]) -> None:
    samples, reference = sets
    other = FeatureFiles(samples.folder, samples.count, "inception-0123456789ab")
    with pytest.raises(ValueError, match=r"inception-\w+, .* toy-quarters"):
        measure_files(other, reference, "toy", LIMITS, num_workers=0)


def test_statistics_without_images_omit_metrics_that_need_images(sets: tuple[FeatureFiles, Reference]) -> None:
    samples, reference = sets
    statistics_only = Reference("r", reference.fingerprint, {"pool": reference.statistics["pool"]}, None,
                      missing={"rows": "no images", "spatial": "no mu_s"})  # fmt: skip
    measured = measure_files(samples, statistics_only, "toy", LIMITS, num_workers=0)
    assert measured.estimates["fd_toy"].value > 0 and "precision" not in measured.estimates
    assert measured.missing["precision"] == "no images" and measured.missing["sfd_toy"] == "no mu_s"


@pytest.mark.parametrize("count", [1, 4, 20])
def test_few_samples_have_notes_about_missing_metrics(
    count: int, tmp_path: Path, sets: tuple[FeatureFiles, Reference]
) -> None:
    _, reference = sets
    np.savez(tmp_path / "few", np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))
    samples = extract_all(open_images(str(tmp_path / "few.npz")), str(tmp_path / "features"), TOY, 0)
    measured = measure_files(samples, reference, "toy", LIMITS, num_workers=0)
    assert ("fd_toy" in measured.missing) == (count == 1) and ("precision" in measured.missing) == (count <= 5)
    assert "fd_infinity_toy" in measured.missing and "labels" in measured.missing["accuracy"]
    if count > 1:
        fd = measured.estimates["fd_toy"]
        assert fd.low is None and f"n={count}" in fd.note
    assert describe(measured.estimates["inception_score_toy"])["n"] == count


@pytest.mark.parametrize(("same", "limit"), [(True, 700), (True, 100), (False, 100)])
def test_a_set_is_recognised_as_its_own_reference_at_any_size(
    same: bool, limit: int, tmp_path: Path, sets: tuple[FeatureFiles, Reference]
) -> None:
    _, reference = sets
    assert reference.files is not None
    samples = reference.files if same else make_sets(tmp_path, 700)[0]
    measured = measure_files(samples, reference, "toy", Limits(references=limit), num_workers=0)
    assert measured.same_images == same
