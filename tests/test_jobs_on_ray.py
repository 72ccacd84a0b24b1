"""The jobs as users start them: the whole quickstart in small, and a job submitted to a running Ray."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SMALL = [
    "--images", "512", "--classifier-images", "512", "--num-samples", "96", "--rungs", "36", "72",
    "--scales", "0", "2", "--steps", "4",
]  # fmt: skip


def quiet_environment(**changes: str) -> dict[str, str]:
    """This environment without what would lead to another Ray, store or tracking server."""
    left_out = ("RAY_", "ADMIRAL_", "MLFLOW_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | changes


@pytest.mark.ray
def test_the_quickstart_in_small_and_again(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/quickstart.py", "digits", "--folder", str(tmp_path), *SMALL]
    first = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr[-3000:]
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["num_samples"] == 96
    assert set(numbers["seconds_by_stage"]) == {
        "prepare", "train", "train_classifier", "search",
        "generate_guided", "evaluate_guided", "generate_unguided", "evaluate_unguided",
    }  # fmt: skip
    assert numbers["peak_rss_bytes"] > 2**20
    winner = numbers["search"]["winner"]
    assert winner["scale"] in (0.0, 2.0) and winner["steps"] == 4 and winner["sampler"] == "ddpm"
    assert numbers["search"]["samples"] <= 2 * 128 + 2 * 128, "all trials to the end, and the finals"
    for name in ("accuracy", "fd_digits", "kid_digits", "precision", "recall", "inception_score_digits"):
        for found in (numbers["metrics_guided"][name], numbers["metrics_unguided"][name]):
            assert found["n"] == 96 and found.keys() == {"value", "n", "interval", "note", "seeds", "extractor"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page
    assert (tmp_path / "mlflow.db").exists()

    stages_before = (tmp_path / "stages.json").read_text()
    (tmp_path / "report.html").unlink()
    again = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done already") == 8
    assert (tmp_path / "stages.json").read_text() == stages_before
    assert (tmp_path / "report.html").exists()


@pytest.fixture
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the job server of a `ray start --head` of its own, which ends by its process group."""
    ports = {
        name: free_port()
        for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    }
    short = Path("/tmp") / f"admiral-{ports['port']}"  # sockets beneath it must have short paths
    short.mkdir()
    options = {"node-ip-address": "127.0.0.1", "num-cpus": 4, "include-dashboard": "true", "temp-dir": short}
    options |= {"object-store-memory": 100_000_000, **ports}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", *flags]
    environment = quiet_environment(RAY_AUTH_MODE="disabled", PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        assert head.stdout is not None
        for line in head.stdout:
            if "Ray runtime started" in line:
                break
        yield f"http://127.0.0.1:{ports['dashboard-port']}"
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.ray
def test_a_submitted_job_leaves_its_outputs_in_the_store(ray_head: str, tmp_path: Path) -> None:
    def submit(settings: dict[str, str], *job: str) -> subprocess.CompletedProcess:
        runtime_env = json.dumps({"env_vars": settings})
        where = ["--address", ray_head, "--working-dir", ".", "--runtime-env-json", runtime_env]
        command = [str(BIN / "ray"), "job", "submit", *where, "--", "python", *job]
        environment = quiet_environment(RAY_AUTH_MODE="disabled")
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    settings = {"ADMIRAL_STORE": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    prepared = submit(settings, "jobs/prepare_dataset.py", "digits")
    assert prepared.returncode == 0, prepared.stdout[-3000:]
    trained = submit(settings, "jobs/train_adm.py", "digits", "--images", "128", "--num-workers", "1")
    assert trained.returncode == 0, trained.stdout[-3000:]
    assert list((tmp_path / "digits" / "diffusion" / "weights").glob("*.safetensors"))

    refused = submit({"ADMIRAL_STORE": "runs"}, "jobs/prepare_dataset.py", "digits")
    assert refused.returncode == 1
    assert "set ADMIRAL_STORE" in refused.stdout + refused.stderr
