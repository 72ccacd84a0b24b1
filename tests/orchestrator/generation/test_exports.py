"""Test that the exported .npz and PNGs have the samples of the shards."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator import storage
from orchestrator.evaluation.npz import open_batch
from orchestrator.generation.exports import export_npz, export_png
from orchestrator.generation.samples import (
    Samples,
    Shard,
    encode_rows,
    put_shard,
    read_range,
    shards_of,
    write_manifest,
)

COUNT = 1_100


def make_folder(folder: str, count: int = COUNT, labels: bool = True) -> str:
    rng = np.random.default_rng(1)
    digests = {}
    for shard in shards_of(count, 300):
        n = shard.end - shard.begin
        images = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
        classes = np.arange(*shard) % 10 if labels else np.full(n, -1)
        digests[shard] = put_shard(folder, shard, encode_rows(Samples(np.arange(*shard), classes, images)))
    write_manifest(folder, digests)
    return folder


def test_the_npz_is_what_numpy_and_the_published_reader_expect(s3_bucket: str) -> None:
    folder = make_folder(f"{s3_bucket}/samples")
    images, labels = read_range(folder, 0, COUNT)
    export_npz(folder, f"{s3_bucket}/out/samples.npz")
    data = storage.read_bytes(f"{s3_bucket}/out/samples.npz")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert np.array_equal(arrays["arr_0"], images) and np.array_equal(arrays["arr_1"], labels)
    batch = open_batch(f"{s3_bucket}/out/samples.npz")
    assert batch.num_images == COUNT and np.array_equal(batch.rows(500, 700), images[500:700])
    export_npz(folder, f"{s3_bucket}/out/again.npz")
    assert storage.read_bytes(f"{s3_bucket}/out/again.npz") == data, "equal samples give other files"


def test_samples_without_classes_have_no_labels_in_the_npz(tmp_path: Path) -> None:
    folder = make_folder(str(tmp_path / "samples"), count=10, labels=False)
    export_npz(folder, str(tmp_path / "samples.npz"))
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [("manifest.json", "no finished samples"), (f"shards/{Shard(600, 900).name}", "212 of the indices 512 to 1023")],
)
def test_incomplete_samples_leave_no_incomplete_file(tmp_path: Path, missing: str, message: str) -> None:
    folder = make_folder(str(tmp_path / "samples"))
    storage.delete(storage.join(folder, missing))
    with pytest.raises(FileNotFoundError, match=message):
        export_npz(folder, str(tmp_path / "samples.npz"))
    assert not (tmp_path / "samples.npz").exists()


def test_pictures_are_the_samples(tmp_path: Path) -> None:
    folder = make_folder(str(tmp_path / "samples"), count=310)
    export_png(folder, str(tmp_path / "png"))
    images, _ = read_range(folder, 0, 310)
    assert len(list((tmp_path / "png").iterdir())) == 310
    for index in (0, 299, 300, 309):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / f"{index:06d}.png")), images[index])


def test_64_bit_sizes_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10_000)  # bytes, instead of 2 GiB
    folder = make_folder(str(tmp_path / "samples"))
    export_npz(folder, str(tmp_path / "samples.npz"))
    data = (tmp_path / "samples.npz").read_bytes()
    assert data[26:30] == bytes([9, 0, 20, 0]) and data[39:43] == bytes([1, 0, 16, 0]), "no zip64 field of 16 bytes"
    assert data[18:26] == b"\xff" * 8, "the 32-bit sizes are not marked as void"
    images, labels = read_range(folder, 0, COUNT)
    batch = open_batch(str(tmp_path / "samples.npz"))
    assert batch.labels is not None and batch.labels.tolist() == labels.tolist()
    assert np.array_equal(batch.rows(0, COUNT), images)
