"""Evaluation: block-wise features, resumable, and the metrics that come out of them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from models.features import Features
from orchestrator import storage
from orchestrator.dataset import load_manifest, read_images
from orchestrator.evaluation import (
    BLOCK,
    EvaluationConfig,
    Labelled,
    concatenate,
    digits_extractor,
    evaluate,
    extract_all,
    measure,
)
from orchestrator.preparation import PrepareConfig, prepare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the prepared digits."""
    store = str(tmp_path_factory.mktemp("store"))
    prepare(PrepareConfig(store=store, source="digits", output="digits", name="digits", validation_fraction=0.2))
    return f"{store}/digits"


def test_features_do_not_depend_on_how_they_were_cut_or_resumed(dataset: str, tmp_path: Path) -> None:
    manifest = load_manifest(dataset)
    extractor = partial(digits_extractor, dataset, str(tmp_path / "extractors"), 7, 8)
    assert extractor().held_out_accuracy > 0.97
    read = partial(read_images, manifest, "train", image_size=8)
    count = BLOCK + 100
    whole = extract_all("digits", read, count, str(tmp_path / "features"), extractor, num_workers=0)
    assert whole.features.pool.shape == (count, 32) and whole.labels.tolist() == read(0, count)[1].tolist()

    folder = storage.join(str(tmp_path / "features"), extractor().fingerprint)
    assert storage.list_names(folder) == ["00000000-00000512.safetensors", "00000512-00000612.safetensors"]
    storage.delete(storage.join(folder, "00000000-00000512.safetensors"))
    again = extract_all("digits", read, count, str(tmp_path / "features"), extractor, num_workers=0)
    assert np.array_equal(whole.features.pool, again.features.pool)


def test_samples_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    config = EvaluationConfig(store=str(tmp_path), samples="none", reference="digits", output="evaluation")
    with pytest.raises(FileNotFoundError, match="none holds no finished samples: generate them first"):
        evaluate(config)


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


def test_concatenation_keeps_order() -> None:
    rng = np.random.default_rng(5)
    parts = [labelled(rng, 1.0, n) for n in (3, 5)]
    whole = concatenate(parts)
    assert np.array_equal(whole.features.pool, np.concatenate([part.features.pool for part in parts]))
    assert whole.features.spatial is None and len(whole.labels) == 8
