"""Test that folders are bound to one config, and that submitted jobs need absolute paths."""

import json
from pathlib import Path

import pytest

from orchestrator.ablations.config import with_changes
from orchestrator.config import JobConfig, Operational, check_or_write_config, experiment_name, noted_files
from orchestrator.training.presets import classifier_presets


class Config(JobConfig):
    """A config with a field that changes results and one that does not."""

    seed: int = 0
    num_workers: Operational[int] = 1


def test_a_folder_accepts_its_config_and_refuses_another(tmp_path: Path) -> None:
    check_or_write_config(str(tmp_path), Config(seed=1), True, weights="abc")
    check_or_write_config(str(tmp_path), Config(seed=1, num_workers=8, store="/elsewhere"), True, weights="abc")
    with pytest.raises(ValueError, match=r"seed: 1 before, 2 now"):
        check_or_write_config(str(tmp_path), Config(seed=2), True, weights="abc")
    with pytest.raises(ValueError, match=r"weights: abc before, def now"):
        check_or_write_config(str(tmp_path), Config(seed=1), True, weights="def")


def test_a_folder_without_finished_work_accepts_any_config(tmp_path: Path) -> None:
    check_or_write_config(str(tmp_path), Config(seed=1), False)
    check_or_write_config(str(tmp_path), Config(seed=2), False)
    check_or_write_config(str(tmp_path), Config(seed=2), True)
    with pytest.raises(ValueError, match=r"seed: 2 before, 1 now.*\[operational\]"):
        check_or_write_config(str(tmp_path), Config(seed=1), True)


def test_operational_fields_of_older_configs_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 1, "num_workers": 4}')
    check_or_write_config(str(tmp_path), Config(seed=1, num_workers=8), True)


@pytest.mark.parametrize(("path", "value"), [(("noised",), False), (("model", "dropout"), 0.5)])
def test_fields_that_older_versions_did_not_have_count_as_their_defaults(
    tmp_path: Path, path: tuple[str, ...], value: object
) -> None:
    config = classifier_presets()["digits"][1]
    check_or_write_config(str(tmp_path), config, finished=True)
    written = json.loads((tmp_path / "config.json").read_text())
    part = written
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    (tmp_path / "config.json").write_text(json.dumps(written))
    check_or_write_config(str(tmp_path), config, finished=True)
    with pytest.raises(ValueError, match=path[-1]):
        check_or_write_config(str(tmp_path), with_changes(config, {".".join(path): value}), finished=True)


def test_files_are_recorded_once_and_not_compared(tmp_path: Path) -> None:
    assert noted_files(str(tmp_path)) == {}
    for newest in ("run/weights/1.safetensors", "run/weights/2.safetensors"):
        check_or_write_config(str(tmp_path), Config(), True, {"files": {"run": newest}}, weights="abc")
        assert noted_files(str(tmp_path)) == {"run": "run/weights/1.safetensors"}


def test_tracking_may_be_switched_at_any_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_or_write_config(str(tmp_path), Config(tracking=False), True)
    check_or_write_config(str(tmp_path), Config(), True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert JobConfig(store="s3://bucket/x", tracking=False).shared == ("s3://bucket/x",), "needs no server"


def test_a_folders_config_holds_no_password(tmp_path: Path) -> None:
    class Remote(Config):
        source: str

    check_or_write_config(str(tmp_path), Remote(source="https://me:canary@host/a@b"), True)
    check_or_write_config(str(tmp_path), Remote(source="https://me:renewed@host/a@b"), True)
    assert "https://***@host/a@b" in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="source"):
        check_or_write_config(str(tmp_path), Remote(source="https://me:canary@other/a@b"), True)


def test_the_experiment_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert experiment_name() == "admiral"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")
    assert experiment_name() == "faces"


def test_relative_paths_lie_under_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADMIRAL_STORE", "s3://bucket/root")
    assert JobConfig().path("digits/run") == "s3://bucket/root/digits/run"
    assert JobConfig().path("s3://other/run") == JobConfig().path("s3://other/run/") == "s3://other/run"
    assert JobConfig().path("/shared/run/") == "/shared/run"  # a slash at the end gives no second MLflow run
    monkeypatch.chdir(tmp_path)
    assert JobConfig(store="runs").path("digits") == f"{tmp_path}/runs/digits"


def test_a_submitted_job_refuses_a_relative_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert JobConfig(store="/shared").path("digits") == "/shared/digits"
    with pytest.raises(ValueError, match="set ADMIRAL_STORE"):
        JobConfig(store="runs").path("digits")
