"""Preparing a dataset is deterministic and resumable, and reports bad input."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.workers import ItemsFailed
from orchestrator import storage
from orchestrator.data import images, job, shards
from orchestrator.data.config import PrepareConfig
from orchestrator.data.dataset import Manifest, batches, load_manifest, read_images
from orchestrator.data.job import plan, prepare, prepare_and_track
from orchestrator.data.sources import arrays
from orchestrator.order import OrderConfig, OrderPlan
from tests.orchestrator.data import layouts
from tests.orchestrator.data.layouts import pictures
from tests.orchestrator.data.test_images import encode
from tests.orchestrator.digits import digits, table


def make_config(store: Path | str, source: str, **changes: Any) -> PrepareConfig:
    return PrepareConfig(store=str(store), source=source, **{"output": "out", "name": "three", **changes})


def objects(folder: str, ending: str = ".parquet") -> dict[str, bytes]:
    names = [name for name in storage.list_names(folder, recursive=True) if name.endswith(ending)]
    return {name: storage.read_bytes(storage.join(folder, name)) for name in names}


def test_the_digits_are_prepared_with_their_pixels_and_labels(prepared: Manifest) -> None:
    sizes = prepared.row_group_sizes("train")
    assert prepared.num_samples("train") == sum(sizes) == 1437 and prepared.num_samples("validation") == 360
    assert len(sizes) == 16 and set(sizes) == {89, 90}
    assert prepared.classes == tuple("0123456789") and prepared.width == prepared.height == (8, 8)
    train, validation = table(prepared, "train"), table(prepared, "validation")
    assert len({*train["key"], *validation["key"]}) == 1797
    pixels, labels = arrays.digits_pixels()
    for key, label, image in zip(train["key"], train["label"], train["image"], strict=True):
        row = int(key.removeprefix("digit-"))
        assert labels[row] == label
        np.testing.assert_array_equal(np.asarray(images.decode(image)), np.repeat(pixels[row][..., None], 3, 2))
    assert load_manifest(prepared.folder) == prepared


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    source = layouts.write_tree(str(tmp_path / "tree"), pictures(10))
    first, second, other_seed = (
        prepare(make_config(tmp_path, source, output=output, seed=seed))
        for output, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert objects(first.folder) == objects(second.folder)
    assert table(first, "train")["key"] != table(other_seed, "train")["key"]


def test_a_tree_and_its_tar_of_tars_give_the_same_shards(tmp_path: Path, s3_bucket: str) -> None:
    samples = pictures(30)
    on_disk = prepare(make_config(tmp_path, layouts.write_tree(str(tmp_path / "tree"), samples)))
    tar = layouts.write_tar_of_tars(f"{s3_bucket}/all", samples)
    on_s3 = prepare(make_config(s3_bucket, tar, validation_fraction=0.0))
    assert on_s3.splits == on_disk.splits and on_s3.classes == on_disk.classes == layouts.CLASSES
    for shard in on_disk.shards("train"):
        disk_bytes, s3_bytes = (storage.read_bytes(storage.join(m.folder, shard.path)) for m in (on_disk, on_s3))
        assert disk_bytes == s3_bytes


def test_a_finished_dataset_is_found_and_another_config_refused(tmp_path: Path) -> None:
    source = layouts.write_tree(str(tmp_path / "images"), pictures(10))
    config = make_config(tmp_path, source)
    first = prepare(config)
    Path(source, "ant", "ant_000.png").unlink()
    assert prepare(config) == first, "the source is not read again"
    with pytest.raises(ValueError, match=r"out was made with another config.*seed: 0 before, 5 now"):
        prepare(config.model_copy(update={"seed": 5}))


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_a_source_that_changed_since_the_first_attempt_is_refused(change: str, tmp_path: Path) -> None:
    source = layouts.write_tree(str(tmp_path / "images"), pictures(10))
    config = make_config(tmp_path, source)
    Path(prepare(config).folder, "manifest.json").unlink()
    image = Path(source, "ant", "ant_000.png")
    if change == "gone":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"source of .* has changed"):
        prepare(config)


# ------------------------------------------------------------------------------------------------- the shuffle


def is_mixed(groups: list[np.ndarray]) -> bool:
    """Return whether the chi-square of the classes in groups of labels is below its mean + 4 standard deviations."""
    counts = np.array([np.bincount(group, minlength=3) for group in groups])
    expected = counts.sum(1, keepdims=True) / counts.shape[1]
    freedom = counts.shape[0] * (counts.shape[1] - 1)
    return float(((counts - expected) ** 2 / expected).sum()) < freedom + 4 * np.sqrt(2 * freedom)


def batch_labels(manifest: Manifest, epochs: int) -> list[np.ndarray]:
    order = OrderPlan(manifest.row_group_sizes("train"), 32, OrderConfig(num_streams=4, shuffle_row_groups=1))
    drawn = islice(batches(manifest, order, 0, 1, 0, 16, use_ray=False), epochs * order.batches_per_epoch)
    return [np.concatenate([share.labels for share in shares]) for shares in drawn]


def test_batches_of_class_sorted_input_are_mixed(tmp_path: Path) -> None:
    """By the same statistic, batches of a registered set that is sorted by class are not mixed."""
    manifest = prepare(make_config(tmp_path, layouts.write_tar_of_tars(str(tmp_path / "sorted"), pictures(170))))
    groups = np.split(np.array(table(manifest, "train")["label"]), np.cumsum(manifest.row_group_sizes("train"))[:-1])
    assert is_mixed(groups)
    steps = batch_labels(manifest, epochs=3)
    assert len(steps) == 3 * 15 and is_mixed(steps)
    source = layouts.write_parquet(str(tmp_path / "registered"), pictures(170), rows=32)
    assert not is_mixed(batch_labels(prepare(make_config(tmp_path, source, output="unshuffled")), epochs=1))


def test_a_validation_split_is_taken_from_the_training_images(tmp_path: Path) -> None:
    data, _ = layouts.cifar10_archive(20)
    storage.write_bytes(str(tmp_path / "cifar-10-binary.tar.gz"), data)
    config = make_config(tmp_path, str(tmp_path / "cifar-10-binary.tar.gz"), validation_fraction=0.25)
    manifest = prepare(config)
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {
        "train": 75, "validation": 25, "test": 20,
    }  # fmt: skip
    assert all(key.startswith("test_batch/") for key in table(manifest, "test")["key"])
    for split in ("train", "val"):
        layouts.write_tree(str(tmp_path / "tree" / split), pictures(4))
    with pytest.raises(ValueError, match=r"--validation-fraction 0\.25: --source .*has validation images of its own"):
        prepare(config.model_copy(update={"source": str(tmp_path / "tree"), "output": "both"}))


# ------------------------------------------------------------------------------------------------- crops


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def test_stored_crops_are_those_of_training_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    encoded = [encode(noise(*rng.integers(40, 150, 2), 3), form) for form in ["JPEG", "PNG", "WEBP"] * 8]
    encoded += [encode(noise(50, 70)), encode(noise(70, 50, 4)), encode(noise(50, 70, 3), "JPEG", "CMYK")]
    encoded += [encode(noise(99, 64, 3), mode="P"), encode(noise(32, 32, 3)), encode(noise(20, 30, 3))]
    encoded += [with_exif(encode(noise(48, 80, 3), "JPEG"), exif) for exif in (TURNED, b"Exif\0\0MM\0*\xff\xff")]
    samples = [layouts.Picture("ab"[i % 2], f"{i}", data) for i, data in enumerate(encoded)]
    source = layouts.write_tree(str(tmp_path / "images"), samples)
    uncropped = prepare(make_config(tmp_path, source))
    crops = prepare(make_config(tmp_path, source, output="crops", resolution=32))
    assert crops.resolution == 32 and crops.width == crops.height == (32, 32) and uncropped.resolution is None
    assert table(uncropped, "train")["key"] == table(crops, "train")["key"]
    assert {data[:4] for data in table(crops, "train")["image"]} == {b"\x89PNG"}
    expected, labels = read_images(uncropped, "train", 0, 32, 32)
    stored, same_labels = read_images(crops, "train", 0, 32, 32)
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(same_labels, labels)


def test_stored_crops_are_refused_for_another_crop_or_size(tmp_path: Path) -> None:
    source = layouts.write_tree(str(tmp_path / "images"), pictures(10))
    crops = prepare(make_config(tmp_path, source, resolution=16))
    crops.check("train", 16, "center", conditional=True)
    with pytest.raises(ValueError, match=r"crops of 16 pixels .*crop='random' of image_size=16.*without --resolution"):
        crops.check("train", 16, "random")
    with pytest.raises(ValueError, match=r"crop='center' of image_size=8.*or with --resolution 8"):
        read_images(crops, "train", 0, 4, 8)


# ------------------------------------------------------------------------------------------------- bad input


def test_corrupt_images_are_quarantined(tmp_path: Path) -> None:
    source = layouts.write_tree(str(tmp_path / "images"), pictures(50))
    good = Path(source, "bee", "bee_007.png").read_bytes()
    Path(source, "bee", "bee_007.png").write_bytes(good[: len(good) // 2])
    Path(source, "ant", "ant_003.png").write_bytes(b"no image")
    Path(source, "ant", "ant_004.png").write_bytes(b"")
    config = make_config(tmp_path, source, max_corrupt_fraction=0.02)
    manifest = prepare(config)
    assert manifest.quarantined == 3 and manifest.num_samples("train") == 147
    quarantine = storage.read_json(storage.join(manifest.folder, "quarantine.json"))
    assert {entry["key"] for entry in quarantine} == {"bee/bee_007.png", "ant/ant_003.png", "ant/ant_004.png"}
    assert all(entry["reason"] for entry in quarantine)
    report = storage.read_json(storage.join(manifest.folder, "report.json"))
    assert report["findings"]["quarantined_images"]["count"] == 3
    assert report["splits"]["train"]["smallest_class"] == {"name": "ant", "images": 48}
    with pytest.raises(RuntimeError, match=r"images cannot be decoded, more than the 0 .*_00[347]\.png"):
        prepare(config.model_copy(update={"output": "strict", "max_corrupt_fraction": 0.001}))
    assert not Path(tmp_path, "strict", "manifest.json").exists()
    assert prepare(config.model_copy(update={"output": "strict"})).splits == manifest.splits, (
        "a larger share is allowed"
    )


def test_copies_are_reported(tmp_path: Path) -> None:
    samples = pictures(20)
    samples[3] = samples[3]._replace(data=samples[2].data)
    layouts.write_tree(str(tmp_path / "images" / "train"), samples)
    layouts.write_tree(str(tmp_path / "images" / "val"), [samples[7], *pictures(4, seed=9)])
    prepare(make_config(tmp_path, str(tmp_path / "images")))
    findings = storage.read_json(str(tmp_path / "out" / "report.json"))["findings"]
    assert findings.keys() == {"duplicate_images", "duplicate_images_across_splits"}
    assert findings["duplicate_images"]["count"] == 1
    assert set(findings["duplicate_images"]["examples"][0].split(" = ")) == {
        "train/ant/ant_002.png", "train/ant/ant_003.png",
    }  # fmt: skip
    assert findings["duplicate_images_across_splits"]["examples"] == ["val/ant/ant_007.png = train/ant/ant_007.png"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    text = plan(digits(str(tmp_path)))[1]
    assert "digits: 1,797 images" in text and "train: 1,437 images, 16 row groups, 1 shard\n" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_does_not_read_through_large_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, layouts.write_class_tars(str(tmp_path / "tars"), pictures(10)), num_workers=2)
    assert "30 images" in plan(config)[1], "without Ray"
    monkeypatch.setattr("orchestrator.data.job.DRY_SCAN_BYTES", 1000)
    assert "3 objects, 0.0 GiB" in plan(config)[1]


def test_the_contact_sheet_is_written_and_the_summary_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    samples = pictures(20)
    source = layouts.write_tree(str(tmp_path / "images"), [samples[0]._replace(name="again"), *samples])
    prepare_and_track(make_config(tmp_path, source))
    text = capsys.readouterr().out
    assert "train 61 images of 3 classes, 0 quarantined" in text
    assert "duplicate images: 1 (ant/" in text
    sheet = images.decode(Path(tmp_path, "out", "contact-sheet.png").read_bytes())
    assert sheet.width == 10 * 66 + 2 and sheet.height == 7 * 80 + 2


# ------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, s3_bucket: str, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    source = layouts.write_tar_of_tars(f"{s3_bucket}/all", pictures(60))
    unpooled, pooled = (prepare(make_config(tmp_path, source, output=f"with-{n}", num_workers=n)) for n in (0, 2))
    assert len(unpooled.shards("train")) == 16 and unpooled.splits == pooled.splits
    assert objects(unpooled.folder) == objects(pooled.folder)


@pytest.mark.ray
def test_errors_of_workers_name_the_object(tmp_path: Path, ray_session: None) -> None:
    tars = layouts.write_class_tars(str(tmp_path / "tars"), pictures(10))
    bee = Path(tars, "bee.tar")
    bee.write_bytes(bee.read_bytes()[:3_000])
    with pytest.raises(ItemsFailed, match=r"bee\.tar is (truncated|not a valid tar)"):
        prepare(make_config(tmp_path, tars, num_workers=2))


def make_dying_writer(output: str, resolution: int | None) -> Callable[[int], shards.Facts]:
    """Return a worker that is killed in the middle of shard 1, but only once, and always fails in shard 3."""
    write, row = shards.make_shard_writer(output, resolution), shards._row
    current, rows_written = 0, 0

    def dying_row(*arguments: Any) -> Any:
        nonlocal rows_written
        rows_written += 1
        if rows_written == 5 and current == 1 and storage.put_if_absent(f"{output}/died", b""):
            os.kill(os.getpid(), signal.SIGKILL)
        if rows_written == 5 and current == 3:
            raise OSError("the disk is gone")
        return row(*arguments)

    def write_or_die(number: int) -> shards.Facts:
        nonlocal current, rows_written
        current, rows_written = number, 0
        return write(number)

    shards._row = dying_row  # type: ignore[assignment]
    return write_or_die


@pytest.mark.ray
def test_killed_workers_change_no_byte(tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    source = layouts.write_tar_of_tars(str(tmp_path / "all"), pictures(60))
    undisturbed = prepare(make_config(tmp_path, source))
    config = make_config(tmp_path, source, output="killed", num_workers=2)
    with monkeypatch.context() as deadly:
        deadly.setattr("orchestrator.data.job.make_shard_writer", make_dying_writer)
        with pytest.raises(ItemsFailed, match=r"1 items failed, the others are done: 3, 3 times: .*the disk is gone"):
            prepare(config)
    assert Path(tmp_path, "killed", "died").exists()
    names = {shard.path for shard in undisturbed.shards("train")}
    assert names - set(storage.list_names(str(tmp_path / "killed"))) == {undisturbed.shards("train")[3].path}
    assert prepare(config).splits == undisturbed.splits
    assert objects(str(tmp_path / "killed")) == objects(undisturbed.folder)


DIES = """
import os, signal, sys
from orchestrator.data import shards
from orchestrator.data.config import PrepareConfig
from orchestrator.data.job import prepare
shards.SHARD_BYTES, row, left = 20_000, shards._row, int(sys.argv[3])

