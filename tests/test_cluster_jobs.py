"""All jobs of the workflow on a cluster of this machine, a job that is stopped and resumed, and a preempted node."""

import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from cluster.local import LocalCluster
from tests.submission import job_server_response, local_cluster, ray_command, start_job, store, submit

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RUNS = "admiral/runs/digits"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as started:
        submit(started, "jobs/prepare_dataset.py", "digits")
        yield started


def wait_for_steps(training: subprocess.Popen[str]) -> None:
    assert training.stdout is not None
    assert any("loss=" in line for line in training.stdout), "it made no steps"


def test_a_stopped_job_resumes_where_it_stopped(cluster: LocalCluster) -> None:
    training = ["jobs/train_adm.py", "digits", "--total-images", "64000", "--log-every", "640"]
    running = start_job(cluster, *training, submission_id="to-be-stopped")
    wait_for_steps(running)
    stopping = ray_command(cluster, "job", "stop", "to-be-stopped")
    output, _ = stopping.communicate(timeout=120)
    assert stopping.returncode == 0, output
    last_lines, _ = running.communicate(timeout=120)
    assert "was stopped" in last_lines, last_lines[-2000:]  # Ray stops following the log, and reports success
    checkpoint = max(store(cluster).ls(f"{RUNS}/diffusion/checkpoints"))
    position = int(checkpoint.rsplit("/", 1)[1].removeprefix("images-")[:12])
    assert 0 < position < 64_000, "the checkpoint is of the step at which the job was stopped"
    resumed = submit(cluster, *training)
    shown = [int(images) for images in re.findall(r" (\d+)/64000", resumed)]
    assert min(images for images in shown if images) >= position, "nothing is trained twice"
    assert "is trained: 64,000 images" in resumed


def test_all_jobs_of_the_workflow_run_one_after_another(cluster: LocalCluster) -> None:
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
    second = submit(cluster, "jobs/generate_samples.py", "digits", *weights, "--num-samples", "256")
    assert "is complete" in second, "nothing is done twice"


def test_a_checkpoint_is_written_before_a_preempted_node_ends(cluster: LocalCluster) -> None:
    """The node of the training workers gets a preemption notice; the training continues elsewhere."""
    length = 38_400  # long enough that it still runs after its first line of progress
    options = ["--total-images", str(length), "--checkpoint-every", "1000000", "--log-every", "640"]
    training = start_job(cluster, "jobs/train_adm.py", "digits", "--output", "digits/preempted", *options)
    wait_for_steps(training)
    # Without this filter, the response ends before the newest actors.
    alive = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
    actors = json.loads(job_server_response(cluster, f"/api/v0/actors?detail=1&{alive}"))["data"]["result"]["result"]
    node = next(actor["node_id"] for actor in actors if "TrainWorker" in actor["class_name"])
    target = ["--address", cluster.head, "--node-id", node, "--deadline-remaining-seconds", "20"]
    drain = ray_command(
        cluster, "drain-node", *target, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"
    )
    printed, _ = drain.communicate(timeout=120)
    assert drain.returncode == 0, printed
    output, _ = training.communicate(timeout=400)
    assert training.returncode == 0, output[-3000:]
    assert "preemption notice received" in output
    folder = f"{RUNS}/preempted"
    first = min(store(cluster).glob(f"{folder}/checkpoints/images-*/commit-*.json"))
    position = json.loads(store(cluster).cat_file(first))["position"]
    assert 0 < position < length and position % 64 == 0, "no checkpoint was written after the notice"
    assert store(cluster).glob(f"{folder}/weights/images-{length:012d}-*")
