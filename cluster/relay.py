"""A small actor between the driver and its workers: records flow to the driver, the stop flag flows to the workers."""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from cluster.session import on_this_node

POLL_SECONDS = 0.5  # between two reads of the stop flag

log = logging.getLogger(__name__)


@ray.remote
class _Relay:
    def __init__(self, capacity: int) -> None:
        self._records: deque[dict[str, Any]] = deque(maxlen=capacity)  # the oldest is dropped if the driver is slow
        self._stop = False

    def push(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
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

    def __init__(self, capacity: int = 10_000) -> None:
        # Ray would keep a record of each call, and these add up over the days of a training.
        self._name = f"relay-{uuid.uuid4().hex}"
        options = {**on_this_node(), "enable_task_events": False, "name": self._name}
        self._actor = _Relay.options(**options).remote(capacity)  # type: ignore[attr-defined]
        self._thread: threading.Thread | None = None
        self._stopping = False

    def push(self, record: dict[str, Any]) -> None:
        """Send a record to the driver without waiting for it."""
        self._actor.push.remote(record)

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
        """Return the records since the last call, oldest first. With `stop`, ask the workers to stop from now on."""
        return ray.get(self._actor.exchange.remote(stop))

    def stopping(self) -> bool:
        """Return whether the driver has asked to stop. A thread reads the flag, so this call never waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._poll, name="relay", daemon=True)
            self._thread.start()
        return self._stopping

    def _poll(self) -> None:
        while not self._stopping:
            try:
                self._stopping = ray.get(self._actor.stopping.remote())
            except ActorDiedError:  # the driver has ended, and Ray is about to end this process
                return
            except RayError as error:  # a failed call must not lose the stop flag
                log.debug("the driver's relay did not respond, trying again: %s", error)
            time.sleep(POLL_SECONDS)

    def __reduce__(self) -> tuple[Callable[[str], "Relay"], tuple[str]]:
        return _find, (self._name,)


def _find(name: str) -> Relay:
    """Return the relay of this job with this name; ValueError if the driver has ended."""
    relay = Relay.__new__(Relay)
    relay._name, relay._actor, relay._thread, relay._stopping = name, ray.get_actor(name), None, False
    return relay
