"""The golden comparison itself: correct data pass, altered data fail, and data without a check are reported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.comparison import Row
from tests.reference import compare_all
from tests.reference_diffusion import compare

GOLDEN = Path(__file__).parent / "golden" / "diffusion"


def verdicts(rows: list[Row]) -> dict[str, list[str]]:
    """Return the cases of each verdict other than "pass"."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict != "pass":
            cases.setdefault(row.verdict, []).append(f"{row.file} {row.case} {row.note}".strip())
    return cases


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the same format with fewer files, other names and other cases."""
    folder = tmp_path_factory.mktemp("golden") / "other"
    folder.mkdir()
    names = {"unet_a": "first", "unet_b": "second", "classifier_attention": "judge", "classifier_spatial": "pools"}
    cases = json.loads((GOLDEN / "cases.json").read_text())
    cases["networks"] = {names[k]: v for k, v in cases["networks"].items() if k in names}
    for old, new in names.items():
        for suffix in (".npz", ".safetensors"):
            shutil.copy(GOLDEN / f"{old}{suffix}", folder / f"{new}{suffix}")
        cases["networks"][new]["weights"] = f"{new}.safetensors"
    for settings, role in (("diffusion", "model"), ("diffusion", "classifier")):
        cases[settings][role] = names[cases[settings][role]]
    for role in ("model", "learned_model"):
        cases["sampler_parameterisations"][role] = names[cases["sampler_parameterisations"][role]]
    files = ["sampler_parameterisations.npz", "bpd.npz", "schedules.npz", "timestep_embedding.npz"]
    for name in files:
        shutil.copy(GOLDEN / name, folder / name)
    tolerances = {f"{names.get(Path(k).stem, Path(k).stem)}.npz": v for k, v in cases["tolerances"].items()}
    cases["tolerances"] = {k: v for k, v in tolerances.items() if (folder / k).is_file()}
    (folder / "cases.json").write_text(json.dumps(cases))
    valid = {"id": "mine", "schedule": "cosine", "num_timesteps": 60, "spec": "ddim20", "num_kept": 20, "raises": None}
    refused = {"id": "bad", "schedule": "linear", "num_timesteps": 60, "spec": "99"}
    respacing = {"cases": [valid, {**refused, "raises": "ValueError", "stage": "parse"}]}
    (folder / "respacing_cases.json").write_text(json.dumps(respacing))
    return folder


def alter_array(path: Path, name: str, change: float) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key].copy() for key in archive.files}
    arrays[name].reshape(-1)[-1] += change
    np.savez(path, **arrays)


@pytest.fixture
def copy(part: Path, tmp_path: Path) -> Path:
    """Return a copy of `part` that a test may change."""
    shutil.copytree(part, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_projects_copy_passes() -> None:
    rows = compare(GOLDEN)
    assert verdicts(rows) == {}
    assert len(rows) > 300


def test_names_and_cases_come_from_the_folder(part: Path) -> None:
    rows = compare_all(part.parent)
    assert verdicts(rows) == {}
    files = {row.file for row in rows}
    assert {"first.npz", "judge.npz", "pools.safetensors", "bpd.npz", "respacing_cases.json"} <= files


@pytest.mark.parametrize(
    ("file", "array", "change"),
    [
        ("first.npz", "out", 1e-3),
        ("second.npz", "grad_param.out.2.bias", 1e-2),
        ("judge.npz", "grad_log_prob_x", 1e-4),
        ("pools.npz", "logits", 1e-2),
        ("sampler_parameterisations.npz", "FIXED_SMALL.variance", 1e-5),
        ("bpd.npz", "timestep_map", 1),
        ("bpd.npz", "clip1.vb", 0.1),
        ("schedules.npz", "cosine_50.betas", 1e-9),
        ("timestep_embedding.npz", "emb_dim33_max10000", 1e-4),
        ("first.npz", "out", float("nan")),
    ],
)
def test_an_altered_value_fails(copy: Path, file: str, array: str, change: float) -> None:
    alter_array(copy / file, array, change)
    failed = verdicts(compare(copy))["FAIL"]
    assert any(case.startswith(f"{file} {array}") for case in failed), failed


def test_arrays_and_files_without_a_check_are_reported(copy: Path) -> None:
    with np.load(copy / "first.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    np.savez(copy / "first.npz", **arrays, surprise=np.zeros(3))
    np.savez(copy / "unknown.npz", thing=np.ones(2))
    (copy / "extra.bin").write_bytes(b"?")
    other_verdicts = verdicts(compare(copy))
    assert other_verdicts == {"not covered": ["extra.bin *", "first.npz surprise", "unknown.npz thing"]}


def test_missing_files_and_arrays_fail(copy: Path) -> None:
    (copy / "bpd.npz").unlink()
    cases = json.loads((copy / "cases.json").read_text())
    cases["tolerances"]["judge.npz"]["more"] = {"tol": 1.0, "f64": 0.0}
    (copy / "cases.json").write_text(json.dumps(cases))
    failed = verdicts(compare(copy))["FAIL"]
    assert any(case.startswith("bpd.npz") for case in failed)
    assert any(case.startswith("judge.npz more") for case in failed)
    assert len(failed) == 2


def test_wrong_weights_fail_and_do_not_stop_the_rest(copy: Path) -> None:
    shutil.copy(copy / "second.safetensors", copy / "first.safetensors")
    rows = compare(copy)
    failed = verdicts(rows)["FAIL"]
    assert any(case.startswith("first.safetensors num_parameters") for case in failed)
    assert any(row.file == "judge.npz" and row.verdict == "pass" for row in rows)
