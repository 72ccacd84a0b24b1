"""MLflow: one run for each job however often it starts, and a store that is away holds nobody up."""

from pathlib import Path

import pytest

from orchestrator import tracking
from orchestrator.config import JobConfig
from orchestrator.tracking import metric_history, tracked, tracking_uri


def test_a_job_started_again_goes_on_in_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for step in (64, 128):
        with tracked("train", JobConfig(store=str(tmp_path)), "/runs/digits") as tracker:
            tracker.metrics({"loss": 1 / step}, step=step)
    assert metric_history("train /runs/digits", "loss") == [(64, 1 / 64), (128, 1 / 128)]
    assert metric_history("train /runs/other", "loss") == []


def test_a_store_that_is_away_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.1)
    with tracked("train", JobConfig(store=str(tmp_path)), "/runs/digits") as tracker:
        for step in range(1000):
            tracker.metrics({"loss": 0.0}, step=step)
    assert "1002 records are not in MLflow" in caplog.text, "the config, the numbers and the end"
    assert caplog.text.count("MLflow is away") == 1, "said once, not at every try"


def test_the_default_is_a_file_in_a_local_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(JobConfig(store=str(tmp_path))) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI must be set"):
        tracking_uri(JobConfig(store="s3://bucket/root"))


def test_a_submitted_job_refuses_a_relative_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ValueError, match="is a relative path"):
        tracking_uri(JobConfig(store=str(tmp_path)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////shared/mlflow.db")
    assert tracking_uri(JobConfig(store=str(tmp_path))) == "sqlite:////shared/mlflow.db"
