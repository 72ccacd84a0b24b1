"""Test that every job ends with one line and exit code 1 if its storage is missing, denied or full, or Ray differs."""

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import address
from tests.chaos.proxy import Fault, Proxy
from tests.small_world import run
from tests.submission import ROOT, quiet_environment

pytestmark = pytest.mark.usefixtures("sqlite_tracking")
JOBS = {
    "prepare_dataset": ["digits"],
    "train_adm": ["digits", "--num-workers", "0"],
    "train_classifier": ["digits", "--num-workers", "0"],
    "train_upsampler": ["digits", "--num-workers", "0"],
    "tune_guidance": ["digits", "--num-workers", "0"],
    "evaluate_run": ["digits", "--num-workers", "0"],
    "generate_samples": ["digits", "--num-workers", "0"],
    "evaluate_samples": ["digits", "--num-workers", "0"],
    "estimate_likelihood": ["digits"],
    "average_weights": ["digits", "--sigma-rel", "0.075"],
    "convert_weights": ["digits"],
}
TRAININGS = ("train_adm", "train_classifier", "train_upsampler")  # they need a dataset and nothing else


def refusal(job: str, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the job's stderr, which must be one line; the exit code must be 1."""
    monkeypatch.setattr(sys, "argv", [f"{job}.py", *JOBS[job], "--store", store])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"jobs/{job}.py", run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1 and store in error, f"{job}: exit {end.value.code}: {error}"
    return error


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("job", JOBS)
def test_a_missing_bucket_is_refused(
    job: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such bucket" in refusal(job, "s3://never-made", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("job", "fault", "phrase"),
    [*((job, "denied", "access denied") for job in JOBS), ("train_adm", "expired", "expired")],
)
def test_denied_access_is_refused_without_a_retry(
    job: str,
    fault: Fault,
    phrase: str,
    s3_bucket: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rule = proxy.add(fault)
    assert phrase in refusal(job, s3_bucket, monkeypatch, capsys)
    assert len(rule.requests) <= 2, "it retried a request that cannot succeed"


def test_trainings_refuse_a_read_only_store(
    s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *JOBS["prepare_dataset"], "--store", s3_bucket])
    runpy.run_path("jobs/prepare_dataset.py", run_name="__main__")
    capsys.readouterr()
    proxy.add("denied", method="PUT|POST")
    for job in TRAININGS:
        error = refusal(job, s3_bucket, monkeypatch, capsys)
        assert re.search(r"cannot create: access denied .*(lease|config\.json)", error)


# ------------------------------------------------------------------------------------------------ a full disk

FREE_BYTES = 24_576  # enough for the configs and manifests, but not for the outputs of a job
ARGUMENTS = {
    "prepare_dataset": [],
    "train_adm": ["--total-images", "1280", "--num-workers", "0"],
    "train_classifier": ["--total-images", "1280", "--num-workers", "0"],
    "tune_guidance": ["--space.num-steps", "2", "3", "--rungs", "256", "512", "--trials", "2", "--num-workers", "0"],
    "evaluate_run": ["--num-samples", "1024", "--sampler.num-steps", "2", "--num-workers", "0"],
    "generate_samples": ["--num-samples", "5000", "--sampler.num-steps", "2", "--num-workers", "0"],
    "evaluate_samples": ["--num-workers", "0"],
    "average_weights": ["--sigma-rel", "0.075"],
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that is full except for FREE_BYTES."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    disk.joinpath("full").write_bytes(bytes((1 << 20) - FREE_BYTES))
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("job", ARGUMENTS)
def test_a_full_disk_ends_a_job_with_one_line(
    job: str,
    small_world: str,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = shutil.copytree(small_world, tmp_path / "store")
    with pytest.raises(SystemExit) as end:
        run(job, ["digits", *ARGUMENTS[job], "--store", str(store), "--output", str(small_disk / "output")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1 and f"{job}.py: error: " in error
    assert "no space left" in error.lower() and str(small_disk) in error


# ------------------------------------------------------------------------------------------------ another Ray


@pytest.mark.ray
def test_a_ray_version_other_than_the_clusters_is_refused(ray_session: None, tmp_path: Path) -> None:
    script = (
        "import ray, runpy, sys; ray.__version__ = '2.59.0'; sys.argv = ['prepare_dataset.py', 'digits', "
        "'--num-workers', '2']; runpy.run_path('jobs/prepare_dataset.py', run_name='__main__')"
    )
    environment = quiet_environment(RAY_ADDRESS=address(), ADMIRAL_STORE=str(tmp_path))
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1 and "2.59.0" in process.stderr and "2.60" in process.stderr
    assert "Traceback" not in process.stderr and "mismatch" in process.stderr
