"""The published .npz layout: valid files are streamed, and others raise one error with the reason."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.evaluation.npz import PublishedBatch, open_batch

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics" / "npz"
REASONS = {  # the part of the message that states the reason
    "bad_float01.npz": "float32",
    "bad_float_m11.npz": "float32",
    "bad_float_0_255.npz": "float64",
    "bad_float_nan.npz": "float32",
    "bad_int64.npz": "int64",
    "bad_nchw.npz": "channels come last",
    "bad_grey_nhw.npz": r"\(64, 16, 16\)",
    "bad_rgba.npz": r"\(8, 16, 16, 4\)",
    "bad_3d_single.npz": r"\(16, 16, 3\)",
    "bad_empty.npz": r"\(0, 16, 16, 3\)",
    "bad_missing_arr0.npz": r"'arr_0'.*images\.npy",
    "bad_label_length.npz": r"\(61,\).*64 images",
    "bad_label_range.npz": "-1 to 1000000",
    "bad_stats_nan.npz": "NaN or infinity",
    "bad_stats_inf.npz": "NaN or infinity",
    "bad_stats_asymmetric.npz": "not symmetric",
    "bad_stats_not_psd.npz": "positive semi-definite",
    "bad_stats_shape.npz": r"\(24,\).*\(23, 23\)",
    "bad_stats_missing_sigma.npz": "'mu' but not 'sigma'",
    "bad_object_array.npz": "pickle",
    "bad_truncated_half.npz": "not an intact",
    "bad_zero_bytes.npz": "not an intact",
    "bad_not_zip.npz": "not an intact",
    "bad_short_member.npz": "49152 bytes, but 44152",
    "bad_crc.npz": "CRC-32",
    "bad_header_shape.npz": "99, 16, 16, 3",
    "bad_bigendian_u16.npz": "98304 bytes, but 49152",
    "bad_path_traversal.npz": "'arr_0'",
}


def images_of(batch: PublishedBatch, size: int = 7) -> NDArray[np.uint8]:
    starts = range(0, batch.num_images, size)
    return np.concatenate([batch.rows(start, min(start + size, batch.num_images)) for start in starts])


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("ok_*.npz")))
def test_intact_files_load_as_the_manifest_says(name: str) -> None:
    arrays = json.loads((GOLDEN / "MANIFEST.json").read_text())[name]["arrays"]
    batch = open_batch(str(GOLDEN / name))
    with np.load(GOLDEN / name, allow_pickle=False) as expected:
        assert (batch.pool is not None, batch.spatial is not None) == ("mu" in arrays, "mu_s" in arrays)
        if batch.pool is not None:
            np.testing.assert_array_equal(batch.pool.covariance, expected["sigma"])
        assert (batch.labels is not None) == ("arr_1" in arrays)
        if batch.labels is not None:
            np.testing.assert_array_equal(batch.labels, expected["arr_1"])
        assert batch.num_images == (arrays["arr_0"][0][0] if "arr_0" in arrays else 0)
        if batch.num_images:
            np.testing.assert_array_equal(images_of(batch), expected["arr_0"])
            np.testing.assert_array_equal(batch.rows(0, 1), expected["arr_0"][:1])
            last = batch.num_images
            np.testing.assert_array_equal(batch.rows(last // 2, last), expected["arr_0"][last // 2 :])


def test_every_way_of_storing_gives_the_same_images() -> None:
    plain = images_of(open_batch(str(GOLDEN / "ok_samples_unlabelled.npz")))
    for name in ("ok_samples_deflated", "ok_fortran_order", "ok_npy_v2_header"):
        np.testing.assert_array_equal(images_of(open_batch(str(GOLDEN / f"{name}.npz"))), plain)


@pytest.mark.parametrize(("name", "reason"), REASONS.items())
def test_broken_files_are_refused_with_their_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        open_batch(str(GOLDEN / name))
    assert name in str(error.value)


def test_every_broken_file_of_the_manifest_is_tested() -> None:
    manifest = json.loads((GOLDEN / "MANIFEST.json").read_text())
    broken = {name for name in manifest if name.startswith("bad_")}
    assert broken - set(REASONS) == {"bad_stats_no_spatial.npz"}
    batch = open_batch(str(GOLDEN / "bad_stats_no_spatial.npz"))  # it is enough for FID, but not for sFID
    assert batch.pool is not None and batch.spatial is None


def test_negative_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "made", np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1]))
    with pytest.raises(ValueError, match="labels from -1 to 0"):
        open_batch(str(tmp_path / "made.npz"))


def test_rows_beyond_the_file_are_refused_and_batches_can_be_pickled() -> None:
    batch = pickle.loads(pickle.dumps(open_batch(str(GOLDEN / "ok_samples_unlabelled.npz"))))  # noqa: S301
    np.testing.assert_array_equal(batch.rows(10, 20), images_of(batch)[10:20])
    with pytest.raises(ValueError, match="60\\.\\.65"):
        batch.rows(60, 65)


def test_statistics_may_state_their_extractor(tmp_path: Path) -> None:
    statistics: Any = {"mu": np.zeros(3), "sigma": np.eye(3)}

    def write_and_read(value: Any) -> str | None:
        np.savez(tmp_path / "stated.npz", **statistics, extractor=value)
        return open_batch(str(tmp_path / "stated.npz")).extractor

    np.savez(tmp_path / "none.npz", **statistics)
    assert open_batch(str(tmp_path / "none.npz")).extractor is None
    assert write_and_read("digits-0123") == write_and_read(np.array(["digits-0123"])) == "digits-0123"
    for value in (7, np.array(["a", "b"]), b"digits"):
        with pytest.raises(ValueError, match=r"stated\.npz: extractor .* one string"):
            write_and_read(value)
    with pytest.raises(ValueError, match="never opened"):
        write_and_read(np.array("digits", object))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue())
        archive.writestr("arr_0.npy", array.getvalue())
    with pytest.raises(ValueError, match="twice"):
        open_batch(str(tmp_path / "twice.npz"))


def test_damage_at_any_byte_is_detected(tmp_path: Path) -> None:
    """A changed byte or a missing end raises one ValueError, or changes nothing if the byte is unused."""
    rng = np.random.default_rng([30])
    print("seed 30")
    good = (GOLDEN / "ok_samples_labelled.npz").read_bytes()
    images = images_of(open_batch(str(GOLDEN / "ok_samples_labelled.npz")))
    path, refused = tmp_path / "damaged.npz", 0
    for trial in range(80):
        damaged = bytearray(good)
        if trial % 4 == 0:
            del damaged[rng.integers(len(good)) :]
        else:
            damaged[rng.integers(*((0, 300), (300, len(good)), (len(good) - 300, len(good)))[trial % 4 - 1])] ^= 0x55
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(images_of(open_batch(str(path))), images)
        except ValueError as error:
            assert "damaged.npz" in str(error)
            refused += 1
    assert refused > 60
