"""A small actor between the driver and its workers: numbers and pictures one way, the wish to stop the other."""

from collections import deque
from typing import Any

import ray

from cluster.session import beside_driver


@ray.remote
class _Relay:
    def __init__(self, capacity: int) -> None:
        self.records: deque[dict[str, Any]] = deque(maxlen=capacity)
        self.stop_wanted = False

    def push(self, record: dict[str, Any]) -> bool:
        """Keep a record (the oldest goes when nobody reads); answers whether the driver wants to stop."""
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
        self._actor = _Relay.options(**beside_driver()).remote(capacity)  # type: ignore[attr-defined]
        self._pending: Any = None
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
        """Whether the driver asked to stop, as of a moment ago: asks ahead and never waits."""
        if self._pending is None:
            self._pending = self._actor.stopping.remote()
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready:
            self._stopping = ray.get(ready[0])
            self._pending = self._actor.stopping.remote()
        return self._stopping

    def __getstate__(self) -> dict[str, Any]:
        return {"_actor": self._actor, "_pending": None, "_stopping": False}
