"""Batches follow the order plan for every storage and every number of workers."""

from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import storage
from orchestrator.data import dataset
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import SCHEMA, Manifest, StreamShare, batches, load_manifest, read_images
from orchestrator.data.images import decode
from orchestrator.data.job import prepare
from orchestrator.order import OrderConfig, OrderPlan, Purpose, sample_rng
from tests.chaos.proxy import Proxy, Request
from tests.orchestrator.data.layouts import pictures
from tests.orchestrator.digits import digits, table
from tests.synthetic import sizes_of, write_dataset


def test_missing_and_invalid_manifests_are_refused(tmp_path: Path, prepared: Manifest) -> None:
    with pytest.raises(FileNotFoundError, match="holds no finished dataset"):
        load_manifest(str(tmp_path))
    fields = prepared.model_dump(mode="json")
    storage.write_json(str(tmp_path / "manifest.json"), fields | {"format_version": 2})
    with pytest.raises(ValueError, match="format_version"):
        load_manifest(str(tmp_path))
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        prepared.row_group_sizes("test")


# ------------------------------------------------------------------------------------------------- batches


def make_order(manifest: Manifest, seed: int = 0, batch_size: int = 64, split: str = "train") -> OrderPlan:
    config = OrderConfig(num_streams=4, shuffle_row_groups=2)
    return OrderPlan(manifest.row_group_sizes(split), batch_size, config, seed)


def global_batches(
    manifest: Manifest, world_size: int, position: int, steps: int, **options: Any
) -> list[list[StreamShare]]:
    """Return the shares of all streams in every step, read by `world_size` workers."""
    order, options = make_order(manifest), {"image_size": 16, "use_ray": False, **options}
    workers = [
        islice(batches(manifest, order, rank, world_size, position, **options), steps) for rank in range(world_size)
    ]
    return [[share for part in parts for share in part] for parts in zip(*workers, strict=True)]


def equal_steps(first: list[list[StreamShare]], second: list[list[StreamShare]]) -> bool:
    names = ("images", "labels", "samples", "flips", "undecodable")
    return len(first) == len(second) and all(
        (a.stream, a.epoch) == (b.stream, b.epoch)
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
        for first_shares, second_shares in zip(first, second, strict=True)
        for a, b in zip(first_shares, second_shares, strict=True)
    )


def test_batches_are_what_the_plan_and_the_shards_say(prepared: Manifest) -> None:
    rows = table(prepared, "train")
    for shares in global_batches(prepared, 1, 0, 24, flip=True):  # into the second epoch
        assert [share.stream for share in shares] == [0, 1, 2, 3]
        for share in shares:
            assert share.images.shape == (16, 16, 16, 3) and share.images.dtype == np.uint8
            assert share.labels.dtype == share.samples.dtype == np.int64 and not share.undecodable.any()
            assert share.labels.tolist() == [rows["label"][i] for i in share.samples]
            for image, sample, flip in zip(share.images, share.samples, share.flips, strict=True):
                expected = center_crop(decode(rows["image"][sample]), 16)
                assert flip == (sample_rng(0, share.epoch, int(sample), Purpose.FLIP).random() < 0.5)
                np.testing.assert_array_equal(image, expected[:, ::-1] if flip else expected)


def test_batches_do_not_depend_on_workers_or_restarts(prepared: Manifest) -> None:
    expected = global_batches(prepared, 1, 0, 30, flip=True, crop="random")
    assert expected[0][0].epoch == 0 and expected[-1][0].epoch == 1
    for world_size, step in ((2, 0), (4, 0), (2, 1), (2, 13), (2, 22), (2, 29)):
        resumed = global_batches(prepared, world_size, step * 64, 30 - step, flip=True, crop="random")
        assert equal_steps(resumed, expected[step:])
    flips = np.concatenate([share.flips for step in expected for share in step])
    assert 0.4 < flips.mean() < 0.6


