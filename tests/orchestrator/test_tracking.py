"""MLflow: one run for each job however often it starts, and a store that is away holds nobody up."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster.servers import free_port
from orchestrator import tracking
from orchestrator.config import JobConfig, tracking_uri
from orchestrator.tracking import metric_history, tracked
from orchestrator.training.presets import adm_presets
from tests import servers
from tests.chaos.proxy import Proxy


def test_a_job_started_again_goes_on_in_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for step in (64, 128):
        with tracked("train", JobConfig(store=str(tmp_path)), "/runs/digits") as tracker:
            tracker.metrics({"loss": 1 / step}, step=step)
    assert metric_history("train /runs/digits", "loss") == [(64, 1 / 64), (128, 1 / 128)]
    assert metric_history("train /runs/other", "loss") == []


def test_a_runs_parameters_are_the_configs_leaves_as_it_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    _, config = adm_presets()["imagenet64"]
    for workers in (8, 4):
        with tracked("train", config.model_copy(update={"num_workers": workers}), "/runs/adm"):
            pass
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("admiral").experiment_id])
    found = run.data.params
    assert (found["batch_size"], found["model.image_size"], found["order.num_streams"]) == ("2048", "64", "64")
    assert found["num_workers"] == "8" and "MLflow" not in caplog.text


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


def test_a_job_ends_although_its_queue_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "QUEUE_CAPACITY", 10)
    with tracked("train", JobConfig(store=str(tmp_path)), "/runs/digits") as tracker:
        for step in range(30):
            tracker.picture(f"{step}.png", b"")
    assert "records did not fit the tracking queue" in caplog.text


def test_what_is_refused_does_not_hold_up_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with tracked("train", JobConfig(store=str(tmp_path)), "/runs/digits") as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
        tracker.record("before.json", {})
        tracker.metrics({"no such name?": 1.0}, step=1)
        tracker.record("after.json", {})
        tracker.metrics({"loss": 0.5}, step=2)
    assert metric_history("train /runs/digits", "loss") == [(1, 1.0), (2, 0.5)]
    assert "1 records were refused" in caplog.text and "no such name?" in caplog.text


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.mlflow_server(str(tmp_path_factory.mktemp("mlflow"))) as (uri, _):
        yield uri


@pytest.fixture
def proxy(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A fault proxy before a real MLflow server."""
    proxy = Proxy(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    yield proxy
    proxy.close()


def test_nothing_is_lost_while_the_server_is_away(proxy: Proxy, tmp_path: Path) -> None:
    with tracked("train", JobConfig(store=str(tmp_path)), "/runs/away") as tracker:
        tracker.metrics({"loss": 0.0}, step=0)
        away = proxy.add("reset")
        assert away.wait(30)
        for step in range(1, 3000):
            tracker.metrics({"loss": float(step), "norm": 1.0}, step=step)
        proxy.remove(away)
    assert metric_history("train /runs/away", "loss") == [(step, float(step)) for step in range(3000)]
    batches = [request for request in proxy.requests if request.target.endswith("log-batch")]
    assert len(batches) < 30, "what has waited goes together"


def test_nothing_is_stored_twice_where_answers_are_lost(proxy: Proxy, tmp_path: Path) -> None:
    lost = [
        proxy.add("swallow", "POST", target, times=3)
        for target in ("experiments/create", "runs/create", "runs/log-batch", "runs/update")
    ]
    with tracked("train", JobConfig(store=str(tmp_path)), "/runs/lost") as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
        tracker.record("fence.json", {})
        tracker.metrics({"loss": 0.5}, step=2)
        tracker.child("trial 1", {"scale": 1.0}, {64: {"fid": 3.0}})
        tracker.child("trial 2", {"scale": 2.0}, {64: {"fid": 2.0}})
    assert all(len(rule.requests) >= 2 for rule in lost[1:]), "a fault befell nothing"
    assert metric_history("train /runs/lost", "loss") == [(1, 1.0), (2, 0.5)]
    runs = _runs_of("train /runs/lost")
    assert len(runs) == 3, "one run for the job and one for each trial"
    children = {run.info.run_name: run.data for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert {name: data.metrics["fid"] for name, data in children.items()} == {"trial 1": 3.0, "trial 2": 2.0}
    assert {name: data.params["scale"] for name, data in children.items()} == {"trial 1": "1.0", "trial 2": "2.0"}


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.5)
    calls, step = [], 0
    with tracked("train", JobConfig(store=str(tmp_path)), "/runs/killed") as tracker:

        def log_for(seconds: float) -> None:
            nonlocal step
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                begin = time.perf_counter()
                tracker.metrics({"loss": float(step)}, step=step)
                calls.append(time.perf_counter() - begin)
                step += 1
                time.sleep(0.01)

        for _ in range(2):
            log_for(2)  # nobody is there
            with servers.mlflow_server(str(tmp_path), port) as (_, kill):
                log_for(3)
                kill()
        log_for(2)
        with servers.mlflow_server(str(tmp_path), port):
            tracker.finish("FINISHED")
            assert metric_history("train /runs/killed", "loss") == [(s, float(s)) for s in range(step)]
            assert len(_runs_of("train /runs/killed")) == 1
    print(f"{step} records, the slowest call took {max(calls) * 1e3:.2f} ms")


def _runs_of(identity: str) -> list[Any]:
    """The job's run and its children."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (parent,) = client.search_runs(experiments, f"tags.`admiral.identity` = '{identity}'")
    children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return [parent, *children]


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


def test_a_run_says_what_it_is_and_shows_its_pictures() -> None:
    text = tracking.description("train classifier s3://bucket/my runs/digits", "abc", ["samples/images 1.png"])
    assert "**train classifier**: outputs in `s3://bucket/my runs/digits`" in text
    assert "![samples/images 1.png](get-artifact?path=samples/images%201.png&run_uuid=abc)" in text
