"""A small actor between the driver and its workers: numbers and pictures one way, the wish to stop the other."""

import logging
import threading
import time
from collections import deque
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from cluster.session import on_this_node

LOOK_SECONDS = 0.5  # between two questions whether to stop

log = logging.getLogger(__name__)


@ray.remote
class _Relay:
    def __init__(self, capacity: int) -> None:
        self.records: deque[dict[str, Any]] = deque(maxlen=capacity)
        self.stop_wanted = False

    def push(self, record: dict[str, Any]) -> bool:
        """Keep a record (the oldest goes when nobody reads); return whether the driver wants to stop."""
        self.records.append(record)
        return self.stop_wanted

    def pull(self) -> list[dict[str, Any]]:
        taken = list(self.records)
        self.records.clear()
        return taken

    def stop(self) -> None:
        self.stop_wanted = True

    def stopping(self) -> bool:
        return self.stop_wanted


class Relay:
    """The driver's and the workers' handle on one relay; it can be sent to a worker."""

    def __init__(self, capacity: int = 10_000) -> None:
        # Ray would keep a record of each call, which adds up over the days of a training.
        options = {**on_this_node(), "enable_task_events": False}
        self._actor = _Relay.options(**options).remote(capacity)  # type: ignore[attr-defined]
        self._watching: threading.Thread | None = None
        self._stopping = False

    def push(self, record: dict[str, Any]) -> None:
        """Hand a record to the driver, without waiting for it."""
        self._actor.push.remote(record)

    def pull(self) -> list[dict[str, Any]]:
        """The records since the last call, oldest first."""
        return ray.get(self._actor.pull.remote())

    def stop(self) -> None:
        """Ask the workers to stop at their next step."""
        ray.get(self._actor.stop.remote())

    def stopping(self) -> bool:
        """Whether the driver asked to stop, as of a moment ago. A thread asks, so that no step pays for it."""
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, name="relay", daemon=True)
            self._watching.start()
        return self._stopping

    def _watch(self) -> None:
        while not self._stopping:
            try:
                self._stopping = ray.get(self._actor.stopping.remote())
            except ActorDiedError:  # the driver is gone, and so is this process in a moment
                return
            except RayError as error:  # one failed call must not cost the wish to stop
                log.debug("the driver's relay did not answer, asking again: %s", error)
            time.sleep(LOOK_SECONDS)

    def __getstate__(self) -> dict[str, Any]:
        return {"_actor": self._actor, "_watching": None, "_stopping": False}
