"""Preparing is deterministic, resumable and honest about bad input; batches follow the plan, wherever they are
read from and by however many workers."""

import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator import dataset, storage
from orchestrator.dataset import Manifest, Microbatch, PrepareConfig, batches, load_manifest, prepare, read_images
from orchestrator.order import OrderConfig, OrderPlan, Purpose, sample_rng


def encode(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, form)
    return file.getvalue()


def write_tree(root: Path, per_class: int, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> str:
    """A tree <class>/<image> of random colour images of several sizes."""
    rng = np.random.default_rng(3)
    for name in classes:
        for i in range(per_class):
            height, width = rng.integers(20, 40, 2)
            data = encode(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            storage.write_bytes(str(root / name / f"{i:03d}.png"), data)
    return str(root)


def digits(store: str, **changes: Any) -> PrepareConfig:
    settings = {"source": "digits", "output": "digits", "name": "digits", "validation_fraction": 0.2}
    return PrepareConfig(store=store, **{**settings, **changes})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The scanned digits."""
    return prepare(digits(str(tmp_path_factory.mktemp("store"))))


def table(manifest: Manifest, split: str) -> dict[str, list[Any]]:
    tables = [pq.read_table(storage.join(manifest.folder, s.path)) for s in manifest.shards(split)]
    return {name: [v for t in tables for v in t[name].to_pylist()] for name in tables[0].column_names}


# ----------------------------------------------------------------------------------------------------- prepare


def test_digits(prepared: Manifest) -> None:
    sizes = prepared.row_group_sizes("train")
    assert prepared.num_samples("train") == sum(sizes) == 1437 and prepared.num_samples("validation") == 360
    assert len(sizes) == 16 and set(sizes) == {89, 90}
    assert prepared.classes == tuple("0123456789") and prepared.width == prepared.height == (8, 8)
    train, validation = table(prepared, "train"), table(prepared, "validation")
    assert len({*train["key"], *validation["key"]}) == 1797
    source = dataset.digits_source()
    for key, label, image in zip(train["key"], train["label"], train["image"], strict=True):
        assert source.labels[key] == label and source.read(key) == image
    assert dataset.decode(train["image"][0]).mode == "RGB"
    assert load_manifest(prepared.folder) == prepared


def test_the_same_config_gives_the_same_bytes(prepared: Manifest, tmp_path: Path) -> None:
    again = prepare(digits(str(tmp_path)))
    for shard in again.shards("train"):
        there, here = (storage.read_bytes(storage.join(m.folder, shard.path)) for m in (prepared, again))
        assert there == here
    other = prepare(digits(str(tmp_path), output="other", seed=1))
    assert table(other, "train")["key"] != table(again, "train")["key"]


def test_an_interrupted_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SHARD_BYTES", 40_000)
    config = digits(str(tmp_path))
    whole = prepare(config)
    assert len(whole.shards("train")) == 4 and len(whole.row_group_sizes("train")) == 16
    bytes_before = {s.path: storage.read_bytes(storage.join(whole.folder, s.path)) for s in whole.shards("train")}
    Path(whole.folder, "manifest.json").unlink()
    Path(whole.folder, whole.shards("train")[1].path).unlink()
    written: list[str] = []
    write = dataset._write_shard

    def record(output: str, shard: dataset._ShardPlan, source: dataset.Source) -> None:
        written.append(shard.path)
        write(output, shard, source)

    monkeypatch.setattr(dataset, "_write_shard", record)
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
    text = dataset.plan(digits(str(tmp_path)))
    assert "1,797 images in 10 classes" in text and "train: 1,437 images, 16 row groups, 1 shards" in text
    assert list(tmp_path.iterdir()) == []


def test_manifests_that_are_none(tmp_path: Path, prepared: Manifest) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished dataset"):
        load_manifest(str(tmp_path))
    fields = prepared.model_dump(mode="json")
    storage.write_json(str(tmp_path / "manifest.json"), fields | {"format_version": 2})
    with pytest.raises(ValueError, match="format_version"):
        load_manifest(str(tmp_path))
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        prepared.row_group_sizes("test")


# ------------------------------------------------------------------------------------------- decoding and crops


def test_everything_becomes_rgb() -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    grey, alpha = colour[..., 0], np.dstack([colour, colour[..., 0]])
    np.testing.assert_array_equal(np.asarray(dataset.decode(encode(grey))), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(np.asarray(dataset.decode(encode(alpha))), colour)  # alpha is dropped
    for data in (encode(colour, mode="P"), encode(colour, "JPEG", "CMYK"), encode(colour, "WEBP"), encode(grey, "GIF")):
        assert np.asarray(dataset.decode(data)).shape == (12, 10, 3)


@pytest.mark.parametrize("cut", [0, 10, 60, 200])
def test_truncated_images_are_one_clear_error(cut: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "WEBP"):
        with pytest.raises(ValueError, match=r"Error: "):
            dataset.decode(encode(pixels, form)[:cut])


def test_center_crop_is_the_published_rule() -> None:
    rng = np.random.default_rng(0)
    for width, height, size in [(8, 8, 16), (100, 64, 32), (65, 131, 32), (500, 375, 64), (33, 33, 33)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = dataset.center_crop(image, size)
        halvings = max(int(np.log2(min(width, height) / size)), 0)
        for _ in range(halvings):
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        side = min(image.size)
        image = image.resize(
            (round(image.width * size / side), round(image.height * size / side)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        np.testing.assert_array_equal(found, np.asarray(image.crop((left, top, left + size, top + size))))


def test_random_crop_reaches_every_scale_and_place() -> None:
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    image = Image.fromarray(
        np.dstack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200), np.uint8)])
    )
    crops = np.stack([dataset.random_crop(image, 40, np.random.default_rng(i)) for i in range(300)]).astype(int)
    assert crops.shape == (300, 40, 40, 3)
    left, span = crops[:, 20, 0, 0], crops[:, 20, -1, 0] - crops[:, 20, 0, 0]
    assert left.min() <= 6 and (left + span).max() >= 249, "up to both edges"
    assert span.min() < 255 * 0.80 and span.max() > 255 * 0.96, "from 40 of 50 pixels to all of 40"
    np.testing.assert_array_equal(crops[7], dataset.random_crop(image, 40, np.random.default_rng(7)))


# ------------------------------------------------------------------------------------------------- microbatches


def make_order(manifest: Manifest, seed: int = 0, batch_size: int = 64, split: str = "train") -> OrderPlan:
    config = OrderConfig(seed=seed, num_streams=4, window=2)
    return OrderPlan(manifest.row_group_sizes(split), batch_size, config)


def global_batches(
    manifest: Manifest, world_size: int, position: int, steps: int, **options: Any
) -> list[list[Microbatch]]:
    """Every step's microbatches of all streams, made by `world_size` workers."""
    order, options = make_order(manifest), {"image_size": 16, "use_ray": False, **options}
    workers = [
        islice(batches(manifest, order, rank, world_size, position, **options), steps) for rank in range(world_size)
    ]
    return [[m for part in parts for m in part] for parts in zip(*workers, strict=True)]


def same(first: list[list[Microbatch]], second: list[list[Microbatch]]) -> bool:
    names = ("images", "labels", "samples", "flips", "replaced")
    return len(first) == len(second) and all(
        (a.stream, a.epoch) == (b.stream, b.epoch) and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)
        for mine, yours in zip(first, second, strict=True)
        for a, b in zip(mine, yours, strict=True)
    )


def test_batches_are_what_the_plan_and_the_shards_say(prepared: Manifest) -> None:
    rows = table(prepared, "train")
    for microbatches in global_batches(prepared, 1, 0, 24, flip=True):  # into the second epoch
        assert [m.stream for m in microbatches] == [0, 1, 2, 3]
        for m in microbatches:
            assert m.images.shape == (16, 16, 16, 3) and m.images.dtype == np.uint8
            assert m.labels.dtype == m.samples.dtype == np.int64 and not m.replaced.any()
            assert m.labels.tolist() == [rows["label"][i] for i in m.samples]
            for image, sample, flip in zip(m.images, m.samples, m.flips, strict=True):
                expected = dataset.center_crop(dataset.decode(rows["image"][sample]), 16)
                assert flip == (sample_rng(0, m.epoch, int(sample), Purpose.FLIP).random() < 0.5)
                np.testing.assert_array_equal(image, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_do_not_depend_on_workers_or_restarts(prepared: Manifest, crop: str) -> None:
    expected = global_batches(prepared, 1, 0, 30, flip=True, crop=crop)
    assert expected[0][0].epoch == 0 and expected[-1][0].epoch == 1
    for world_size in (2, 4):
        assert same(global_batches(prepared, world_size, 0, 30, flip=True, crop=crop), expected)
    for step in (1, 13, 22, 29):
        assert same(global_batches(prepared, 2, step * 64, 30 - step, flip=True, crop=crop), expected[step:])
    flips = np.concatenate([m.flips for step in expected for m in step])
    assert 0.4 < flips.mean() < 0.6


def test_a_row_that_cannot_be_decoded_shows_the_next_good_one(prepared: Manifest, tmp_path: Path) -> None:
    manifest = _with_damage(prepared, tmp_path, lambda row: row in (5, 6))
    plain = global_batches(prepared, 1, 0, 22)
    damaged = global_batches(manifest, 1, 0, 22)
    rows, replaced = table(prepared, "train"), []
    for mine, yours in zip(plain, damaged, strict=True):
        for a, b in zip(mine, yours, strict=True):
            np.testing.assert_array_equal(a.samples, b.samples, "positions never move")
            for sample, was_replaced, image, label in zip(b.samples, b.replaced, b.images, b.labels, strict=True):
                assert was_replaced == (sample in (5, 6))
                if was_replaced:
                    replaced.append(int(sample))
                    np.testing.assert_array_equal(image, dataset.center_crop(dataset.decode(rows["image"][7]), 16))
                    assert label == rows["label"][7]
    assert set(replaced) <= {5, 6} and replaced


def test_damage_past_repair_names_the_shard(prepared: Manifest, tmp_path: Path) -> None:
    manifest = _with_damage(prepared, tmp_path, lambda row: True)
    with pytest.raises(ValueError, match=r"no image of row group \d+ of .*train-00000-of-00001\.parquet"):
        global_batches(manifest, 1, 0, 1)
    shard = Path(manifest.folder, manifest.shards("train")[0].path)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet is not a sound Parquet shard"):
        global_batches(manifest, 1, 0, 1)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000-of-00001\.parquet"):
        global_batches(manifest, 1, 0, 1)


def _with_damage(manifest: Manifest, folder: Path, damaged: Callable[[int], bool]) -> Manifest:
    """A copy of the training shard in which the bytes of some images are cut short."""
    shard, start = manifest.shards("train")[0], 0
    whole = pq.ParquetFile(storage.join(manifest.folder, shard.path))
    with pq.ParquetWriter(folder / shard.path, dataset._SCHEMA) as writer:
        for group in range(whole.num_row_groups):
            rows = whole.read_row_group(group).to_pylist()
            cut = [row | {"image": row["image"][:30]} if damaged(start + i) else row for i, row in enumerate(rows)]
            writer.write_table(dataset.pa.Table.from_pylist(cut, schema=dataset._SCHEMA))
            start += len(rows)
    return manifest.model_copy(update={"folder": str(folder)})


def test_a_plan_for_other_row_groups_is_refused_at_once(prepared: Manifest) -> None:
    with pytest.raises(ValueError, match="made for other row groups than those of split='validation'"):
        batches(prepared, make_order(prepared), 0, 1, 0, 16, split="validation")
    with pytest.raises(ValueError, match="position=3 is not a multiple"):
        batches(prepared, make_order(prepared), 0, 1, 3, 16)


def test_read_images_is_the_manifests_order(prepared: Manifest) -> None:
    rows = table(prepared, "validation")
    images, labels = read_images(prepared, "validation", 0, 360, 8)
    assert labels.tolist() == rows["label"] and labels.dtype == np.int64
    expected = np.stack([np.asarray(dataset.decode(data)) for data in rows["image"]])
    np.testing.assert_array_equal(images, expected)
    for begin, end in [(0, 1), (20, 50), (44, 45), (359, 360)]:
        found, _ = read_images(prepared, "validation", begin, end, 8)
        np.testing.assert_array_equal(found, expected[begin:end])
    with pytest.raises(ValueError, match=r"'validation' has 360 rows, and no range \[350, 361\)"):
        read_images(prepared, "validation", 350, 361, 8)


def test_batches_end_where_they_are_told(prepared: Manifest) -> None:
    order = make_order(prepared)
    found = list(batches(prepared, order, 0, 1, 64, 16, use_ray=False, end=64 * 30))
    assert len(found) == 29, "from the second step into the second epoch"


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [1, 2])
def test_ray_gives_the_same_batches(prepared: Manifest, ray_session: None, world_size: int) -> None:
    expected = global_batches(prepared, 1, 0, 30, flip=True, crop="random")
    found = global_batches(prepared, world_size, 0, 30, flip=True, crop="random", use_ray=True)
    assert same(found, expected)


@pytest.mark.ray
def test_ray_reads_from_s3(prepared: Manifest, s3_bucket: str, ray_session: None) -> None:
    manifest = prepare(digits(s3_bucket))
    assert manifest.folder == f"{s3_bucket}/digits" and manifest.splits == prepared.splits
    assert same(global_batches(manifest, 2, 64, 5, use_ray=True), global_batches(prepared, 1, 64, 5))
    storage.delete(storage.join(manifest.folder, manifest.shards("train")[0].path))
    with pytest.raises(RuntimeError, match=rf"reading data failed: FileNotFoundError.*{manifest.folder}/train-00000"):
        global_batches(manifest, 1, 0, 1, use_ray=True)
