"""Features in blocks of 512 indices do not depend on shards, workers and interruptions (promise P5)."""

import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from models.features import Features
from models.metrics import BLOCK, moments
from orchestrator import storage
from orchestrator.evaluation import extraction
from orchestrator.evaluation.extraction import FeatureFiles, Labelled, choose_rows, concatenate, extract_all
from orchestrator.evaluation.extractors import LoadedExtractor, own_extractor
from orchestrator.evaluation.inputs import ImageSet
from tests.orchestrator.evaluation.toy_extractor import ToyExtractor

COUNT = 2 * BLOCK + 76
TOY = partial(own_extractor, "tests.orchestrator.evaluation.toy_extractor.ToyExtractor")


@dataclass(frozen=True)
class Shards:
    """Images in several files of unequal lengths, read by index."""

    folder: str
    bounds: tuple[int, ...]

    def __call__(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for number in range(len(self.bounds) - 1):
            first, last = self.bounds[number], self.bounds[number + 1]
            if first < end and last > begin:
                shard = np.load(f"{self.folder}/{number}.npy")
                parts.append(shard[max(begin - first, 0) : end - first])
        return np.concatenate(parts), np.arange(begin, end) % 3


def sharded(folder: Path, images: np.ndarray, num_shards: int) -> ImageSet:
    rng = np.random.default_rng([61, num_shards])
    cuts = np.sort(rng.choice(np.arange(1, len(images)), num_shards - 1, replace=False))
    bounds = (0, *map(int, cuts), len(images))
    folder.mkdir()
    for number in rng.permutation(num_shards):
        np.save(folder / f"{number}.npy", images[bounds[number] : bounds[number + 1]])
    return ImageSet(str(folder), "samples", len(images), str(num_shards), Shards(str(folder), bounds), seed=3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng([62]).integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8)


def contents(files: FeatureFiles) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(files.folder, name)) for name in storage.list_names(files.folder)}


def test_shards_change_nothing(images: np.ndarray, tmp_path: Path) -> None:
    extracted = []
    for num_shards in (1, 7, 64):
        image_set = sharded(tmp_path / f"in{num_shards}", images, num_shards)
        extracted.append(extract_all(image_set, str(tmp_path / f"out{num_shards}"), TOY, num_workers=0))
    first, *others = map(contents, extracted)
    assert sorted(first) == [f"{b:08d}-{min(b + BLOCK, COUNT):08d}.safetensors" for b in range(0, COUNT, BLOCK)]
    assert all(other == first for other in others)


def test_complete_features_need_no_gpu(images: np.ndarray, tmp_path: Path) -> None:
    """A driver and the trials of a search read finished features on nodes without a GPU."""
    image_set = sharded(tmp_path / "in", images, 2)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            extract_all(image_set, str(tmp_path / "out"), TOY, num_workers=0, num_gpus=1.0)
    files = extract_all(image_set, str(tmp_path / "out"), TOY, num_workers=0)
    assert extract_all(image_set, str(tmp_path / "out"), TOY, num_workers=0, num_gpus=1.0) == files


def test_the_next_block_is_read_during_the_forward_pass(images: np.ndarray, tmp_path: Path) -> None:
    begun = {block: threading.Event() for block in range(0, COUNT, BLOCK)}

    def read(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        begun[begin].set()
        return images[begin:end], np.arange(begin, end)

    class Waiting(ToyExtractor):
        def __call__(self, images: np.ndarray) -> Features:
            assert begun[BLOCK].wait(60), "the second block was not read"
            return super().__call__(images)

    image_set = ImageSet("some", "samples", COUNT, "x", read)
    extract_all(image_set, str(tmp_path), lambda device: LoadedExtractor(Waiting(), "waiting"), num_workers=0)


@pytest.mark.ray
def test_the_pool_changes_nothing(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    image_set = sharded(tmp_path / "in", images, 7)
    unpooled = extract_all(image_set, str(tmp_path / "here"), TOY, num_workers=0)
    pooled = extract_all(image_set, str(tmp_path / "pool"), TOY, num_workers=2)
    assert contents(pooled) == contents(unpooled)
    expected = unpooled.moments("pool", num_workers=0)
    monkeypatch.setattr(extraction, "GROUP", 1)  # one item for each block
    actual = pooled.moments("pool", num_workers=2)
    assert expected.mean.tobytes() == actual.mean.tobytes() and expected.m2.tobytes() == actual.m2.tobytes()


def test_only_missing_features_are_extracted(images: np.ndarray, tmp_path: Path) -> None:
    image_set = sharded(tmp_path / "in", images, 1)
    files = extract_all(image_set, str(tmp_path / "out"), TOY, num_workers=0)
    before = contents(files)
    middle = storage.join(files.folder, f"{BLOCK:08d}-{2 * BLOCK:08d}.safetensors")
    storage.delete(middle)
    read: list[tuple[int, int]] = []

    def recording_read(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        read.append((begin, end))
        return image_set.read(begin, end)

    extract_all(ImageSet("again", "samples", COUNT, "x", recording_read), str(tmp_path / "out"), TOY, num_workers=0)
    assert read == [(BLOCK, 2 * BLOCK)] and contents(files) == before


def test_rows_and_moments_are_those_of_all_features(images: np.ndarray, tmp_path: Path) -> None:
    files = extract_all(sharded(tmp_path / "in", images, 1), str(tmp_path / "out"), TOY, num_workers=0)
    everything = concatenate(files.block(number) for number in range(files.num_blocks))
    np.testing.assert_array_equal(files.pool(), everything.features.pool)
    rows = np.array([0, 511, 512, 700, COUNT - 1])
    np.testing.assert_array_equal(files.pool(rows), everything.features.pool[rows])
    np.testing.assert_array_equal(files.labels(), np.arange(COUNT) % 3)
    assert files.moments("spatial", 0).m2.tobytes() == moments(everything.features.spatial).m2.tobytes()  # type: ignore[arg-type]


def test_few_rows_of_many_are_kept(images: np.ndarray, tmp_path: Path) -> None:
    files = extract_all(sharded(tmp_path / "in", images, 1), str(tmp_path / "out"), TOY, num_workers=0)
    before = storage.list_names(files.folder)
    np.testing.assert_array_equal(files.pool_subset(COUNT), files.pool())
    for _ in range(2):
        np.testing.assert_array_equal(files.pool_subset(100), files.pool(choose_rows(COUNT, 100)))
    assert set(storage.list_names(files.folder)) - set(before) == {f"pool-100-of-{files.count}.safetensors"}


def test_a_damaged_file_is_named(images: np.ndarray, tmp_path: Path) -> None:
    files = extract_all(sharded(tmp_path / "in", images[:9], 1), str(tmp_path / "out"), TOY, num_workers=0)
    uri = storage.join(files.folder, "00000000-00000009.safetensors")
    storage.write_bytes(uri, storage.read_bytes(uri)[:50])
    with pytest.raises(ValueError, match=r"00000000-00000009\.safetensors is damaged .* delete it"):
        files.pool()


def test_concatenation_keeps_order() -> None:
    parts = [Labelled(Features(np.full((n, 4), n, np.float32)), np.arange(n)) for n in (3, 5)]
    merged = concatenate(parts)
    np.testing.assert_array_equal(merged.features.pool[:, 0], [3] * 3 + [5] * 5)
    assert merged.features.spatial is None and merged.labels.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
