"""What tests of a cluster share: one of processes of this machine, and jobs submitted to it as users do."""

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
    """This environment without what would lead to another Ray, store or tracking server."""
    left_out = ("RAY_", "ADMIRAL_", "MLFLOW_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | changes


@contextlib.contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """A cluster in a folder of its own; it ends with the context."""
    stands = LocalCluster(Path(tempfile.mkdtemp(prefix="admiral-", dir="/tmp")))
    stands.start()
    try:
        yield stands
    finally:
        stands.stop()
        shutil.rmtree(stands.folder)


def ray_command(cluster: LocalCluster, *arguments: str) -> subprocess.Popen[str]:
    """`ray ARGUMENTS` as a user's shell with the cluster's environment would run it."""
    return subprocess.Popen(
        [str(BIN / "ray"), *arguments],
        cwd=ROOT,
        env=quiet_environment(**cluster.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_job(cluster: LocalCluster, *job: str, submission_id: str = "") -> subprocess.Popen[str]:
    """Submit `python JOB...`; the process goes on until the job ends, and prints what it prints."""
    name = ["--submission-id", submission_id] if submission_id else []
    return ray_command(cluster, "job", "submit", *name, "--working-dir", ".", "--", "python", *job)


def submit(cluster: LocalCluster, *job: str) -> str:
    """What the job prints; it must succeed."""
    running = start_job(cluster, *job)
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 0, output[-3000:]
    return output


def asked(cluster: LocalCluster, path: str) -> str:
    """Return the response of the job server to a request with the token."""
    url = f"{cluster.environment['RAY_API_SERVER_ADDRESS']}{path}"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def store(cluster: LocalCluster) -> s3fs.S3FileSystem:
    """The cluster's S3."""
    environment = cluster.environment
    return s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        use_listings_cache=False,
    )