def dying_row(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return row(*arguments)

shards._row = dying_row
prepare(PrepareConfig(store=sys.argv[1], source=sys.argv[2], output="out", name="three"))
"""


def test_an_output_in_the_source_is_no_part_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = layouts.write_tree(str(tmp_path / "images"), pictures(10))
    undisturbed = prepare(make_config(tmp_path, source))
    inside = make_config(tmp_path, source, output=f"{source}/prepared")

    def fail(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as killed:
        killed.setattr(job, "_summarize", fail)
        with pytest.raises(OSError, match="killed"):
            prepare(inside)
    assert prepare(inside).splits == undisturbed.splits
    other = layouts.write_tree(str(tmp_path / "other"), pictures(2))
    with pytest.raises(ValueError, match=r"--output .*other is the folder of --source"):
        prepare(make_config(tmp_path, other, output=other))


def test_a_killed_job_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    source = layouts.write_tree(str(tmp_path / "images"), pictures(60))
    undisturbed = prepare(make_config(tmp_path, source, output="undisturbed"))
    command = [sys.executable, "-c", DIES, str(tmp_path), source, "77"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    finished = {name for name in objects(str(tmp_path / "out")) if name.startswith("train")}
    assert 2 <= len(finished) < 16, "shards are written whole or not at all"
    written: set[str] = set()
    write = shards._write_shard

    def record(output: str, plan: shards.Plan, shard: shards.ShardPlan, *rest: Any) -> None:
        written.add(shard.path)
        write(output, plan, shard, *rest)

    monkeypatch.setattr(shards, "_write_shard", record)
    manifest = prepare(make_config(tmp_path, source))
    assert written == {shard.path for shard in manifest.shards("train")} - finished, "finished shards are kept"
    assert objects(manifest.folder) == objects(undisturbed.folder) and manifest.splits == undisturbed.splits
