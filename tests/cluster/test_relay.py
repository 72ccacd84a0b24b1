"""What workers say reaches the driver in order, and its wish to stop reaches them."""

import pickle
import time

import pytest

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
