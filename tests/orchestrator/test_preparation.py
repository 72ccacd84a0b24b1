"""Preparing is deterministic, resumable and honest about bad input."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator import images, preparation, storage
from orchestrator.dataset import Manifest, load_manifest
from orchestrator.preparation import PrepareConfig, prepare
from orchestrator.sources import Source, digits_source
from tests.orchestrator.digits import digits, table
from tests.orchestrator.test_images import encode


def write_tree(root: Path, per_class: int, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> str:
    """A tree <class>/<image> of random colour images of several sizes."""
    rng = np.random.default_rng(3)
    for name in classes:
        for i in range(per_class):
            height, width = rng.integers(20, 40, 2)
            data = encode(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            storage.write_bytes(str(root / name / f"{i:03d}.png"), data)
    return str(root)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The scanned digits."""
    return prepare(digits(str(tmp_path_factory.mktemp("store"))))


def test_digits(prepared: Manifest) -> None:
    sizes = prepared.row_group_sizes("train")
    assert prepared.num_samples("train") == sum(sizes) == 1437 and prepared.num_samples("validation") == 360
    assert len(sizes) == 16 and set(sizes) == {89, 90}
    assert prepared.classes == tuple("0123456789") and prepared.width == prepared.height == (8, 8)
    train, validation = table(prepared, "train"), table(prepared, "validation")
    assert len({*train["key"], *validation["key"]}) == 1797
    source = digits_source()
    for key, label, image in zip(train["key"], train["label"], train["image"], strict=True):
        assert source.labels[key] == label and source.read(key) == image
    assert images.decode(train["image"][0]).mode == "RGB"
    assert load_manifest(prepared.folder) == prepared


def test_the_same_config_gives_the_same_bytes(prepared: Manifest, tmp_path: Path) -> None:
    again = prepare(digits(str(tmp_path)))
    for shard in again.shards("train"):
        there, here = (storage.read_bytes(storage.join(m.folder, shard.path)) for m in (prepared, again))
        assert there == here
    other = prepare(digits(str(tmp_path), output="other", seed=1))
    assert table(other, "train")["key"] != table(again, "train")["key"]


def test_an_interrupted_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SHARD_BYTES", 40_000)
    config = digits(str(tmp_path))
    whole = prepare(config)
    assert len(whole.shards("train")) == 4 and len(whole.row_group_sizes("train")) == 16
    bytes_before = {s.path: storage.read_bytes(storage.join(whole.folder, s.path)) for s in whole.shards("train")}
    Path(whole.folder, "manifest.json").unlink()
    Path(whole.folder, whole.shards("train")[1].path).unlink()
    written: list[str] = []
    write = preparation._write_shard

    def record(output: str, shard: preparation._ShardPlan, source: Source) -> None:
        written.append(shard.path)
        write(output, shard, source)

    monkeypatch.setattr(preparation, "_write_shard", record)
    assert prepare(config) == whole
    assert written == [whole.shards("train")[1].path], "finished shards are kept"
    assert bytes_before == {path: storage.read_bytes(storage.join(whole.folder, path)) for path in bytes_before}


def test_a_finished_dataset_is_found_and_another_config_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", per_class=10)
    config = PrepareConfig(store=str(tmp_path), source=source, output="out", name="three")
    first = prepare(config)
    Path(source, "ant", "000.png").unlink()
    assert prepare(config) == first, "the source is not looked at again"
    with pytest.raises(ValueError, match=r"out was made with another config.*seed: 0 there, 5 here"):
        prepare(config.model_copy(update={"seed": 5}))


def test_a_source_that_changed_half_way_is_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", per_class=10)
    config = PrepareConfig(store=str(tmp_path), source=source, output="out", name="three")
    Path(prepare(config).folder, "manifest.json").unlink()
    Path(source, "ant", "000.png").unlink()
    with pytest.raises(ValueError, match=r"begun from a source of 30 images; it has changed \(now 29 images"):
        prepare(config)


def test_row_groups_of_class_sorted_input_are_mixed(tmp_path: Path) -> None:
    """Chi-square of the class counts of every row group: its mean is its degrees of freedom if they are fair."""
    source = write_tree(tmp_path / "images", per_class=128)
    manifest = prepare(PrepareConfig(store=str(tmp_path), source=source, output="out", name="three"))
    labels = np.split(np.array(table(manifest, "train")["label"]), np.cumsum(manifest.row_group_sizes("train"))[:-1])
    counts = np.array([np.bincount(group, minlength=3) for group in labels])
    expected = counts.sum(1, keepdims=True) / 3
    assert ((counts - expected) ** 2 / expected).sum() < 60, "32 degrees of freedom: p = 0.002"


def test_corrupt_images_are_quarantined(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", per_class=50)
    good = Path(source, "bee", "007.png").read_bytes()
    Path(source, "bee", "007.png").write_bytes(good[: len(good) // 2])
    Path(source, "ant", "003.png").write_bytes(b"no image")
    config = PrepareConfig(store=str(tmp_path), source=source, output="out", name="x", max_corrupt_fraction=0.02)
    manifest = prepare(config)
    assert manifest.quarantined == 2 and manifest.num_samples("train") == 148
    quarantine = storage.read_json(storage.join(manifest.folder, "quarantine.json"))
    assert {entry["key"] for entry in quarantine} == {"bee/007.png", "ant/003.png"}
    assert all(entry["reason"] for entry in quarantine)
    with pytest.raises(RuntimeError, match=r"images cannot be decoded, more than the 0 .*(007|003)\.png"):
        prepare(config.model_copy(update={"output": "strict", "max_corrupt_fraction": 0.001}))
    assert not Path(tmp_path, "strict", "manifest.json").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no images"),
        ({"note.txt": b""}, "holds no images"),
        ({"a.png": b"x", "ant/b.png": b"x"}, r"1 images lie in no class folder, a\.png"),
    ],
)
def test_unfit_sources_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, data in files.items():
        storage.write_bytes(str(tmp_path / "images" / name), data)
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(store=str(tmp_path), source=str(tmp_path / "images"), output="out", name="x"))
    assert not Path(tmp_path, "out").exists(), "a folder is claimed only once the source is known to be fit"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    text = preparation.plan(digits(str(tmp_path)))
    assert "1,797 images in 10 classes" in text and "train: 1,437 images, 16 row groups, 1 shards" in text
    assert list(tmp_path.iterdir()) == []
