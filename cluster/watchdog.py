"""Where a worker hangs: its stacks, before the collective's timeout ends the attempt."""

import faulthandler
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Self

HANG_SECONDS = 240.0  # without a step; collectives time out after 300


class Watchdog:
    """Wants to hear of every step. Where it hears of none for too long it hands over the stacks of all threads.

    They go to the driver as a record, and to stderr by a thread that Python's own lock cannot hold up.
    """

    def __init__(self, rank: int, report: Callable[[dict[str, Any]], None], seconds: float = HANG_SECONDS) -> None:
        self._rank, self._report, self._seconds = rank, report, seconds
        self._over, self._steps = threading.Event(), 0

    def __enter__(self) -> Self:
        self.step()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """A step begins."""
        self._steps += 1
        faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or sys.stderr)

    def _watch(self) -> None:
        seen = 0
        while not self._over.wait(self._seconds):
            if self._steps == seen:
                self._report({"rank": self._rank, "stacks": _stacks()})
            seen = self._steps


def _stacks() -> str:
    """The stack of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
