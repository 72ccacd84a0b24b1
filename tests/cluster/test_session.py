"""The session: every worker has the driver's environment, and nobody else can read its secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.session import LOCAL_ENVIRONMENT, QUIET_ENVIRONMENT, address

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "ADMIRAL_S3_ADDRESSING")
DRIVER = """
import json, os, sys
import ray
from cluster.session import receive_environment, session

def look(names):
    receive_environment()
    return {name: os.environ.get(name) for name in names}

with session(1):
    shown = ray.get_runtime_context().get_runtime_env_string()
    print(json.dumps({"seen": ray.get(ray.remote(look).remote(sys.argv[1:])), "shown": shown}))
"""


@pytest.mark.ray
def test_workers_of_a_running_cluster_have_the_drivers_credentials_and_nobody_sees_them(ray_session: None) -> None:
    mine = {name: f"value-of-{name}" for name in NAMES}
    environment = os.environ | QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT | mine | {"RAY_ADDRESS": address()}
    command = [sys.executable, "-c", DRIVER, *NAMES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["seen"] == mine
    assert mine["AWS_ENDPOINT_URL"] in answer["shown"], "what is no secret is in the runtime environment"
    assert mine["AWS_SECRET_ACCESS_KEY"] not in answer["shown"]
    assert mine["AWS_ACCESS_KEY_ID"] not in answer["shown"]


@pytest.mark.ray
def test_workers_of_our_own_ray_inherit_them(ray_session: None) -> None:
    import ray

    name = "AWS_SECRET_ACCESS_KEY"
    assert ray.get(ray.remote(lambda: os.environ.get(name)).remote()) == os.environ[name]
    assert os.environ[name] not in ray.get_runtime_context().get_runtime_env_string()


def test_too_few_gpus_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "from cluster.session import session\nwith session(1, num_gpus=4): pass"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "RuntimeError: this machine has 0 GPUs and this job wants 4" in done.stderr
