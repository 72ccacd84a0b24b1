"""Start a cluster of processes on this machine for tests, and submit jobs to it in the same way as a user."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import s3fs

from cluster.local import LocalCluster

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def quiet_environment(**changes: str) -> dict[str, str]:
    """Return this environment without the variables that name another Ray, store or tracking server."""
    prefixes = ("RAY_", "ADMIRAL_", "MLFLOW_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | changes


@contextlib.contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """Start a cluster in a new folder, and stop it at the end."""
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="admiral-", dir="/tmp")))
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder)


def ray_command(cluster: LocalCluster, *arguments: str) -> subprocess.Popen[str]:
    """Start `ray ARGUMENTS` with the environment variables of the cluster."""
    return subprocess.Popen(
        [str(BIN / "ray"), *arguments],
        cwd=ROOT,
        env=quiet_environment(**cluster.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_job(cluster: LocalCluster, *job: str, submission_id: str = "") -> subprocess.Popen[str]:
    """Submit `python JOB...`. The returned process prints the job's output, and runs until the job ends."""
    name = ["--submission-id", submission_id] if submission_id else []
    return ray_command(cluster, "job", "submit", *name, "--working-dir", ".", "--", "python", *job)


def submit(cluster: LocalCluster, *job: str) -> str:
    """Run a job, which must succeed, and return its output."""
    running = start_job(cluster, *job)
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 0, output[-3000:]
    return output


def job_server_response(cluster: LocalCluster, path: str) -> str:
    """Return the response of the job server to a request with the token."""
    url = f"{cluster.environment['RAY_API_SERVER_ADDRESS']}{path}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def store(cluster: LocalCluster) -> s3fs.S3FileSystem:
    """Return the S3 server of the cluster."""
    environment = cluster.environment
    return s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )
