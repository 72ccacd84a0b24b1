"""Progress within the items of a pool: workers report how far an item is, and the driver receives it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from cluster.relay import Relay, relayed

Report = Callable[[Any, int], None]  # takes an item and how much of it is done


def no_report(item: Any, done: int) -> None:
    """Ignore a report."""


@contextlib.contextmanager
def item_progress(on_progress: Report, num_workers: int) -> Iterator[Report]:
    """Yield the function by which workers report how far their items are; the driver calls `on_progress` with it.

    The function can be sent to workers and never waits. A thread of this process calls `on_progress` twice a second.
    With `num_workers=0` the function is `on_progress` itself.
    """
    if num_workers == 0:
        yield on_progress
        return
    relay = Relay()
    with relayed(relay, lambda record: on_progress(record["item"], record["done"])):
        yield lambda item, done: relay.push({"item": item, "done": done})
