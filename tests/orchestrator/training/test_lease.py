"""Test that one driver trains a run, and that a dead driver is not waited for longer than needed."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.trainer import WorkerContext
from orchestrator import storage
from orchestrator.training import job, lease
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from orchestrator.training.lease import Lease
from tests.orchestrator.training.runs import adm


def write_holder(run: Path, number: int = 1, **changes: Any) -> Path:
    """Write the lease of another driver, by default on another machine, and return its path."""
    holder = {"host": "node7", "pid": 4242, "machine": "elsewhere", "process": "1", "held_seconds": 77.0} | changes
    path = run / f"lease/{number:06d}.json"
    storage.write_json(str(path), holder)
    return path


@pytest.fixture(autouse=True)
def never_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test hang instead of passing if it waits until a lease expires."""
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1e9)


def test_a_second_driver_is_refused_with_the_holders_host_pid_and_age(tmp_path: Path) -> None:
    with Lease(str(tmp_path)) as first:
        with pytest.raises(
            RuntimeError, match=rf"by pid {os.getpid()} on \S+, .*held the lease for at least \d+ s.*--takeover"
        ):
            Lease(str(tmp_path)).__enter__()
        assert not first.is_lost()
    with Lease(str(tmp_path)):
        pass
    assert not storage.list_names(str(tmp_path / "lease")), "it is released"


def test_a_holder_on_another_machine_lives_if_its_object_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    machines = threading.local()
    monkeypatch.setattr(lease, "_machine_id", lambda: getattr(machines, "name", "elsewhere"))
    with Lease(str(tmp_path)):
        machines.name = "here"  # only in this thread; the holder's own thread stays on the machine "elsewhere"
        with pytest.raises(RuntimeError, match=rf"by pid {os.getpid()} "):
            Lease(str(tmp_path)).__enter__()


def test_a_lease_that_nobody_renews_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.001)
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.01)
    write_holder(tmp_path)
    with Lease(str(tmp_path)):
        assert storage.list_names(str(tmp_path / "lease")) == ["000002.json"]


def test_a_lease_that_is_released_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_holder(tmp_path)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: path.unlink())
    with Lease(str(tmp_path)):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_on_this_machine_is_not_waited_for(tmp_path: Path, reaped: bool) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    write_holder(tmp_path, machine=lease._machine_id(), pid=child.pid, process=lease._process_start(child.pid))
    with pytest.raises(RuntimeError, match=f"by pid {child.pid} on node7"):
        Lease(str(tmp_path)).__enter__()
    child.kill()
    if reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    with Lease(str(tmp_path)):
        pass
    child.wait()


def test_a_pid_that_was_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    write_holder(tmp_path, machine=lease._machine_id(), pid=os.getpid(), process="1")
    with Lease(str(tmp_path)):
        pass


def test_a_takeover_stops_the_other_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    with Lease(str(tmp_path)) as first, Lease(str(tmp_path), takeover=True) as second:
        assert first._lost.wait(60) and not second.is_lost()
    assert not storage.list_names(str(tmp_path / "lease"))


def test_a_renewal_that_fails_does_not_prevent_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    real, calls, renewed = storage.write_bytes, iter(range(10**9)), threading.Event()

    def write_bytes(uri: str, data: bytes) -> None:
        if next(calls) == 0:
            raise OSError("storage is away")
        real(uri, data)
        renewed.set()

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    with Lease(str(tmp_path)) as own_lease:
        assert renewed.wait(60) and not own_lease.is_lost()


def test_a_driver_that_may_not_delete_releases_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str) -> None:
        raise PermissionError(uri)

    monkeypatch.setattr(storage, "delete", refuse)
    for _ in range(3):
        with Lease(str(tmp_path)):
            pass


# ------------------------------------------------------------------------------------------------ in a training


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Replace the training loop: it sends its driver SIGTERM or loses the lease. Yield an entry for each stop."""
    stopped: list[bool] = []

    def loop(config: AdmConfig, context: WorkerContext) -> None:
        if config.takeover:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            write_holder(Path(config.path(config.output)), number=7)
        while not context.stopping():
            threading.Event().wait(0.01)
        stopped.append(True)

    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    monkeypatch.setattr(job, "train_loop", loop)
    yield stopped


def test_a_second_training_of_a_run_is_refused_or_takes_over(store: str) -> None:
    config = adm(store, "twice", total_images=16)
    with Lease(config.path("twice")) as other_lease:
        with pytest.raises(RuntimeError, match=f"by pid {os.getpid()} on"):
            train(config)
        other_lease._released.set()  # as if its driver had stopped meanwhile
        train(config.model_copy(update={"takeover": True}))
    assert train(config), "finished runs need no lease"


def test_sigterm_releases_the_lease(store: str, stops: list[bool]) -> None:
    config = adm(store, "stopped", takeover=True)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert stops and not storage.list_names(storage.join(config.path("stopped"), "lease"))


def test_a_training_that_lost_its_lease_stops(store: str, stops: list[bool]) -> None:
    config = adm(store, "lost")
    with pytest.raises(RuntimeError, match="another driver took over"):
        train(config)
    (remaining,) = Path(config.path("lost"), "lease").iterdir()
    assert stops and remaining.name == "000007.json" and storage.read_json(str(remaining))["host"] == "node7"
