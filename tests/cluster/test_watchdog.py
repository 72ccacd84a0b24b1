"""A worker that is stalled reports its stacks."""

import threading
from typing import Any

from cluster.watchdog import Watchdog


def test_the_stacks_of_a_hang_are_reported() -> None:
    reported, received = [], threading.Event()

    def report(record: dict[str, Any]) -> None:
        reported.append(record)
        received.set()

    def hang_in_a_collective() -> None:
        assert received.wait(60)

    with Watchdog(rank=3, report=report, seconds=0.05):
        hang_in_a_collective()
    assert reported[0]["rank"] == 3
    assert "in hang_in_a_collective" in reported[0]["stacks"] and "thread MainThread" in reported[0]["stacks"]


def test_a_worker_that_makes_steps_reports_nothing() -> None:
    reported: list[dict[str, Any]] = []
    with Watchdog(rank=0, report=reported.append, seconds=60) as watchdog:
        for _ in range(100):
            watchdog.step()
    assert not reported
