"""Actors without Ray: their work is a time that passes. For tests and simulations of the pool's scheduling."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Clock:
    """Completes futures at their moments, all from one thread."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Future, Any]] = []
        self._count, self._changed, self._ended = itertools.count(), threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def after(self, seconds: float, outcome: Any) -> Future:
        """A future that has `outcome`, or raises it, in so many seconds; never where they are infinite."""
        future: Future = Future()
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._count), future, outcome))
            self._changed.notify()
        return future

    def end(self) -> None:
        """Stop; what is not due yet never will be."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ended and (not self._due or self._due[0][0] > time.monotonic()):
                    wait = self._due[0][0] - time.monotonic() if self._due else None
                    self._changed.wait(None if wait == float("inf") else wait)
                if self._ended:
                    return
                _, _, future, outcome = heapq.heappop(self._due)
            if future.done():  # its actor was killed meanwhile
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


class _Call:
    """What a call of an actor's method is: `.remote()`, and a reference that becomes a future."""

    def __init__(self, begin: Callable[..., Future]) -> None:
        self._begin = begin

    def remote(self, *arguments: Any) -> Any:
        future = self._begin(*arguments)

        class Reference:
            def future(self) -> Future:
                return future

        return Reference()


class TimedActor:
    """Returns each item itself after `seconds(item)`, and is ready after `start` seconds.

    `outcome(item)` may return an exception instead of the item, and `ready` may be one that it dies of, or a function
    that returns one or None. Like a real one, it dies at the deadline of an item. `kill` ends its process.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: Callable[[Any], float],
        start: float = 0.0,
        outcome: Callable[[Any], Any] = lambda item: item,
        ready: Exception | Callable[[], Exception | None] | None = None,
        node: str = "node",
    ) -> None:
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        self.worked: list[Any] = []
        self.kills = 0
        self.node_name = _Call(lambda: clock.after(start, node))
        self.ready = _Call(lambda deadline: clock.after(0.0, ready() if callable(ready) else ready))

        self._running: Future | None = None

        def work(item: Any, deadline: float) -> Future:
            self.worked.append(item)
            took = seconds(item)
            if took > deadline:
                return clock.after(deadline, ActorDiedError())
            self._running = clock.after(took, outcome(item))
            return self._running

        def kill() -> None:
            self.kills += 1
            if self._running is not None and not self._running.done():
                self._running.set_exception(ActorUnavailableError("killed", b""))

        self.work, self.kill = _Call(work), kill
