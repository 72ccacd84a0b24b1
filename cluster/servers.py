"""Servers on this machine's loopback address, for the quickstart, the local cluster and the tests."""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of `host`, an address of this machine, on which nothing listens at this moment."""
    with socket.socket() as server:
        server.bind((host, 0))
        return int(server.getsockname()[1])


def is_listening(port: int) -> bool:
    """Return whether something takes connections on this port of the loopback address."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(port: int, server: subprocess.Popen, seconds: float = 30) -> None:
    """Return once the server takes connections.

    Raises:
        RuntimeError: its process has ended, or it takes longer than `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not is_listening(port):
        if server.poll() is not None:
            raise RuntimeError(f"{server.args!r} ended with code {server.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{server.args!r} did not listen on port {port} within {seconds:g} s")
        time.sleep(0.05)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start an S3 server and yield its endpoint; it ends with the context and forgets everything.

    Raises:
        RuntimeError: the package moto is not installed, or the server did not start.
    """
    if importlib.util.find_spec("moto") is None:
        raise RuntimeError("the local S3 server needs the package moto: `make setup` installs it")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=10)
