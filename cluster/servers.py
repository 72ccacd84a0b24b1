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
    """Return a TCP port of `host`, an address of this machine, on which nothing listens at this moment."""
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
    """Start a server in a session of its own, and return its process once `is_ready` returns True.

    log: the file for what the server prints; None discards it. environment: None means that of this process.

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
                last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:]) if log else "not kept"
                raise RuntimeError(f"{' '.join(command)} {state}; the last lines of its log: {last}")
            time.sleep(0.1)
    except BaseException:
        end_processes([server])
        raise
    return server


def end_processes(processes: Sequence[psutil.Process], seconds: float = 20.0) -> None:
    """Send SIGTERM to the processes, and after `seconds` kill those that remain, with their descendants."""
    family = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
            process.terminate()
    _, left = psutil.wait_procs(family, timeout=seconds)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=seconds)


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