def test_a_row_that_cannot_be_decoded_is_replaced_by_the_next_valid_one(prepared: Manifest, tmp_path: Path) -> None:
    manifest = _truncate_images(prepared, tmp_path, lambda row: row in (5, 6))
    plain = global_batches(prepared, 1, 0, 22)
    damaged = global_batches(manifest, 1, 0, 22)
    rows, replaced = table(prepared, "train"), []
    for plain_shares, damaged_shares in zip(plain, damaged, strict=True):
        for a, b in zip(plain_shares, damaged_shares, strict=True):
            np.testing.assert_array_equal(a.samples, b.samples, "positions never move")
            for sample, undecodable, image, label in zip(b.samples, b.undecodable, b.images, b.labels, strict=True):
                assert undecodable == (sample in (5, 6))
                if undecodable:
                    replaced.append(int(sample))
                    np.testing.assert_array_equal(image, center_crop(decode(rows["image"][7]), 16))
                    assert label == rows["label"][7]
    assert set(replaced) <= {5, 6} and replaced
    assert equal_steps(global_batches(manifest, 2, 9 * 64, 13), damaged[9:])


def test_irreparable_damage_names_the_shard(prepared: Manifest, tmp_path: Path) -> None:
    manifest = _truncate_images(prepared, tmp_path, lambda row: True)
    with pytest.raises(ValueError, match=r"no image of row group \d+ of .*train-00000-of-00001\.parquet"):
        global_batches(manifest, 1, 0, 1)
    shard = Path(manifest.folder, manifest.shards("train")[0].path)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet is not a valid Parquet shard"):
        global_batches(manifest, 1, 0, 1)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000-of-00001\.parquet"):
        global_batches(manifest, 1, 0, 1)


def _truncate_images(manifest: Manifest, folder: Path, damaged: Callable[[int], bool]) -> Manifest:
    """Return the manifest of a copy of the training shard in which the images of `damaged` rows are truncated."""
    shard, start = manifest.shards("train")[0], 0
    file = pq.ParquetFile(storage.join(manifest.folder, shard.path))
    with pq.ParquetWriter(folder / shard.path, SCHEMA) as writer:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group).to_pylist()
            cut = [row | {"image": row["image"][:30]} if damaged(start + i) else row for i, row in enumerate(rows)]
            writer.write_table(pa.Table.from_pylist(cut, schema=SCHEMA))
            start += len(rows)
    damaged_shard = shard.model_copy(update={"bytes": (folder / shard.path).stat().st_size})
    splits = manifest.splits | {"train": (damaged_shard,)}
    return manifest.model_copy(update={"folder": str(folder), "splits": splits})


def test_a_plan_for_other_row_groups_is_refused_at_once(prepared: Manifest) -> None:
    order = make_order(prepared)
    with pytest.raises(ValueError, match=r"row groups .*split='validation'"):
        batches(prepared, order, 0, 1, 0, 16, split="validation")
    with pytest.raises(ValueError, match="position=3 is not a multiple"):
        batches(prepared, order, 0, 1, 3, 16)


def test_batches_end_at_the_given_position(prepared: Manifest) -> None:
    steps = list(batches(prepared, make_order(prepared), 0, 1, 64, 16, use_ray=False, end=64 * 30))
    assert len(steps) == 29, "from the second step into the second epoch"


def test_read_images_returns_the_order_of_the_manifest(prepared: Manifest) -> None:
    rows = table(prepared, "validation")
    images, labels = read_images(prepared, "validation", 0, 360, 8)
    assert labels.tolist() == rows["label"] and labels.dtype == np.int64
    expected = np.stack([np.asarray(decode(data)) for data in rows["image"]])
    np.testing.assert_array_equal(images, expected)
    for begin, end in [(0, 1), (20, 50), (44, 45), (359, 360)]:
        part, _ = read_images(prepared, "validation", begin, end, 8)
        np.testing.assert_array_equal(part, expected[begin:end])
    with pytest.raises(ValueError, match=r"rows \[350, 361\) .*'validation', which has 360 rows"):
        read_images(prepared, "validation", 350, 361, 8)


