"""All jobs of the workflow, one after another on a cluster of this machine, and a job that is stopped and resumed."""

import json
import re
import time
from collections.abc import Iterator

import pytest

from cluster.local import LocalCluster
from tests.submission import local_cluster, ray_command, start_job, store, submit

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RUNS = "admiral/runs/digits"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as stands:
        submit(stands, "jobs/prepare_dataset.py", "digits")
        yield stands


def test_a_stopped_job_resumes_where_it_stopped(cluster: LocalCluster) -> None:
    training = ["jobs/train_adm.py", "digits", "--total-images", "64000", "--log-every", "640"]
    running = start_job(cluster, *training, submission_id="to-be-stopped")
    assert running.stdout is not None
    for line in running.stdout:
        if "loss=" in line:  # it trains
            break
    stopping = ray_command(cluster, "job", "stop", "to-be-stopped")
    said, _ = stopping.communicate(timeout=120)
    assert stopping.returncode == 0, said
    rest, _ = running.communicate(timeout=120)
    assert "was stopped" in rest, rest[-2000:]  # Ray follows the log no further, and takes this for a success
    checkpoint = max(store(cluster).ls(f"{RUNS}/diffusion/checkpoints"))
    position = int(checkpoint.rsplit("/", 1)[1].removeprefix("images-")[:12])
    assert 0 < position < 64_000, "at the step at which it was stopped"
    again = submit(cluster, *training)
    shown = [int(images) for images in re.findall(r" (\d+)/64000", again)]
    assert min(images for images in shown if images) >= position, "nothing is trained twice"
    assert "is trained: 64,000 images" in again


def test_the_stories_run_one_after_another(cluster: LocalCluster) -> None:
    submit(cluster, "jobs/train_adm.py", "digits", "--total-images", "6400", "--output", "digits/short")
    submit(cluster, "jobs/train_classifier.py", "digits", "--total-images", "3200")
    weights = ["--weights", "digits/short"]
    search = ["--space.scales", "0", "2", "--space.num-steps", "4", "--space.samplers", "ddpm", "--space.no-continuous"]
    search += ["--rungs", "36", "72", "--trials", "2", "--round-size", "2"]
    assert "View run" in submit(cluster, "jobs/tune_guidance.py", "digits", *weights, *search)
    generated = submit(cluster, "jobs/generate_samples.py", "digits", *weights, "--num-samples", "256")
    assert f"s3://{RUNS}/samples" in generated and "View run" in generated
    assert f"s3://{RUNS}/evaluation/report.json" in submit(cluster, "jobs/evaluate_samples.py", "digits")
    files = store(cluster)
    report = json.loads(files.cat_file(f"{RUNS}/evaluation/report.json"))
    assert report["metrics"]["fd_digits"]["n"] == 256
    begin = time.monotonic()
    again = submit(cluster, "jobs/generate_samples.py", "digits", *weights, "--num-samples", "256")
    assert "is complete" in again, f"and nothing is done twice ({time.monotonic() - begin:.0f} s)"
