"""Servers on this machine's loopback address, for the quickstart, the local cluster and the tests."""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port on which nothing listens at this moment. `host` is an address of this machine."""
    with socket.socket() as server:
        server.bind((host, 0))
        return int(server.getsockname()[1])


def is_listening(port: int) -> bool:
    """Return whether a server accepts connections on this port of the loopback address."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def start_server(
    command: Sequence[str],
    is_ready: Callable[[], bool],
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120.0,
) -> psutil.Popen:
    """Start a server in its own process session, and return its process once `is_ready` returns True.

    log: the file for the server's output; None discards it. environment: None means that of this process.

    Raises:
        RuntimeError: the server ended, or was not ready within `seconds`; the message has the last lines of its log.
    """
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else subprocess.DEVNULL
        server = psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",  # so that it imports nothing from the checkout
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + seconds
        while not is_ready():
            if server.poll() is not None or time.monotonic() > deadline:
                state = f"was not ready within {seconds:g} s" if server.poll() is None else "ended"
                lines = log.read_text(errors="replace").strip().splitlines() if log else ["not kept"]
                raise RuntimeError(f"{' '.join(command)} {state}; the last lines of its log: {' | '.join(lines[-5:])}")
            time.sleep(0.1)
    except BaseException:
        end_processes([server])
        raise
    return server


def end_processes(processes: Sequence[psutil.Process], seconds: float = 20.0) -> None:
    """Send SIGTERM to the processes; kill them and their descendants if they still run after `seconds`."""
    with_descendants = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            with_descendants += process.children(recursive=True)
            process.terminate()
    _, running = psutil.wait_procs(with_descendants, timeout=seconds)
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(running, timeout=seconds)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start an S3 server and yield its endpoint. The server and its data are gone when the context ends.

    Raises:
        RuntimeError: the package moto is not installed, or the server did not start.
    """
    if importlib.util.find_spec("moto") is None:
        raise RuntimeError("the local S3 server needs the package moto: `make setup` installs it")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = start_server(command, partial(is_listening, port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end_processes([server])
