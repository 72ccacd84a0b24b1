"""Fixtures that several test modules share: one local Ray and one S3 server for the whole session."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxy

# Read when Ray and torch start: no other cluster, no metadata service, one thread each.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(AWS_EC2_METADATA_DISABLED="true", MLFLOW_DISABLE_TELEMETRY="true", OMP_NUM_THREADS="1")


def free_port() -> int:
    """A TCP port on which nothing listens at this moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server; the standard AWS variables point at it for the rest of the session."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait_until_listening(port, server)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", endpoint)
            environment.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-key")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield endpoint
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """The URI of a fresh bucket."""
    import s3fs

    name = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3_server).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_proxy(s3_server: str) -> Iterator[Proxy]:
    """The fault proxy through which the workers of `ray_session` see the S3 server: harmless until a rule is added."""
    proxy = Proxy(s3_server)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def ray_session(ray_proxy: Proxy) -> Iterator[None]:
    """One local Ray for all tests marked `ray`; its workers see the S3 server through `ray_proxy`."""
    from cluster.session import session

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", ray_proxy.endpoint)
        started = session(4)
        started.__enter__()
    try:
        yield
    finally:
        started.__exit__(None, None, None)


def _wait_until_listening(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server ended with code {server.returncode}")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not listen on port {port} within 30 s")
