"""A cluster on this machine, with jobs submitted to it: a node is killed, a page is opened, secrets stay secret."""

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
from tests.submission import asked, local_cluster, start_job, store, submit

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as stands:
        yield stands


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """Everything that the submitted jobs printed."""
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
    said = submit(cluster, "jobs/doctor.py", "--megabytes", "4")
    outputs.append(said)
    assert "all checks passed" in said and f"{NODES + 1} nodes" in said
    for words in ("created once", "GB/s between 2 nodes", "responds in", "Python's headers"):
        assert words in said


def test_a_node_killed_while_it_trains_costs_no_job(cluster: LocalCluster, outputs: list[str]) -> None:
    said = submit(cluster, "jobs/prepare_dataset.py", "digits")
    outputs.append(said)
    assert "s3://admiral/runs/datasets/digits" in said and "View run" in said, "the last lines say where things lie"
    settings = ["--total-images", "3200", "--checkpoint-every", "640", "--preview-every", "3200"]
    training = start_job(cluster, "jobs/train_adm.py", "digits", *settings)
    checkpoints = "admiral/runs/digits/diffusion/checkpoints"
    deadline = time.monotonic() + 240
    while not store(cluster).exists(checkpoints) and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    raylet_of_a_training_worker(cluster).send_signal(signal.SIGKILL)
    numbers = ""
    while "ray_admiral_images_per_second" not in numbers and training.poll() is None:  # shown every ten seconds
        numbers = urllib.request.urlopen(cluster.metrics["ray head"], timeout=30).read().decode()
        time.sleep(1)
    output, _ = training.communicate(timeout=300)
    outputs.append(output)
    assert training.returncode == 0, output[-3000:]
    assert "3,200 images" in output and "not in MLflow" not in output, output[-3000:]
    for name in ("images_per_second", "data_wait_fraction", "loss"):
        assert f"ray_admiral_{name}{{" in numbers, "what Prometheus reads"
    weights = store(cluster).ls("admiral/runs/digits/diffusion/weights")
    assert "images-000000003200-ema-0.995.safetensors" in [path.rsplit("/", 1)[1] for path in weights]


def test_what_fails_says_so_by_its_exit_code(cluster: LocalCluster, outputs: list[str]) -> None:
    jobs = {
        "learning_rate": ("jobs/train_adm.py", "digits", "--total-images", "3200", "--learning-rate", "1"),
        "set ADMIRAL_STORE": ("jobs/prepare_dataset.py", "digits", "--store", "runs"),
    }
    for words, refused in [(words, start_job(cluster, *job)) for words, job in jobs.items()]:
        output, _ = refused.communicate(timeout=120)
        outputs.append(output)
        assert refused.returncode == 1 and words in output


def test_the_page_of_a_run_shows_its_samples(cluster: LocalCluster, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no Chromium: .ci/run installs it, apt-get install chromium does it by hand")
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
    shown = re.search(r'<img src="(get-artifact[^"]*[.]png[^"]*)"', dom)
    assert shown, "the description shows the sample grid"
    with urllib.request.urlopen(f"{tracking}/{html.unescape(shown[1])}", timeout=30) as answer:
        grid = np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))
    assert grid.std() > 20, "and it is a picture of something"


def find_run(tracking: str, name: str) -> dict[str, Any]:
    body = json.dumps({"experiment_ids": ["1"], "filter": f"tags.`mlflow.runName` = '{name}'"}).encode()
    request = urllib.request.Request(
        f"{tracking}/api/2.0/mlflow/runs/search", body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        (run,) = json.loads(answer.read())["runs"]
    return dict(run)


def test_no_secret_is_anywhere(cluster: LocalCluster, outputs: list[str]) -> None:
    """Every log and file of the services, what the jobs printed and made, job metadata, command lines, the tracking."""
    secrets = [cluster.environment[name] for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")]
    seen: dict[str, bytes] = {f"output of job {number}": text.encode() for number, text in enumerate(outputs)}
    for path in cluster.folder.rglob("*"):
        if path.is_file() and path != cluster.folder / "environment":  # the one place where they are kept
            seen[str(path)] = path.read_bytes()
    files = store(cluster)
    seen |= {f"s3://{path}": files.cat_file(path) for path in files.find("admiral")}
    for question in ("/api/jobs/", "/api/v0/jobs?detail=1", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1"):
        seen[question] = asked(cluster, question).encode()
    for process in with_descendants(cluster):
        seen[f"command line of {process.pid}"] = " ".join(process.cmdline()).encode()
    run = find_run(cluster.environment["MLFLOW_TRACKING_URI"], "train digits/diffusion")
    seen["MLflow"] = json.dumps(run).encode()
    assert len(seen) > 50 and len(outputs) >= 4, "there was something to search"
    found = sorted({place for place, content in seen.items() for secret in secrets if secret.encode() in content})
    assert not found


def test_stopping_ends_what_was_started_and_nothing_else(cluster: LocalCluster) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    family = with_descendants(cluster)
    assert len(family) > 10
    try:
        assert cluster.stop() >= 4, "S3, MLflow, the head and the node that is left"
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert bystander.poll() is None
        assert cluster.stop() == 0, "a second time there is nothing to stop"
        assert not (cluster.folder / "environment").exists()
    finally:
        bystander.kill()
        bystander.wait()
