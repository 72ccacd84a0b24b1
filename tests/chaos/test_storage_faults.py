"""Promise P8: all jobs succeed on s3:// while storage fails, and no secret is logged or stored."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.command_line import parse
from orchestrator import storage, storage_s3
from orchestrator.data.job import prepare
from orchestrator.data.presets import dataset_presets
from orchestrator.evaluation.job import evaluate
from orchestrator.evaluation.presets import evaluation_presets
from orchestrator.generation.job import generate
from orchestrator.generation.presets import generation_presets
from orchestrator.training.job import train
from orchestrator.training.presets import adm_presets, classifier_presets
from tests import servers
from tests.chaos.proxy import Fault, Proxy

SEED = 0
FAULTS: tuple[Fault, ...] = ("503", "reset", "half", "cut", "swallow")
JOBS: list[tuple[Callable[[Any], object], dict, list[str]]] = [
    (prepare, dataset_presets(), []),
    (train, adm_presets(), ["--total-images", "128", "--checkpoint-every", "32", "--batch-size", "32"]),
    (train, classifier_presets(), ["--total-images", "64", "--checkpoint-every", "32", "--batch-size", "32"]),
    (generate, generation_presets(), ["--num-samples", "36", "--sampler.num-steps", "3"]),
    (evaluate, evaluation_presets(), []),
]


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_server, SEED)
    for fault in FAULTS:
        proxy.add(fault, probability=0.04)
    proxy.add("stall", probability=0.02, times=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setitem(storage_s3.CONFIG, "read_timeout", 2.0)  # seconds
    monkeypatch.setitem(storage_s3.CONFIG, "retries", {"total_max_attempts": 1})
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    yield proxy
    proxy.close()


@pytest.mark.slow
def test_all_jobs_succeed_while_storage_fails(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    store = "s3://faults"
    storage.make_bucket(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    caplog.set_level(logging.INFO)
    for job, presets, options in JOBS:
        workers = [] if job is prepare else ["--num-workers", "0"]
        job(parse(None, presets, ["digits", "--store", store, *workers, *options]))
    faults = proxy.faults()
    print(f"seed {SEED}: {len(proxy.requests)} requests, of which failed: {faults}")
    assert all(faults.values()), f"a fault did not occur: {faults}"
    report = storage.read_json(f"{store}/digits/evaluation/report.json")
    assert report["metrics"]["accuracy"]["n"] == 36

    proxy.clear()
    secret = servers.S3_SETTINGS["AWS_SECRET_ACCESS_KEY"]
    output = "".join(capfd.readouterr()) + caplog.text
    assert secret not in output and servers.S3_SETTINGS["AWS_ACCESS_KEY_ID"] not in output
    for name in storage.list_names(store, recursive=True):
        assert secret.encode() not in storage.read_bytes(f"{store}/{name}"), f"a secret in {name}"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), f"a secret in {path}"
