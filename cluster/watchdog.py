"""A watchdog that writes the stacks of a hung worker before the timeout of collectives ends the attempt."""

import faulthandler
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Self

HANG_SECONDS = 240.0  # without a step; less than the timeout of collectives, which is 300 s


class Watchdog:
    """Write the stacks of all threads if `step` is not called within `seconds`.

    A thread reports them to the driver as a record. faulthandler also writes them to stderr, because a thread that
    hangs in C code may hold Python's global interpreter lock.
    """

    def __init__(self, rank: int, report: Callable[[dict[str, Any]], None], seconds: float = HANG_SECONDS) -> None:
        self._rank, self._report, self._seconds = rank, report, seconds
        self._ended, self._steps = threading.Event(), 0

    def __enter__(self) -> Self:
        self.step()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """Note that a step begins."""
        self._steps += 1
        faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or sys.stderr)

    def _watch(self) -> None:
        steps_before = 0
        while not self._ended.wait(self._seconds):
            if self._steps == steps_before:
                self._report({"rank": self._rank, "stacks": _stacks()})
            steps_before = self._steps


def _stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}"
        for number, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
