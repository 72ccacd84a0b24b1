"""A small actor between the driver and its workers: records flow to the driver, the stop flag flows to the workers."""

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from cluster.session import on_this_node

POLL_SECONDS = 0.5  # between two exchanges by the driver, and between two reads of the stop flag by a worker

Record = dict[str, Any]
Report = Callable[[Any, int], None]  # takes an item of a pool and how much of it is done

log = logging.getLogger(__name__)


class _Relay:
    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=10_000)  # the oldest is dropped if the driver is slow
        self._stop = False

    def push(self, record: Record) -> None:
        self._records.append(record)

    def exchange(self, stop: bool) -> list[Record]:
        self._stop |= stop
        taken = list(self._records)
        self._records.clear()
        return taken

    def stopping(self) -> bool:
        return self._stop


class Relay:
    """A handle on one relay for the driver and, after it was sent there, for the workers.

    It is sent as a name: Ray prints a warning about every actor that may restart and whose arguments contain a handle.
    """

    def __init__(self, name: str = "") -> None:
        """Find the relay of this name, or start a new one. Raise ValueError if the driver of the relay has ended."""
        import ray

        self._name = name or f"relay-{uuid.uuid4().hex}"
        self._thread: threading.Thread | None = None
        self._stopping = False
        if name:
            self._actor: Any = ray.get_actor(name)
        else:  # without task events, because Ray's records of calls would add up over the days of a training
            options = {**on_this_node(), "enable_task_events": False, "name": self._name}
            self._actor = ray.remote(_Relay).options(**options).remote()

    def __reduce__(self) -> tuple[type["Relay"], tuple[str]]:
        return Relay, (self._name,)

    def push(self, record: Record) -> None:
        """Send a record to the driver without waiting for it."""
        self._actor.push.remote(record)

    def exchange(self, stop: bool) -> list[Record]:
        """Return the records since the last call, oldest first. With `stop`, ask the workers to stop from now on."""
        import ray

        return ray.get(self._actor.exchange.remote(stop))

    def stopping(self) -> bool:
        """Return whether the driver has asked to stop. A thread reads the flag, so this call never waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll, name="relay", daemon=True)
            self._thread.start()
        return self._stopping

    def _poll(self) -> None:
        import ray
        from ray.exceptions import ActorDiedError, RayError

        while not self._stopping:
            try:
                self._stopping = ray.get(self._actor.stopping.remote())
            except ActorDiedError:  # the driver has ended, and Ray is about to end this process
                return
            except RayError as error:  # a failed call must not lose the stop flag
                log.debug("the driver's relay did not respond, trying again: %s", error)
            time.sleep(POLL_SECONDS)


def tolerant(on_record: Callable[[Record], None]) -> Callable[[Record], None]:
    """Return `on_record` with a warning in place of an error, because a failed record must not end the job."""

    def call(record: Record) -> None:
        try:
            on_record(record)
        except Exception as error:  # noqa: BLE001 - see above
            reason = f"{type(error).__name__}: {error}"
            log.warning("a record of a worker could not be handled, the job continues: %s", reason)

    return call


@contextlib.contextmanager
def relayed(
    relay: Relay, on_record: Callable[[Record], None], stop: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Pass the workers' records to `on_record` in a thread, and ask the workers to stop once `stop` returns True.

    Errors of `on_record` are logged. If a call to the relay fails, a warning is logged once and the call is repeated.
    When the context ends, the remaining records are passed on.
    """
    ended, warned, handle = threading.Event(), set[str](), tolerant(on_record)

    def exchange() -> None:
        try:
            records = relay.exchange(stop())
        except Exception as error:  # noqa: BLE001 - see above
            if str(error) not in warned:
                log.warning("the workers' records cannot be fetched, trying again; the job continues: %s", error)
                warned.add(str(error))
            return
        for record in records:
            handle(record)

    def run() -> None:
        while not ended.wait(POLL_SECONDS):
            exchange()

    thread = threading.Thread(target=run, name="records", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        exchange()


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
