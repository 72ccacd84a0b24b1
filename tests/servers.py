"""Servers that tests and proofs start for themselves, on free ports, and end by their own process."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

from cluster.servers import free_port, wait_until_listening

S3_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test-access-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def mlflow_server(folder: str, port: int | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URI of an MLflow server that keeps everything in `folder`, and a function that kills it at once."""
    port = port or free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    settings = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    null = subprocess.DEVNULL
    server = subprocess.Popen(command, env=settings, start_new_session=True, stdout=null, stderr=null)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=30)

    try:
        wait_until_listening(port, server, seconds=120)
        yield f"http://127.0.0.1:{port}", kill
    finally:
        kill()


@contextlib.contextmanager
def environment(**settings: str) -> Iterator[None]:
    """These variables, and those from before again at the end."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
