"""Test that the driver learns how far an item is before the item is done."""

import threading
import time
from collections.abc import Callable

import pytest

from cluster import relay
from cluster.item_progress import Report, item_progress
from cluster.workers import map_items

STEPS = 4


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
    """Test it, and that Ray prints no warning about a handle in the arguments of a worker that may restart."""
    monkeypatch.setattr(relay, "POLL_SECONDS", 0.05)
    seen: list[tuple[int, int]] = []
    with item_progress(lambda item, done: seen.append((item, done)), 1) as report:
        results = map_items(lambda: make_worker(report), [7], 1)
        assert list(results) == [(7, 7)]
        assert (7, 1) in seen and (7, STEPS - 1) in seen
    assert "constructor arguments" not in capfd.readouterr().err


def test_without_workers_the_driver_is_called_directly() -> None:
    seen: list[threading.Thread] = []
    with item_progress(lambda item, done: seen.append(threading.current_thread()), 0) as report:
        report("item", 1)
    assert seen == [threading.current_thread()]
