"""Every golden array of the metrics agrees within its tolerance, and the comparison detects wrong numbers."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.reference_metrics import compare, compare_features, recognises

GOLDEN = Path(__file__).parent / "golden" / "metrics"


def test_all_golden_data_agree() -> None:
    rows = compare(GOLDEN)
    assert recognises(GOLDEN)
    assert len(rows) > 700
    assert [row.line(40) for row in rows if row.verdict != "pass"] == []


def test_a_wrong_number_fails_and_an_unknown_array_is_not_covered(tmp_path: Path) -> None:
    with np.load(GOLDEN / "features_unequal.npz") as archive:
        arrays = dict(archive)
    arrays["fid_exact"] = arrays["fid_exact"] * (1 + 1e-5)
    arrays["precision_exact_k3"] = arrays["precision_exact_k3"] + 1 / len(arrays["sample"])
    np.savez(tmp_path / "features_other.npz", **arrays, median_of_everything=np.zeros(1))
    verdicts = {row.case: row.verdict for row in compare_features(tmp_path / "features_other.npz")}
    assert verdicts["fid_exact"] == verdicts["precision_exact_k3"] == "FAIL"
    assert verdicts["median_of_everything"] == "not covered"
    assert verdicts["recall_exact_k3"] == verdicts["fid_edm"] == "pass"


@pytest.mark.parametrize("keep", ["features_copies.npz", "npz"])
def test_a_folder_may_hold_only_a_part(tmp_path: Path, keep: str) -> None:
    copy = shutil.copytree if (GOLDEN / keep).is_dir() else shutil.copy
    copy(GOLDEN / keep, tmp_path / keep)
    assert recognises(tmp_path)
    assert {row.verdict for row in compare(tmp_path)} == {"pass"}
    assert not recognises(tmp_path / "npz" / "nothing")


def test_files_outside_of_the_manifest_and_missing_files_are_reported(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "npz", tmp_path / "npz")
    (tmp_path / "npz" / "ok_non_square.npz").rename(tmp_path / "npz" / "stranger.npz")
    verdicts = {row.file: row.verdict for row in compare(tmp_path)}
    assert verdicts["stranger.npz"] == "not covered" and verdicts["ok_non_square.npz"] == "FAIL"


def test_a_damaged_file_is_one_failure_among_the_rows(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "features_copies.npz", tmp_path)
    (tmp_path / "inception_score.npz").write_bytes((GOLDEN / "inception_score.npz").read_bytes()[:1000])
    failures = [row for row in compare(tmp_path) if row.verdict != "pass"]
    assert [row.file for row in failures] == ["inception_score.npz"] and "cannot be read" in failures[0].note
