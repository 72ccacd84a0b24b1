"""Records reach the driver in order, and its stop flag reaches the workers."""

import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RpcError

from cluster import relay as module
from cluster.relay import Relay, Report, item_progress
from cluster.workers import map_items

STEPS = 4


@pytest.mark.ray
def test_records_reach_the_driver_and_the_stop_flag_reaches_the_workers(ray_session: None) -> None:
    relay = Relay()
    worker = pickle.loads(pickle.dumps(relay))  # noqa: S301 - as it is sent to a worker
    assert not worker.stopping()
    for number in range(3):
        worker.push({"number": number})
    deadline = time.monotonic() + 60
    records: list[dict] = []
    while len(records) < 3 and time.monotonic() < deadline:
        records += relay.exchange(stop=False)
    assert [record["number"] for record in records] == [0, 1, 2]
    relay.exchange(stop=True)
    relay.exchange(stop=False)
    while not worker.stopping():
        assert time.monotonic() < deadline, "the stop flag does not arrive"
        time.sleep(0.01)


def test_a_failed_call_does_not_lose_the_stop_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    class LossyActor:
        """An actor whose first response is lost."""

        calls = 0

        @property
        def stopping(self) -> Any:
            return self

        def remote(self) -> int:
            self.calls += 1
            return self.calls

    def get(number: int) -> bool:
        if number == 1:
            raise RpcError("connection reset")
        return True

    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr("ray.get", get)
    relay = Relay.__new__(Relay)
    relay.__dict__ |= {"_actor": LossyActor(), "_thread": None, "_stopping": False}
    relay.stopping()
    thread = relay._thread
    assert isinstance(thread, threading.Thread)
    thread.join(60)
    assert relay.stopping()


def make_worker(report: Report) -> Callable[[int], int]:
    def work(item: int) -> int:
        for step in range(1, STEPS + 1):
            report(item, step)
            time.sleep(0.3)
        return item

    return work


@pytest.mark.ray
def test_reports_arrive_while_the_item_is_in_work(
    ray_session: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray also prints no warning about a handle in the arguments of a worker that may restart."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    reports: list[tuple[int, int]] = []
    with item_progress(lambda item, done: reports.append((item, done)), 1) as report:
        results = map_items(lambda: make_worker(report), [7], 1)
        assert list(results) == [(7, 7)]
        assert (7, 1) in reports and (7, STEPS - 1) in reports
    assert "constructor arguments" not in capfd.readouterr().err


def test_without_workers_the_driver_is_called_directly() -> None:
    threads: list[threading.Thread] = []
    with item_progress(lambda item, done: threads.append(threading.current_thread()), 0) as report:
        report("item", 1)
    assert threads == [threading.current_thread()]
