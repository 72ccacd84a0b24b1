"""Test that a job has one MLflow run over all its starts, and that an unreachable server delays and loses nothing."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import BAD_REQUEST, MlflowException

from cluster.servers import free_port
from orchestrator import mlflow_run, storage, tracking
from orchestrator.config import JobConfig, tracking_uri
from orchestrator.metrics_log import history
from orchestrator.pictures import grid_png
from orchestrator.tracking import catch_up, tracked
from orchestrator.training.presets import adm_presets
from tests import servers
from tests.chaos.proxy import Proxy

UNREACHABLE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def uri(sqlite_tracking: str) -> str:
    return sqlite_tracking


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.1)


def runs_of(output: str, job: str = "train") -> list[Any]:
    """Return the runs of the job with this output, and their children."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    identity = re.sub("['\"%]", lambda match: quote(match[0]), f"{job} {output}")
    own_runs = [run for run in runs if run.data.tags[mlflow_run.IDENTITY] == identity]
    identifiers = {run.info.run_id for run in own_runs}
    return own_runs + [run for run in runs if run.data.tags.get("mlflow.parentRunId") in identifiers]


def points_in_mlflow(output: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of all points of a metric in MLflow, for the run with this output."""
    run = runs_of(output)[0]
    points = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def artifacts(output: str, job: str = "train") -> set[str]:
    """Return the names of the artefacts of the run with this output."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return {entry.path for entry in client.list_artifacts(runs_of(output, job)[0].info.run_id)}


# ------------------------------------------------------------------------------------------------ what is recorded


@pytest.mark.parametrize("name", ["digits", 'it\'s 100% "mine"'])
def test_a_restarted_job_resumes_its_tracked_run(uri: str, tmp_path: Path, name: str) -> None:
    output = f"{tmp_path}/{name}"
    for step in (64, 128):
        with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
            tracker.metrics({"loss": 1 / step}, step=step)
            tracker.child("trial", {"scale": 1.0}, {64: {"fid": 3.0}})
    assert points_in_mlflow(output, "loss") == history(output, "loss") == [(64, 1 / 64), (128, 1 / 128)]
    assert len(runs_of(output)) == 2, "one run for the job and one for the trial"


def test_the_parameters_of_a_run_are_the_fields_of_its_first_config(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, config = adm_presets()["imagenet64"]
    for num_workers in (8, 4):
        with tracked("train", config.model_copy(update={"num_workers": num_workers}), f"{tmp_path}/adm"):
            pass
    [run] = runs_of(f"{tmp_path}/adm")
    parameters = run.data.params
    expected = {"batch_size": "2048", "model.image_size": "64", "order.num_streams": "64", "num_workers": "8"}
    assert expected.items() <= parameters.items() and "MLflow" not in caplog.text


def test_a_run_has_its_author_source_commit_and_command(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(Path(__file__).parents[2] / "jobs" / "train_adm.py")
    monkeypatch.setattr(sys, "argv", [script, "digits", "--store", "s3://me:canary@host/it's"])
    with tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/run"):
        pass
    [run] = runs_of(f"{tmp_path}/run")
    tags = run.data.tags
    assert tags["mlflow.user"] and tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.source.name"].endswith("train_adm.py") and re.fullmatch(
        "[0-9a-f]{40}", tags["mlflow.source.git.commit"]
    )
    assert tags["admiral.command"].endswith("digits --store 's3://***@host/it'\"'\"'s'")
    assert tags["admiral.command"] in tags["mlflow.note.content"]


def test_the_experiment_is_one_of_model_training(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(uri)
    client.create_experiment("older", f"{tmp_path}/artifacts")
    for name in ("admiral", "older", "my own"):
        if name != "admiral":
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        with tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/{name}"):
            pass
        experiment = client.get_experiment_by_name(name)
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
        assert len(client.search_runs([experiment.experiment_id])) == 1


def test_pages_and_documents_are_artefacts(uri: str, tmp_path: Path) -> None:
    with tracked("evaluate", JobConfig(store=str(tmp_path)), f"{tmp_path}/run") as tracker:
        tracker.record("report.json", {"fid": 3.0})
        tracker.record("report.html", "<p>3.0</p>")
        tracker.picture("samples.png", grid_png(np.zeros((1, 8, 8, 3), np.uint8), columns=1))
    assert artifacts(f"{tmp_path}/run", "evaluate") == {"config.json", "report.json", "report.html", "samples.png"}


def test_a_refused_record_does_not_block_the_others(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = f"{tmp_path}/digits"
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
        for step in range(5):
            tracker.metrics({"loss": float(step)}, step=step)
            if step == 2:
                tracker.metrics({"no such name?": 1.0}, step=step)
        tracker.picture("broken.png", b"")
        tracker.record("after.json", {})
    assert points_in_mlflow(output, "loss") == [(step, float(step)) for step in range(5)]
    assert artifacts(output) == {"config.json", "after.json"}
    assert "no such name?" in caplog.text and "2 records were refused" in caplog.text


def test_a_driver_that_loses_a_race_retries(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two drivers of one run log its parameters at the same moment, and the database refuses one of them."""
    errors = ["(sqlite3.IntegrityError) UNIQUE constraint failed: params.key, params.run_uuid"]
    log_batch = MlflowClient.log_batch

    def refused_at_first(client: MlflowClient, run: str, **records: Any) -> None:
        if errors and records.get("params"):
            raise MlflowException(errors.pop(), error_code=BAD_REQUEST)
        log_batch(client, run, **records)

    monkeypatch.setattr(MlflowClient, "log_batch", refused_at_first)
    output = f"{tmp_path}/run"
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
        tracker.metrics({"loss": 1.0})
    assert not errors and points_in_mlflow(output, "loss") == [(0, 1.0)]
    assert runs_of(output)[0].data.params["tracking"] == "True"
    assert "refuses" not in caplog.text


# ------------------------------------------------------------------------------------------------ nothing is lost


def test_numbers_of_a_killed_job_are_sent_by_the_next_start(uri: str, tmp_path: Path) -> None:
    output = f"{tmp_path}/killed"
    code = (
        "import os, signal; from orchestrator.config import JobConfig; from orchestrator.tracking import tracked\n"
        f"with tracked('train', JobConfig(store={str(tmp_path)!r}), {output!r}) as tracker:\n"
        "    for step in range(500): tracker.metrics({'loss': float(step)}, step=step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": UNREACHABLE}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -signal.SIGKILL
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
        tracker.metrics({"loss": 500.0}, step=500)
    assert points_in_mlflow(output, "loss") == history(output, "loss") == [(step, float(step)) for step in range(501)]


@pytest.mark.usefixtures("impatient")
def test_a_finished_job_catches_up_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, output = JobConfig(store=str(tmp_path)), f"{tmp_path}/run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNREACHABLE)
    with tracked("train", config, output) as tracker:
        for step in range(1000):
            tracker.metrics({"loss": float(step)}, step=step)
    assert "1000 records are in " in caplog.text and caplog.text.count("is unreachable; retrying") == 1
    assert "Connection refused" in caplog.text and "Errno" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 60)
    catch_up("train", config.model_copy(update={"tracking": False}), output)
    assert not storage.exists(f"{output}/tracking.json")
    catch_up("train", config, output)
    assert points_in_mlflow(output, "loss") == [(step, float(step)) for step in range(1000)]
    assert runs_of(output)[0].info.status == "FINISHED"
    monkeypatch.setattr(tracking, "tracked", None)  # it must not be called again
    catch_up("train", config, output)


def test_a_recreated_folder_is_sent_from_its_beginning(uri: str, tmp_path: Path) -> None:
    output = f"{tmp_path}/run"
    for value in (1.0, 2.0):
        with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
            for step in range(3):
                tracker.metrics({"loss": value}, step=step)
        storage.delete(f"{output}/")
        time.sleep(0.002)
    assert points_in_mlflow(output, "loss") == [(step, value) for step in range(3) for value in (1.0, 2.0)]


def test_without_tracking_only_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///refused")
    monkeypatch.setattr(storage, "delete", lambda uri: pytest.fail(f"{uri} does not exist"))
    with tracked("train", JobConfig(store=str(tmp_path), tracking=False), f"{tmp_path}/run") as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
        tracker.record("report.html", "")
    assert history(f"{tmp_path}/run", "loss") == [(1, 1.0)] and not caplog.text


@pytest.mark.usefixtures("impatient")
def test_a_job_ends_although_its_queue_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNREACHABLE)
    monkeypatch.setattr(tracking, "QUEUE_CAPACITY", 10)
    with tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/digits") as tracker:
        for step in range(30):
            tracker.picture(f"{step}.png", b"")
    assert "31 artefacts are not in MLflow" in caplog.text, "the config and the pictures"


# ------------------------------------------------------------------------------------------------ what is refused


@contextmanager
def server_with_response(status: int, body: str) -> Iterator[str]:
    """Start a server that gives the same response to every request, and yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://someone:canary-5f3a@127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def refusal(tmp_path: Path) -> str:
    """Return the one line with which a job is refused."""
    with pytest.raises(ValueError) as caught, tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/run"):
        pytest.fail("the job started")
    message = str(caught.value)
    assert "--no-tracking" in message and "\n" not in message and "canary" not in message
    return message


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("file:///tmp/mlruns", "sqlite:////PATH"),
        ("/tmp/mlruns", "sqlite:////PATH"),
        ("gopher://host", "sqlite:////PATH"),
        ("postgresql+nothing://someone:canary-5f3a@localhost/x", "sqlite:////PATH"),
        ("sqlite:////proc/nowhere/mlflow.db", "/proc/nowhere"),
    ],
)
def test_addresses_that_mlflow_cannot_use_are_refused(
    address: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert advice in refusal(tmp_path)


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (401, "<html>login</html>", "MLFLOW_TRACKING_USERNAME"),
        (403, json.dumps({"error_code": "PERMISSION_DENIED", "message": "no"}), "MLFLOW_TRACKING_TOKEN"),
        (401, json.dumps({"detail": "Not authenticated"}), "MLFLOW_TRACKING_USERNAME"),  # of a gateway, without a code
        (200, "<html>login</html>", "MLFLOW_TRACKING_URI"),
        (404, "<html>nothing here</html>", "MLFLOW_TRACKING_URI"),
    ],
)
def test_permanent_errors_of_the_server_are_refused(
    status: int, body: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server_with_response(status, body) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert advice in refusal(tmp_path)


@pytest.mark.usefixtures("impatient")
def test_a_job_continues_although_the_server_has_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with server_with_response(503, json.dumps({"message": "Service Unavailable"})) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/run") as tracker:
            tracker.metrics({"loss": 1.0})
    assert "the job continues" in caplog.text and "canary" not in caplog.text


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("admiral", f"{tmp_path}/artifacts"))
    assert "mlflow experiments restore --experiment-id 1" in refusal(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/run"):
        pass


def test_no_secret_is_sent(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, f"canary-{name}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:canary-endpoint@host:9000")
    monkeypatch.setattr(
        sys, "argv", ["jobs/x.py", "--store", "http://canary-user:canary-word@host", "--hf-token", "canary"]
    )
    canaries = " ".join(value for value in os.environ.values() if "canary" in value)
    output = f"{tmp_path}/out"
    config = JobConfig(store=str(tmp_path), tracking=True)
    config = config.model_copy(update={"store": f"{tmp_path}/http://u:canary-config@host"})
    with tracked("train", config, output) as tracker:
        tracker.record("report.json", {"error": canaries, "list": [canaries]})
        tracker.record("report.html", f"<p>{canaries}</p>")
        tracker.child("trial", {"weights": canaries}, {1: {"fid": 1.0}})
        tracker.metrics({"no such name? http://u:canary@host": 1.0})
    paths = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "metrics.jsonl"]
    assert len(paths) >= 4, "the database and three artefacts"
    assert not [path for path in paths if b"canary" in path.read_bytes()]
    assert "canary" not in caplog.text and "no such name?" in caplog.text


# ------------------------------------------------------------------------------------------------ an unreachable server


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.mlflow_server(str(tmp_path_factory.mktemp("mlflow"))) as (uri, _):
        yield uri


@pytest.fixture
def proxy(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Start a fault proxy in front of a real MLflow server."""
    proxy = Proxy(mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    yield proxy
    proxy.close()


def test_nothing_is_lost_while_the_server_is_unreachable(proxy: Proxy, tmp_path: Path) -> None:
    output = f"{tmp_path}/away"
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
        tracker.metrics({"loss": 0.0}, step=0)
        outage = proxy.add("reset")
        assert outage.wait(30)
        for step in range(1, 3000):
            tracker.metrics({"loss": float(step), "norm": 1.0}, step=step)
        proxy.remove(outage)
    assert points_in_mlflow(output, "loss") == [(step, float(step)) for step in range(3000)]
    batches = [request for request in proxy.requests if request.target.endswith("log-batch")]
    assert len(batches) < 30, "waiting records are sent in few batches"


def test_numbers_do_not_wait_for_the_artefact_store(proxy: Proxy, tmp_path: Path) -> None:
    output = f"{tmp_path}/run"
    outage = proxy.add("reset", target="mlflow-artifacts")
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
        assert outage.wait(30), "config.json is first in the queue"
        tracker.metrics({"loss": 1.0}, step=1)
        deadline = time.monotonic() + 30
        while tracker.unsent and time.monotonic() < deadline:
            time.sleep(0.05)
        assert points_in_mlflow(output, "loss") == [(1, 1.0)]
        proxy.remove(outage)
    assert artifacts(output) == {"config.json"}


def test_nothing_is_stored_twice_although_responses_are_lost(proxy: Proxy, tmp_path: Path) -> None:
    output = f"{tmp_path}/lost"
    rules = [
        proxy.add("swallow", "POST", target, times=3)
        for target in ("experiments/create", "runs/create", "runs/log-batch", "runs/update")
    ]
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:
        tracker.metrics({"loss": 1.0}, step=1)
        tracker.record("fence.json", {})
        tracker.metrics({"loss": 0.5}, step=2)
        tracker.child("trial 1", {"scale": 1.0}, {64: {"fid": 3.0}})
        tracker.child("trial 2", {"scale": 2.0}, {64: {"fid": 2.0}})
    assert all(len(rule.requests) >= 2 for rule in rules[1:]), "a fault did not occur"
    assert points_in_mlflow(output, "loss") == [(1, 1.0), (2, 0.5)]
    runs = runs_of(output)
    assert len(runs) == 3, "one run for the job and one for each trial"
    children = {run.info.run_name: run.data for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert {name: data.metrics["fid"] for name, data in children.items()} == {"trial 1": 3.0, "trial 2": 2.0}
    assert {name: data.params["scale"] for name, data in children.items()} == {"trial 1": "1.0", "trial 2": "2.0"}


def test_the_last_line_is_a_link_without_password(
    mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.replace("://", "://someone:canary@"))
    with tracked("train", JobConfig(store=str(tmp_path)), f"{tmp_path}/run"):
        pass
    captured = capfd.readouterr()
    assert re.search(rf"{mlflow_server}/#/experiments/\d+/runs/\w+\?workflowType=machine_learning", captured.out)
    assert "canary" not in captured.out + captured.err


@pytest.mark.slow
def test_a_killed_server_that_restarts_gets_all_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.5)
    calls, step, output = [], 0, f"{tmp_path}/killed"
    with tracked("train", JobConfig(store=str(tmp_path)), output) as tracker:

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
            log_for(2)  # no server runs yet
            with servers.mlflow_server(str(tmp_path), port) as (_, kill):
                log_for(3)
                kill()
        log_for(2)
        with servers.mlflow_server(str(tmp_path), port):
            tracker.finish("FINISHED")
            assert points_in_mlflow(output, "loss") == [(s, float(s)) for s in range(step)]
            assert len(runs_of(output)) == 1
    print(f"{step} records, the slowest call took {max(calls) * 1e3:.2f} ms")


def test_the_default_is_a_file_in_a_local_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(JobConfig(store=str(tmp_path))) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(JobConfig(store=f"file://{tmp_path}/store")) == f"sqlite:///{tmp_path}/store/mlflow.db"
    for store in ("s3://bucket/root", f"{tmp_path}/50%20off", f"{tmp_path}/a?b=c"):
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI must be set"):
            tracking_uri(JobConfig(store=store))


def test_a_submitted_job_refuses_a_relative_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(ValueError, match="is a relative path"):
        tracking_uri(JobConfig(store=str(tmp_path)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////shared/mlflow.db")
    assert tracking_uri(JobConfig(store=str(tmp_path))) == "sqlite:////shared/mlflow.db"


def test_the_description_of_a_run_names_its_outputs_and_shows_pictures() -> None:
    text = mlflow_run.description("train classifier", "s3://bucket/my runs/digits", "abc", ["samples/images 1.png"])
    assert "**train classifier**: outputs in `s3://bucket/my runs/digits`" in text
    assert "![samples/images 1.png](get-artifact?path=samples/images%201.png&run_uuid=abc)" in text
