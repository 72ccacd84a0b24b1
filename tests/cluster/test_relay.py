"""Records reach the driver in order, and its stop flag reaches the workers."""

import pickle
import threading
import time
from typing import Any

import pytest
from ray.exceptions import RpcError

from cluster import relay as module
from cluster.relay import Relay


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
    class Answers:
        """An actor whose first response is lost."""

        asked = 0

        @property
        def stopping(self) -> Any:
            return self

        def remote(self) -> int:
            self.asked += 1
            return self.asked

    def get(number: int) -> bool:
        if number == 1:
            raise RpcError("connection reset")
        return True

    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr("ray.get", get)
    relay = Relay.__new__(Relay)
    relay.__dict__ |= {"_actor": Answers(), "_thread": None, "_stopping": False}
    relay.stopping()
    thread = relay._thread
    assert isinstance(thread, threading.Thread)
    thread.join(60)
    assert relay.stopping()
