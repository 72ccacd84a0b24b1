"""An actor between the driver and its workers, which passes records to the driver and the stop flag to the workers."""

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
Report = Callable[[Any, int], None]  # takes an item of a pool and the number of its units that are done

log = logging.getLogger(__name__)


class _RelayActor:
    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=10_000)  # the oldest is dropped if the driver is slow
        self._stop = False

    def push(self, record: Record) -> None:
        self._records.append(record)

    def exchange(self, stop: bool) -> list[Record]:
        self._stop |= stop
        records = list(self._records)
        self._records.clear()
        return records

    def stopping(self) -> bool:
        return self._stop


class Relay:
    """A handle on one relay actor, for the driver and for the workers to which it is sent.

    It is pickled as the actor's name, because Ray warns of every actor that may restart and whose arguments contain an
    actor handle.
    """

    def __init__(self, name: str = "") -> None:
        """Find the relay of this name, or without a name start a new one.

        Raises:
            ValueError: there is no relay of this name, because its driver has ended.
        """
        import ray

        self._name = name or f"relay-{uuid.uuid4().hex}"
        self._thread: threading.Thread | None = None
        self._stopping = False
        if name:
            self._actor: Any = ray.get_actor(name)
        else:
            # Without task events, because Ray's records of calls would accumulate over the days of a training.
            options = {**on_this_node(), "enable_task_events": False, "name": self._name}
            self._actor = ray.remote(_RelayActor).options(**options).remote()

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
        """Return whether the driver has asked to stop. A thread polls the flag, so this call never waits."""
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


def warn_on_error(on_record: Callable[[Record], None]) -> Callable[[Record], None]:
    """Return a function that calls `on_record` and turns its errors into warnings.

    A record that cannot be handled must not end the job.
    """

    def handle(record: Record) -> None:
        try:
            on_record(record)
        except Exception as error:  # noqa: BLE001 - see above
            reason = f"{type(error).__name__}: {error}"
            log.warning("a record of a worker could not be handled, the job continues: %s", reason)

    return handle


@contextlib.contextmanager
def relay_records(
    relay: Relay, on_record: Callable[[Record], None], stop: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Pass the workers' records to `on_record` in a thread, and ask the workers to stop once `stop` returns True.

    Errors of `on_record` are logged. If a call to the relay fails, its error is logged once, and the call is repeated.
    When the context ends, the remaining records are passed on.
    """
    ended = threading.Event()
    logged_errors: set[str] = set()
    handle = warn_on_error(on_record)

    def exchange() -> None:
        try:
            records = relay.exchange(stop())
        except Exception as error:  # noqa: BLE001 - the next exchange may succeed
            if str(error) not in logged_errors:
                log.warning("the workers' records cannot be fetched, trying again; the job continues: %s", error)
                logged_errors.add(str(error))
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
    """Do nothing: a `Report` for callers that show no progress."""


@contextlib.contextmanager
def item_progress(on_progress: Report, num_workers: int) -> Iterator[Report]:
    """Yield a function for workers to report the progress of their items; `on_progress` receives the reports here.

    The function can be sent to workers and never waits. A thread of this process passes on all reports twice a second.
    With `num_workers=0` the function is `on_progress` itself.
    """
    if num_workers == 0:
        yield on_progress
        return
    relay = Relay()
    with relay_records(relay, lambda record: on_progress(record["item"], record["done"])):
        yield lambda item, done: relay.push({"item": item, "done": done})
