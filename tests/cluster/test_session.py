"""The session: every worker has the driver's environment, and Ray stores none of it."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from cluster.session import (
    KEEPER,
    LOCAL_ENVIRONMENT,
    PUBLIC,
    QUIET_ENVIRONMENT,
    address,
    receive_environment,
    session,
)

ROOT = Path(__file__).resolve().parents[2]
SECRET = {
    "AWS_ACCESS_KEY_ID": "canary-1",
    "AWS_SECRET_ACCESS_KEY": "canary-2",
    "AWS_SECURITY_TOKEN": "canary-3",  # the name of AWS_SESSION_TOKEN in older SDKs
    "AWS_BEARER_TOKEN_BEDROCK": "canary-4",
    "AWS_ENDPOINT_URL": "https://key:canary-5@host",
    "AWS_WHATEVER_COMES_NEXT": "canary-6",
    "HF_TOKEN": "canary-7",
    "ADMIRAL_S3_ADDRESSING": "canary-8",
}
OTHER = {"MLFLOW_TRACKING_PASSWORD": "canary-9", "WANDB_API_KEY": "canary-10"}  # what no worker needs
DRIVER = """
import json, os, sys
import ray
from cluster.session import receive_environment, session
from cluster.workers import map_items

def make_environment_reader():
    receive_environment()
    return lambda names: {name: os.environ.get(name) for name in names}

with session(1):
    ((_, seen),) = map_items(make_environment_reader, [sys.argv[1:]], num_workers=1)
    context = ray.get_runtime_context()
    node = ray.nodes()[0]
    folder = os.path.dirname(os.path.dirname(node["ObjectStoreSocketName"]))
    print(json.dumps({"seen": seen, "environment": context.get_runtime_env_string(), "folder": folder}))
"""


@pytest.mark.ray
def test_workers_of_a_running_cluster_have_the_drivers_environment_and_ray_stores_none(ray_session: None) -> None:
    private = SECRET | OTHER
    threads = {"OMP_NUM_THREADS": "1"}
    environment = os.environ | QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT | private | threads | {"RAY_ADDRESS": address()}
    command = [sys.executable, "-c", DRIVER, *SECRET, *OTHER, *threads]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["seen"] == SECRET | dict.fromkeys(OTHER) | threads
    assert json.loads(report["environment"])["env_vars"].keys() <= {*PUBLIC, KEEPER}
    files = [path for path in Path(report["folder"]).rglob("*") if path.is_file()]
    assert len(files) > 5, "there was something to search"
    assert not [path for path in files if b"canary" in path.read_bytes()]


def test_several_threads_of_a_worker_receive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_asked = threading.Barrier(2)

    def get(_: object) -> dict[str, str]:
        both_have_asked.wait(10)
        return {"ADMIRAL_ANY": "1"}

    monkeypatch.setattr("ray.get_actor", lambda *_, **__: MagicMock())
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setenv(KEEPER, "keeper")
    monkeypatch.setenv("ADMIRAL_ANY", "0")
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: receive_environment(), range(2)))
    assert os.environ["ADMIRAL_ANY"] == "1" and KEEPER not in os.environ


@pytest.mark.ray
def test_workers_of_a_local_ray_inherit_the_environment(ray_session: None) -> None:
    import ray

    name = "AWS_SECRET_ACCESS_KEY"
    assert ray.get(ray.remote(lambda: os.environ.get(name)).remote()) == os.environ[name]
    assert os.environ[name] not in ray.get_runtime_context().get_runtime_env_string()


def test_too_few_gpus_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    ended: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.session._connect", lambda **_: None)
    monkeypatch.setattr("cluster.session._interrupt_on_sigterm", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(RuntimeError, match="this machine has 0 GPUs and this job needs 4"), session(1, num_gpus=4):
        pass
    assert ended, "the local Ray is shut down"
