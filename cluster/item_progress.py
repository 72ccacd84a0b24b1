"""Progress within the items of a pool: workers report how far an item is, and the driver receives it."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

REPORT_SECONDS = 0.5  # between two reports of a process, and between two reads by the driver

Report = Callable[[Any, int], None]  # takes an item and how much of it is done

log = logging.getLogger(__name__)


def no_report(item: Any, done: int) -> None:
    """Ignore a report."""


@contextlib.contextmanager
def item_progress(on_progress: Report, num_workers: int) -> Iterator[Report]:
    """Yield the function by which workers report how far their items are; the driver calls `on_progress` with it.

    The function can be sent to workers and never waits. A process sends at most two reports a second and leaves out
    the others, so reports are good for a progress line only. A thread of this process calls `on_progress`. With
    `num_workers=0` the function is `on_progress` itself.
    """
    if num_workers == 0:
        yield on_progress
        return
    from cluster.relay import Relay

    relay, ended = Relay(), threading.Event()

    def pump() -> None:
        while not ended.wait(REPORT_SECONDS):
            try:
                for record in relay.exchange(stop=False):
                    on_progress(record["item"], record["done"])
            except Exception as error:  # noqa: BLE001 - only the progress line is affected
                log.debug("the progress of the workers could not be read, trying again: %s", error)

    thread = threading.Thread(target=pump, name="progress", daemon=True)
    thread.start()
    try:
        yield _Reporter(relay)
    finally:
        ended.set()
        thread.join()


class _Reporter:
    def __init__(self, relay: Any) -> None:
        self._relay, self._last = relay, float("-inf")

    def __call__(self, item: Any, done: int) -> None:
        if time.monotonic() - self._last > REPORT_SECONDS:
            self._last = time.monotonic()
            self._relay.push({"item": item, "done": done})
