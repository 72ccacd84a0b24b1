"""References: statistics, features and missing parts of files and datasets; extractors are never mixed."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.metrics import Gaussian, moments
from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.evaluation.extractors import CPU, LoadedExtractor, own_extractor
from orchestrator.evaluation.references import Reference, extract_reference, find_reference
from tests.orchestrator.digits import digits
from tests.orchestrator.evaluation.toy_extractor import FalseInception

TOY = partial(own_extractor, "tests.orchestrator.evaluation.toy_extractor.ToyExtractor")


def inception(device: torch.device) -> LoadedExtractor:
    return LoadedExtractor(FalseInception(), "inception-0123456789ab")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng([70]).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)


def read_reference(path: Path, loader: Any = inception, **arrays: Any) -> Reference:
    np.savez(path / "reference.npz", **arrays)
    source = find_reference(str(path / "reference.npz"), 0)
    return extract_reference(source, loader, loader(CPU), str(path / "features"), 0)


def test_published_statistics_are_used_and_images_give_the_neighbours(images: np.ndarray, tmp_path: Path) -> None:
    published = {
        "mu": np.ones(12, np.float32),
        "sigma": np.eye(12),
        "mu_s": np.ones(4, np.float32),
        "sigma_s": np.eye(4),
    }
    reference = read_reference(tmp_path, arr_0=images, **published)
    for name, dimension in (("pool", 12), ("spatial", 4)):
        statistics = reference.statistics[name]  # type: ignore[index]
        assert isinstance(statistics, Gaussian) and statistics.mean.tolist() == [1] * dimension
    assert reference.files is not None and reference.files.count == 40 and reference.missing == {}


def test_statistics_are_computed_from_images_if_the_file_has_none(images: np.ndarray, tmp_path: Path) -> None:
    reference = read_reference(tmp_path, arr_0=images)
    expected = moments(FalseInception()(images).pool)
    np.testing.assert_array_equal(reference.statistics["pool"].mean, expected.mean)
    assert reference.count == 40


def test_metrics_that_a_file_cannot_give_are_explained(images: np.ndarray, tmp_path: Path) -> None:
    reference = read_reference(tmp_path, mu=np.zeros(12), sigma=np.eye(12))
    assert "no images (arr_0)" in reference.missing["rows"] and "not mu_s and sigma_s" in reference.missing["spatial"]
    assert reference.files is None and reference.count is None


def test_statistics_of_another_extractor_are_never_compared(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mu has 24 dimensions, and features of inception-\w+ have 12"):
        read_reference(tmp_path, arr_0=images, mu=np.zeros(24), sigma=np.eye(24))
    with pytest.raises(ValueError, match="cannot be compared with features of toy-quarters"):
        read_reference(tmp_path, TOY, mu=np.zeros(12), sigma=np.eye(12))
    with_images = read_reference(tmp_path, TOY, arr_0=images, mu=np.zeros(12), sigma=np.eye(12))
    assert with_images.statistics["pool"].mean.min() > 1  # those of the images, not the file's


def test_statistics_are_those_of_the_extractor_that_they_state(images: np.ndarray, tmp_path: Path) -> None:
    statistics = {"mu": np.full(12, 5.0), "sigma": np.eye(12)}
    reference = read_reference(tmp_path, TOY, **statistics, extractor="toy-quarters")
    assert reference.statistics["pool"].mean.tolist() == [5] * 12 and reference.fingerprint == "toy-quarters"
    for loader in (TOY, inception):
        with pytest.raises(ValueError, match=r"of digits-0123 and no images.* (toy-quarters|inception-\w+)"):
            read_reference(tmp_path, loader, **statistics, extractor="digits-0123")
    of_images = read_reference(tmp_path, inception, arr_0=images, **statistics, extractor="digits-0123")
    assert of_images.count == 40 and of_images.statistics["pool"].mean.tolist() != [5] * 12


def test_samples_are_refused_as_a_reference(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/samples/run.json", {})
    with pytest.raises(ValueError, match=r"pass a dataset.*npz"):
        find_reference(f"{tmp_path}/samples", 8)
    storage.write_json(f"{tmp_path}/samples/manifest.json", {"num_samples": 2})
    with pytest.raises(ValueError, match="pass a dataset"):
        find_reference(f"{tmp_path}/samples", 8)


def test_a_dataset_is_extracted_once(tmp_path: Path) -> None:
    folder = prepare(digits(str(tmp_path))).folder
    first = extract_reference(find_reference(folder, 8), TOY, TOY(), "", num_workers=0)
    assert first.files is not None and first.count == first.files.count == 1437 and len(first.classes) == 10
    before = {
        name: storage.read_bytes(storage.join(first.files.folder, name))
        for name in storage.list_names(first.files.folder)
    }
    assert "statistics.safetensors" in before
    second = extract_reference(find_reference(folder, 8), TOY, TOY(), "", num_workers=0)
    np.testing.assert_array_equal(second.statistics["pool"].mean, moments(first.files.pool()).mean)
    assert before == {name: storage.read_bytes(storage.join(first.files.folder, name)) for name in before}