def test_blocks_end_where_batches_end(prepared: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ROWS", 40)
    order = make_order(prepared)
    read = dataset._Reader(prepared, "train", 0, 8, "center", False, order.rows_per_stream)
    assert order.rows_per_stream == 16 and read.block_rows == 32
    for position in (0, 5 * 64):  # from the start, and from the middle of a window
        for unit in islice(order.units(0, 1, position), 8):
            blocks = [len(block["samples"]) for block in read(unit)]
            ends = unit.first + np.cumsum(blocks)
            assert ends[-1] == unit.first + len(unit.rows) and not (ends[:-1] % 32).any()


@pytest.mark.ray
def test_ray_gives_the_same_batches_from_s3(prepared: Manifest, s3_bucket: str, ray_session: None) -> None:
    manifest = prepare(digits(s3_bucket))
    assert manifest.folder == f"{s3_bucket}/digits" and manifest.splits == prepared.splits
    expected = global_batches(prepared, 1, 64, 29, flip=True, crop="random")
    assert equal_steps(global_batches(manifest, 2, 64, 29, flip=True, crop="random", use_ray=True), expected)
    storage.delete(storage.join(manifest.folder, manifest.shards("train")[0].path))
    with pytest.raises(RuntimeError, match=rf"reading data failed: FileNotFoundError.*{manifest.folder}/train-00000"):
        global_batches(manifest, 1, 0, 1, use_ray=True)


@pytest.mark.ray
def test_no_row_group_is_fetched_twice(s3_bucket: str, ray_session: None, ray_proxy: Proxy) -> None:
    """Requests are counted at the S3 server, for an epoch of two workers and for a restart in its middle."""
    images = [image.data for image in pictures(7)]
    manifest = write_dataset(s3_bucket, images, sizes_of(images), rows=640, row_group=10)
    order = OrderPlan(manifest.row_group_sizes("train"), 64, OrderConfig(num_streams=4, shuffle_row_groups=2))
    middle = order.batch_size * 4  # inside a window of every stream
    fetched = {}
    for position, rank in [(0, 0), (0, 1), (middle, 0)]:
        before = len(ray_proxy.requests)
        for _ in batches(manifest, order, rank, 2, position, 16, end=order.images_per_epoch):
            pass
        requests = [request for request in ray_proxy.requests[before:] if request.target.startswith(s3_bucket[4:])]
        assert {request.method for request in requests} == {"GET"}
        groups = _row_groups_of(manifest, requests)
        assert len(set(groups)) == len(groups), "none twice by one worker"
        fetched[position, rank] = set(groups)
    assert not fetched[0, 0] & fetched[0, 1], "none by two workers"
    begun = set()
    for unit in takewhile(lambda unit: unit.epoch == 0, order.units(0, 2)):
        if unit.first * order.config.num_streams < middle:
            begun |= set(unit.row_groups)
    fetched_again = begun & fetched[middle, 0]
    in_open_windows = len(order.streams(0, 2)) * order.config.shuffle_row_groups
    assert 0 < len(fetched_again) <= in_open_windows


def _row_groups_of(manifest: Manifest, requests: list[Request]) -> list[int]:
    """Return the row groups that these requests fetched. Every other range must be a footer's."""
    starts, ends, first = {}, set(), 0
    for shard in manifest.shards("train"):
        metadata = pq.ParquetFile(storage.open_input(storage.join(manifest.folder, shard.path))).metadata
        for group in range(metadata.num_row_groups):
            starts[shard.path, metadata.row_group(group).column(1).dictionary_page_offset] = first + group
        ends.add((shard.path, shard.bytes - 1))
        first += metadata.num_row_groups
    groups = []
    for request in requests:
        begin, end = map(int, request.part.removeprefix("bytes=").split("-"))
        path = request.target.rsplit("/", 1)[1]
        if (path, begin) in starts:
            groups.append(starts[path, begin])
        else:
            assert (path, end) in ends, f"{request} is neither a row group nor a footer"
    return groups
