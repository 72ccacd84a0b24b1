"""Actors without Ray, whose work is to wait. They serve tests and simulations of the pool's scheduling."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Clock:
    """Completes futures when they are due, all from one thread."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Future, Any]] = []
        self._count = itertools.count()  # orders futures that are due at the same moment
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def after(self, seconds: float, outcome: Any) -> Future:
        """Return a future that has or raises `outcome` after `seconds`, or never if they are infinite."""
        future: Future = Future()
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._count), future, outcome))
            self._changed.notify()
        return future

    def end(self) -> None:
        """Stop the thread. Futures that are not due yet are never completed."""
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
    """A method of an actor: `.remote()` returns a reference, whose `future()` is the call's future."""

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

    `outcome(item)` may return an exception, which the call then raises. `ready` is None, or an exception that is
    raised instead of becoming ready, or a function that returns either. Like a real actor, it dies at the deadline of
    an item. `kill` ends its process.
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
            duration = seconds(item)
            if duration > deadline:
                return clock.after(deadline, ActorDiedError())
            self._running = clock.after(duration, outcome(item))
            return self._running

        def kill() -> None:
            self.kills += 1
            if self._running is not None and not self._running.done():
                self._running.set_exception(ActorUnavailableError("killed", b""))

        self.work, self.kill = _Call(work), kill
