"""A node that announces its end: a checkpoint is made before it goes, and the training goes on elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.servers import end_processes, free_port, start_server
from tests.submission import BIN, ROOT, quiet_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray of two nodes and a head without CPUs."""
    short = Path(tempfile.mkdtemp(prefix="admiral-", dir="/tmp"))  # sockets beneath it must have short paths
    port = free_port()
    environment = quiet_environment(RAY_AUTH_MODE="disabled", PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    common = ["--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    ports = [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    head = [f"--port={port}", "--head", "--num-cpus=0", "--include-dashboard=true", f"--temp-dir={short}", *ports]
    started: list[psutil.Popen] = []

    def start(name: str, *options: str) -> None:
        command = [str(BIN / "ray"), "start", *common, f"--dashboard-agent-listen-port={free_port()}", *options]
        log = tmp_path / f"{name}.log"
        started.append(start_server(command, lambda: "Ray runtime started" in log.read_text(), log, environment))

    try:
        start("head", *head)
        for number in (1, 2):
            start(f"node-{number}", f"--address=127.0.0.1:{port}", "--num-cpus=3")
        yield f"127.0.0.1:{port}"
    finally:
        end_processes(started[::-1])
        shutil.rmtree(short, ignore_errors=True)


def test_a_node_that_goes_away_leaves_a_checkpoint_first(address: str, tmp_path: Path) -> None:
    environment = quiet_environment(
        RAY_ADDRESS=address, RAY_AUTH_MODE="disabled", ADMIRAL_STORE=str(tmp_path / "store"), OMP_NUM_THREADS="1"
    )
    subprocess.run([sys.executable, "jobs/prepare_dataset.py", "digits"], cwd=ROOT, env=environment, check=True)
    length = 12_800
    arguments = ["--total-images", str(length), "--checkpoint-every", "1000000", "--log-every", "640"]
    with (tmp_path / "job.log").open("wb") as log:
        command = [sys.executable, "jobs/train_adm.py", "digits", *arguments]
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        _wait_for_metrics(tmp_path, job)
        _drain_a_node_with_a_worker(address, environment)
        folder = tmp_path / "store" / "digits" / "diffusion" / "checkpoints"
        deadline = time.monotonic() + 60
        while not (commits := sorted(folder.glob("images-*/commit-*.json"))):
            assert job.poll() is None and time.monotonic() < deadline, "no checkpoint after the notice"
            time.sleep(0.1)
        position = json.loads(commits[0].read_text())["position"]
        assert 0 < position < length and position % 64 == 0
        assert job.wait(timeout=300) == 0, (tmp_path / "job.log").read_text()[-3000:]
    finally:
        job.kill()
        job.wait()
    assert "preemption notice received" in (tmp_path / "job.log").read_text()
    assert list((tmp_path / "store" / "digits" / "diffusion" / "weights").glob(f"images-{length:012d}-*"))


def _wait_for_metrics(tmp_path: Path, job: subprocess.Popen[bytes]) -> None:
    """Until the training has made some steps."""
    deadline = time.monotonic() + 180
    while b"loss=" not in (tmp_path / "job.log").read_bytes():
        assert job.poll() is None, (tmp_path / "job.log").read_text()[-3000:]
        assert time.monotonic() < deadline, "the training did not start"
        time.sleep(0.5)


def _drain_a_node_with_a_worker(address: str, environment: dict[str, str]) -> None:
    """Announce to the node of a training worker that it ends in 20 seconds."""
    script = (
        "import ray; from ray.util.state import list_actors; ray.init(logging_level='ERROR');"
        "print([a.node_id for a in list_actors(filters=[('state','=','ALIVE')]) if 'TrainWorker' in a.class_name][0])"
    )
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    node = found.stdout.split()[-1]
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    options = ["--address", address, "--node-id", node, *notice, "--deadline-remaining-seconds", "20"]
    command = [str(BIN / "ray"), "drain-node", *options]
    subprocess.run(command, env=environment, check=True, capture_output=True)
