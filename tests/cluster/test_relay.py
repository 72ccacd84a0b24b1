"""What workers say reaches the driver in order, and its wish to stop reaches them."""

import pickle
import threading
import time
from typing import Any

import pytest
from ray.exceptions import RpcError

from cluster import relay as module
from cluster.relay import Relay


@pytest.mark.ray
def test_records_one_way_and_the_wish_to_stop_the_other(ray_session: None) -> None:
    relay = Relay()
    worker = pickle.loads(pickle.dumps(relay))  # noqa: S301 - as it travels to a worker
    assert not worker.stopping()
    for number in range(3):
        worker.push({"number": number})
    deadline = time.monotonic() + 60
    records: list[dict] = []
    while len(records) < 3 and time.monotonic() < deadline:
        records += relay.pull()
    assert [record["number"] for record in records] == [0, 1, 2]
    relay.stop()
    while not worker.stopping():
        assert time.monotonic() < deadline, "the wish to stop does not arrive"
        time.sleep(0.01)


def test_one_failed_question_does_not_cost_the_wish_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers:
        """An actor whose first answer is lost."""

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

    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(module.ray, "get", get)
    relay = Relay.__new__(Relay)
    relay.__dict__ |= {"_actor": Answers(), "_watching": None, "_stopping": False}
    relay.stopping()
    thread = relay._watching
    assert isinstance(thread, threading.Thread)
    thread.join(60)
    assert relay.stopping()
