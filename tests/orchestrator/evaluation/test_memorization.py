"""The nearest training images are exact for any chunk size, also with copies."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from models.manifolds import authentic_share, authenticity
from models.metrics import BLOCK
from models.neighbours import nearest
from orchestrator.evaluation import memorization
from orchestrator.evaluation.extraction import extract_all
from orchestrator.evaluation.extractors import own_extractor
from orchestrator.evaluation.inputs import open_images
from orchestrator.evaluation.memorization import nearest_rows, nearest_training_features, nearest_training_pixels

TOY = partial(own_extractor, "tests.orchestrator.evaluation.toy_extractor.ToyExtractor")


def rows_of(array: np.ndarray, begin: int, end: int) -> np.ndarray:
    return array[begin:end]


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng([63])
    targets = rng.integers(0, 3, (200, 4)).astype(np.float32)  # few values: many ties
    queries = rng.integers(0, 3, (50, 4)).astype(np.float32)
    monkeypatch.setattr(memorization, "CHUNK", chunk)
    actual = nearest_rows(lambda: queries, partial(rows_of, targets), len(targets), 3, num_workers=0)
    expected = nearest(queries, targets, 3)
    np.testing.assert_array_equal(actual.index, expected.index)
    np.testing.assert_array_equal(actual.squared, expected.squared)


@pytest.mark.ray
def test_the_pool_changes_nothing(monkeypatch: pytest.MonkeyPatch, ray_session: None) -> None:
    rng = np.random.default_rng([64])
    targets, queries = rng.standard_normal((300, 6)), rng.standard_normal((40, 6))
    monkeypatch.setattr(memorization, "CHUNK", 70)
    load, read = partial(np.copy, queries), partial(rows_of, targets)
    unpooled, pooled = (nearest_rows(load, read, len(targets), 2, num_workers) for num_workers in (0, 2))
    np.testing.assert_array_equal(pooled.index, unpooled.index)
    np.testing.assert_array_equal(pooled.squared, unpooled.squared)


def test_copies_are_found_among_all_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorization, "CHUNK", BLOCK // 4)
    rng = np.random.default_rng([65])
    training = rng.integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    training[300] = training[20]  # a copy within the training set
    samples = rng.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    samples[10:20] = training[600:610]
    samples[25] = training[20]
    sets, files = {}, {}
    for name, images in (("training", training), ("made", samples)):
        np.savez(tmp_path / name, images)
        sets[name] = open_images(str(tmp_path / f"{name}.npz"))
        files[name] = extract_all(sets[name], str(tmp_path / f"{name}-features"), TOY, num_workers=0)
    rows = np.arange(60)
    neighbours, own_squared = nearest_training_features(files["made"], rows, files["training"], num_workers=0)
    assert neighbours.index[10:20, 0].tolist() == list(range(600, 610)) and neighbours.index[25, 0] == 20
    assert own_squared[25] == 0 and (own_squared[10:20] > 0).all()
    expected_share = authenticity(files["training"].pool(), files["made"].pool())
    assert authentic_share(neighbours.squared[:, 0], own_squared) == expected_share

    distances = nearest_training_pixels(sets["made"], 40, sets["training"], num_workers=0)
    assert len(distances) == 40 and distances[10:20] == [0.0] * 10 and distances[25] == 0 and min(distances[:10]) > 10


def test_large_images_are_downsampled_before_they_are_compared(tmp_path: Path) -> None:
    images = np.random.default_rng([66]).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "large", images)
    assert memorization.pixel_rows(open_images(str(tmp_path / "large.npz")), 0, 3).shape == (3, 32 * 32 * 3)
