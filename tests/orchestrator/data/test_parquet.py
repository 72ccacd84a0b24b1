"""Parquet in the public ImageNet layout is registered from its footers, and errors name the problem."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from orchestrator import storage
from orchestrator.data import job, shards
from orchestrator.data.config import PrepareConfig
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import Manifest, read_images
from orchestrator.data.images import decode
from orchestrator.data.job import contact_sheet, plan, prepare
from orchestrator.data.sources.parquet import narrow_row_groups
from orchestrator.training.job import train
from orchestrator.training.presets import adm_presets
from tests.orchestrator.data.layouts import CLASSES, Picture, pictures, write_parquet
from tests.orchestrator.digits import table

SHUFFLED = [pictures(60)[i] for i in np.random.default_rng(0).permutation(180)]


def config(store: Path | str, source: str, **changes: Any) -> PrepareConfig:
    return PrepareConfig(store=str(store), source=source, **{"output": "out", "name": "public", **changes})


def report(manifest: Manifest) -> dict[str, Any]:
    return storage.read_json(storage.join(manifest.folder, "report.json"))["findings"]


@pytest.mark.parametrize("storage_kind", ["disk", "s3"])
def test_registering_copies_nothing_and_reads_all(storage_kind: str, tmp_path: Path, s3_bucket: str) -> None:
    source = write_parquet(f"{tmp_path if storage_kind == 'disk' else s3_bucket}/public", SHUFFLED, classes=CLASSES)
    write_parquet(source, pictures(8, seed=4), file="validation-00000-of-00001.parquet", classes=CLASSES)
    manifest = prepare(config(tmp_path, source))
    assert manifest.registered == source and manifest.classes == CLASSES and manifest.resolution is None
    assert manifest.row_group_sizes("train") == (32,) * 5 + (20,) and manifest.num_samples("validation") == 24
    assert report(manifest) == {}
    assert sorted(storage.list_names(manifest.folder)) == ["config.json", "manifest.json", "report.json"]
    images, labels = read_images(manifest, "train", 0, 180, 16)
    assert labels.tolist() == [CLASSES.index(image.cls) for image in SHUFFLED]
    np.testing.assert_array_equal(images, np.stack([center_crop(decode(image.data), 16) for image in SHUFFLED]))


def test_only_footers_are_read(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six files of 1 MB each, only the footers are read, and some images of the first."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 100_000), dtype=np.uint8)
    rows = [Picture(CLASSES[i % 3], f"{i}", row.tobytes()) for i, row in enumerate(noise)]
    for number in range(6):
        source = write_parquet(f"{s3_bucket}/large", rows[number::6], file=f"train-{number}.parquet")
    read: list[int] = []
    cat_file = s3fs.S3FileSystem._cat_file

    async def counting_cat_file(self: Any, path: str, *args: Any, **kwargs: Any) -> bytes:
        data = await cat_file(self, path, *args, **kwargs)
        read.append(len(data) if path.endswith(".parquet") else 0)
        return data

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", counting_cat_file)
    s3fs.S3FileSystem.clear_instance_cache()  # cached instances use the old method
    assert prepare(config(tmp_path, source)).num_samples("train") == 60
    assert 0 < sum(read) <= 6 * (256 << 10) + (2 << 20)


def test_sorted_row_groups_are_measured_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes = tuple(f"class-{i:02d}" for i in range(20))
    labels = np.repeat(np.arange(20), 100)
    tiny = Picture("", "", pictures(1)[0].data)
    for name, order in (("sorted", np.arange(2000)), ("shuffled", np.random.default_rng(1).permutation(2000))):
        rows = [tiny._replace(cls=classes[label]) for label in labels[order]]
        source = write_parquet(
            str(tmp_path / name), rows, 100, classes=classes, label=lambda image: classes.index(image.cls)
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            findings = report(prepare(config(tmp_path, source, output=f"{name}-out")))
        if name == "sorted":
            finding = findings["train_row_groups_sorted_by_class"]
            assert finding["count"] == 20 and "row group 0: labels 0 to 0" in finding["examples"][0]
            assert "20 of 20 row groups of train" in caplog.text
        else:
            assert findings == {} and caplog.text == ""


def test_a_split_without_labels_is_refused_for_class_conditional_work(tmp_path: Path) -> None:
    source = write_parquet(str(tmp_path / "public"), SHUFFLED, classes=CLASSES)
    write_parquet(source, SHUFFLED[:40], file="test-00000-of-00001.parquet", classes=CLASSES, label=lambda _: -1)
    manifest = prepare(config(tmp_path, source))
    assert manifest.unlabelled == ("test",) and report(manifest)["test_images_without_labels"]["count"] == 40
    manifest.check("train", 16, "random", conditional=True)
    manifest.check("test", 16, "random")
    with pytest.raises(ValueError, match=r"split 'test' of dataset 'public' has no labels \(-1\)"):
        manifest.check("test", 16, "center", conditional=True)
    assert read_images(manifest, "test", 0, 40, 16)[1].tolist() == [-1] * 40

    unlabelled = write_parquet(str(tmp_path / "alone"), SHUFFLED, label=lambda _: -1)
    manifest = prepare(config(tmp_path, unlabelled, output="unlabelled"))
    assert manifest.classes == ()
    digits = adm_presets()["digits"][1].model_copy(update={"store": str(tmp_path), "dataset": "unlabelled"})
    with pytest.raises(ValueError, match=r"split 'train' of dataset 'public' has no labels"):
        train(digits)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_random_row_groups_do_not_count_as_sorted(num_classes: int) -> None:
    """Of 1,000 random row groups, at most one in fifty counts as sorted. Of sorted ones, all within a class do."""
    rng = np.random.default_rng(num_classes)
    for rows in (8, 32, 100):
        groups = rng.integers(0, num_classes, (1000, rows))
        for labels, most in ((groups, 20), (np.sort(groups, axis=None).reshape(1000, rows), None)):
            narrow = narrow_row_groups(np.full(1000, rows), labels.min(1), labels.max(1), num_classes)
            assert len(narrow) <= most if most is not None else len(narrow) >= 1000 - num_classes


@pytest.mark.parametrize("resolution", [None, 16])
def test_a_copy_is_shuffled(resolution: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    samples = pictures(60)
    source = write_parquet(str(tmp_path / "public"), samples, classes=CLASSES)
    write_parquet(source, samples[:9], file="test-00000-of-00001.parquet", classes=CLASSES, label=lambda _: -1)
    copy_config = config(tmp_path, source, copy_parquet=True, resolution=resolution)
    assert "reads" in plan(copy_config)[1] and not Path(tmp_path, "out").exists()
    manifest = prepare(copy_config)
    assert manifest.registered is None and manifest.num_samples("train") == 180 and "test" not in manifest.splits
    assert report(manifest)["test_images_without_labels"]["count"] == 9
    assert not storage.exists(storage.join(manifest.folder, "staged"))
    rows = table(manifest, "train")
    numbers = [int(key.rsplit("/", 1)[1]) for key in rows["key"]]
    assert sorted(numbers) == list(range(180)) != numbers
    assert rows["label"] == [CLASSES.index(samples[number].cls) for number in numbers]
    images, _ = read_images(manifest, "train", 0, 180, 16)
    np.testing.assert_array_equal(images, np.stack([center_crop(decode(samples[n].data), 16) for n in numbers]))


def test_staging_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = pictures(20)
    for i in range(3):
        write_parquet(str(tmp_path / "public"), samples[i::3], file=f"train-{i}.parquet")
    copy_config = config(tmp_path, str(tmp_path / "public"), copy_parquet=True)
    open_output, calls = storage.open_output, 0

    def fail_at_the_second(uri: str) -> Any:
        nonlocal calls
        calls += "staged" in uri
        if calls == 2:
            raise OSError(28, "no space", uri)
        return open_output(uri)

    with monkeypatch.context() as full:
        full.setattr(storage, "open_output", fail_at_the_second)
        with pytest.raises(OSError, match="no space"):
            prepare(copy_config)
    assert len(list(Path(tmp_path, "out", "staged").rglob("*.sizes"))) == 1
    manifest = prepare(copy_config)
    undisturbed = prepare(copy_config.model_copy(update={"output": "undisturbed"}))
    assert manifest.splits == undisturbed.splits and manifest.num_samples("train") == 60


def test_images_that_were_staged_from_another_column_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, thumbs = ([sample.data for sample in pictures(3, seed=seed)] for seed in (1, 2))
    (tmp_path / "public").mkdir()
    table_of_both = pa.table({"photo": photos, "thumb": thumbs, "label": [0, 1, 2] * 3})
    pq.write_table(table_of_both, tmp_path / "public" / "train.parquet")
    first = config(tmp_path, str(tmp_path / "public"), copy_parquet=True, image_column="thumb")

    def fail(*_: Any) -> None:
        raise OSError("killed")

    with monkeypatch.context() as killed:
        killed.setattr(job, "write_plan", fail)
        with pytest.raises(OSError, match="killed"):
            prepare(first)
    manifest = prepare(first.model_copy(update={"image_column": "photo"}))
    assert sorted(table(manifest, "train")["image"]) == sorted(photos)
    assert not (tmp_path / "out" / "staged").exists()


def test_options_that_need_a_copy_are_refused(tmp_path: Path) -> None:
    source = write_parquet(str(tmp_path / "public"), SHUFFLED[:10])
    for field, value in (("resolution", 16), ("validation_fraction", 0.5)):
        option = f"--{field.replace('_', '-')} {value}"
        with pytest.raises(ValueError, match=rf"{option} needs a copy of .* --source .*--copy-parquet"):
            prepare(config(tmp_path, source, **{field: value}))
    storage.write_bytes(str(tmp_path / "map.csv"), b"key,label\na,b\n")
    with pytest.raises(ValueError, match=r"--labels .*map\.csv: the layout parquet has its own labels"):
        prepare(config(tmp_path, source, labels="map.csv"))
    assert not Path(tmp_path, "out").exists()


def test_invalid_parquet_is_refused(tmp_path: Path) -> None:
    def assert_refused(name: str, message: str, columns: dict[str, Any] | None = None) -> None:
        if columns:
            (tmp_path / name).mkdir()
            pq.write_table(pa.table(columns), tmp_path / name / "a.parquet")
        with pytest.raises(ValueError, match=message):
            prepare(config(tmp_path, str(tmp_path / name)))

    good = Path(write_parquet(str(tmp_path / "cut"), SHUFFLED), "data", "train-00000-of-00001.parquet")
    good.write_bytes(good.read_bytes()[:-100])
    assert_refused("cut", r"train-00000-of-00001\.parquet is not a valid Parquet file")
    write_parquet(str(tmp_path / "mixed"), SHUFFLED, label=lambda image: CLASSES.index(image.cls) - 1)
    assert_refused("mixed", r"has labels from -1 to 1; accepted: 0 to 1, or -1 throughout")
    write_parquet(str(tmp_path / "beyond"), SHUFFLED, classes=("ant", "bee"))
    assert_refused("beyond", r"has labels from 0 to 2; accepted: 0 to 1")
    assert_refused(
        "columns", r"a\.parquet: none of its columns .*text, label; pass --image-column", {"text": ["x"], "label": [0]}
    )
    assert_refused("null", r"a\.parquet has null labels", {"image": [b"x", b"y"], "label": [0, None]})
    assert not Path(tmp_path, "out").exists()


def test_the_contact_sheet_of_a_registered_set_omits_undecodable_images(tmp_path: Path) -> None:
    source = write_parquet(str(tmp_path / "public"), [SHUFFLED[0]._replace(data=b"no image"), *SHUFFLED[1:]])
    manifest = prepare(config(tmp_path, source))
    assert manifest.classes == ("0", "1", "2")
    assert decode(contact_sheet(manifest)).size == (10 * 66 + 2, 10 * 80 + 2), "the images that can be decoded"


def test_a_registered_set_without_a_picture_that_can_be_decoded_says_so(tmp_path: Path) -> None:
    source = write_parquet(str(tmp_path / "public"), [image._replace(data=b"no image") for image in SHUFFLED[:8]])
    with pytest.raises(ValueError, match=r"none of the first 8 images of .*public.*parquet can be decoded"):
        contact_sheet(prepare(config(tmp_path, source)))
