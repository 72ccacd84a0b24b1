"""A cluster on this machine, with jobs submitted to it: a node is killed, a page is opened, and no secret is leaked."""

import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from cluster.local import NODES, LocalCluster
from tests.submission import job_server_response, local_cluster, start_job, store, submit

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """Return the list of the outputs of all submitted jobs."""
    return []


def raylet_of_a_training_worker(cluster: LocalCluster) -> psutil.Process:
    """Return the raylet of a node that trains."""
    raylets = [process for process in cluster.processes() if process.name() == "raylet"]
    return next(r for r in raylets if any("TrainWorker" in " ".join(w.cmdline()) for w in r.children()))


def with_descendants(cluster: LocalCluster) -> list[psutil.Process]:
    """Return all processes of the cluster."""
    leaders = cluster.processes()
    return [*leaders, *(child for leader in leaders for child in leader.children(recursive=True))]


def test_the_doctor_finds_nothing_wrong(cluster: LocalCluster, outputs: list[str]) -> None:
    output = submit(cluster, "jobs/doctor.py", "--megabytes", "4")
    outputs.append(output)
    assert "all checks passed" in output and f"{NODES + 1} nodes" in output
    for phrase in ("created once", "GB/s between 2 nodes", "responds in", "Python's headers"):
        assert phrase in output


def test_a_training_survives_a_killed_node(cluster: LocalCluster, outputs: list[str]) -> None:
    printed = submit(cluster, "jobs/prepare_dataset.py", "digits")
    outputs.append(printed)
    assert "s3://admiral/runs/datasets/digits" in printed and "View run" in printed, "the last lines name the outputs"
    settings = ["--total-images", "3200", "--checkpoint-every", "640", "--preview-every", "3200"]
    training = start_job(cluster, "jobs/train_adm.py", "digits", *settings)
    checkpoints = "admiral/runs/digits/diffusion/checkpoints"
    deadline = time.monotonic() + 240
    while not store(cluster).exists(checkpoints) and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    raylet_of_a_training_worker(cluster).send_signal(signal.SIGKILL)
    metrics = ""
    while "ray_admiral_images_per_second" not in metrics and training.poll() is None:  # updated every ten seconds
        metrics = urllib.request.urlopen(cluster.metrics["ray head"], timeout=30).read().decode()
        time.sleep(1)
    output, _ = training.communicate(timeout=300)
    outputs.append(output)
    assert training.returncode == 0, output[-3000:]
    assert "3,200 images" in output and "not in MLflow" not in output, output[-3000:]
    for name in ("images_per_second", "data_wait_fraction", "loss"):
        assert f"ray_admiral_{name}{{" in metrics, "Prometheus reads this page"
    weights = store(cluster).ls("admiral/runs/digits/diffusion/weights")
    assert "images-000000003200-ema-0.995.safetensors" in [path.rsplit("/", 1)[1] for path in weights]


def test_failed_jobs_have_exit_code_1_and_print_the_reason(cluster: LocalCluster, outputs: list[str]) -> None:
    jobs = {
        "learning_rate": ("jobs/train_adm.py", "digits", "--total-images", "3200", "--learning-rate", "1"),
        "set ADMIRAL_STORE": ("jobs/prepare_dataset.py", "digits", "--store", "runs"),
    }
    for reason, running in [(reason, start_job(cluster, *job)) for reason, job in jobs.items()]:
        output, _ = running.communicate(timeout=120)
        outputs.append(output)
        assert running.returncode == 1 and reason in output


def test_the_page_of_a_run_shows_its_samples(cluster: LocalCluster, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("Chromium is not installed: run .ci/run or apt-get install chromium")
    tracking = cluster.environment["MLFLOW_TRACKING_URI"]
    run = find_run(tracking, "train digits/diffusion")
    page = f"{tracking}/#/experiments/{run['info']['experiment_id']}/runs/{run['info']['run_id']}"
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1600"]
    command = [browser, *flags, "--virtual-time-budget=60000", f"--user-data-dir={tmp_path}/profile"]
    subprocess.run([*command, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    if folder := os.environ.get("ADMIRAL_SCREENSHOTS"):
        shutil.copy(picture, folder)
    assert Image.open(picture).size == (1400, 1600)
    dom = subprocess.run([*command, "--dump-dom", page], capture_output=True, timeout=120, check=True).stdout.decode()
    assert "s3://admiral/runs/digits/diffusion" in dom
    image = re.search(r'<img src="(get-artifact[^"]*[.]png[^"]*)"', dom)
    assert image, "the description shows the sample grid"
    with urllib.request.urlopen(f"{tracking}/{html.unescape(image[1])}", timeout=30) as response:
        grid = np.asarray(Image.open(io.BytesIO(response.read())).convert("L"))
    assert grid.std() > 20, "the sample grid is uniform"


def find_run(tracking: str, name: str) -> dict[str, Any]:
    body = json.dumps({"experiment_ids": ["1"], "filter": f"tags.`mlflow.runName` = '{name}'"}).encode()
    request = urllib.request.Request(
        f"{tracking}/api/2.0/mlflow/runs/search", body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        (run,) = json.loads(response.read())["runs"]
    return dict(run)


def test_no_output_file_or_metadata_contains_a_secret(cluster: LocalCluster, outputs: list[str]) -> None:
    """Search all logs and files of the services, all outputs of the jobs, job metadata, command lines and MLflow."""
    secrets = [cluster.environment[name] for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")]
    contents: dict[str, bytes] = {f"output of job {number}": text.encode() for number, text in enumerate(outputs)}
    for path in cluster.folder.rglob("*"):
        if path.is_file() and path != cluster.folder / "environment":  # secrets are stored only there
            contents[str(path)] = path.read_bytes()
    files = store(cluster)
    contents |= {f"s3://{path}": files.cat_file(path) for path in files.find("admiral")}
    for endpoint in ("/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1"):
        contents[endpoint] = job_server_response(cluster, endpoint).encode()
    for process in with_descendants(cluster):
        contents[f"command line of {process.pid}"] = " ".join(process.cmdline()).encode()
    run = find_run(cluster.environment["MLFLOW_TRACKING_URI"], "train digits/diffusion")
    contents["MLflow"] = json.dumps(run).encode()
    assert len(contents) > 50 and len(outputs) >= 4, "there was something to search"
    leaks = sorted({source for source, content in contents.items() for secret in secrets if secret.encode() in content})
    assert not leaks


def test_stopping_ends_the_processes_of_the_cluster_and_no_others(cluster: LocalCluster) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    processes = with_descendants(cluster)
    assert len(processes) > 10
    try:
        assert cluster.stop() >= 4, "S3, MLflow, the head and the remaining node"
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
        assert bystander.poll() is None
        assert cluster.stop() == 0, "the second call has nothing to stop"
        assert not (cluster.folder / "environment").exists()
    finally:
        bystander.kill()
        bystander.wait()
