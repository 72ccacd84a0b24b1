"""One progress line: done, total, rate, time left."""

import contextlib
import sys
import threading
from collections.abc import Hashable, Iterator
from typing import Any

from tqdm import tqdm


def counted(count: float, noun: str) -> str:
    """Return a count with its noun in the singular or the plural: 1 worker, 2 workers."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,g} {noun}{plural}" if isinstance(count, float) else f"{count:,} {noun}{plural}"


class _Terminal:
    """Standard error without errors of writes: after one, tqdm keeps its lock, and its next call waits for ever."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal or the reader of the pipe is gone
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class Progress:
    """The handle on a progress line. Several threads may use it."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self._parts: dict[Hashable, int] = {}  # units done of each item
        self._finished: set[Hashable] = set()

    @property
    def done(self) -> int:
        """Return the number of units that are done."""
        return int(self._bar.n)

    def start(self, done: int, description: str = "") -> None:
        """Start or restart the line at `done` units; time and rate count from now on."""
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.start_t = self._bar.last_print_t = self._bar._time()
        self._bar.set_description(description or None)

    def update_to(self, done: int, **numbers: float) -> None:
        """Show that `done` units are done, and numbers beside it."""
        if numbers:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def update_item(self, item: Hashable, done: int) -> None:
        """Show that `done` units of an item are done.

        Calls that come late are ignored: those for a finished item, and those with less than an earlier call, as when
        a second worker starts the item again.
        """
        with self._lock:
            if item not in self._finished and done > (before := self._parts.get(item, 0)):
                self._parts[item] = done
                self._bar.update(done - before)

    def finish_item(self, item: Hashable, count: int, in_rate: bool = True) -> None:
        """Show that an item of `count` units is finished.

        in_rate: False for an item that was finished before this job started, so that the rate does not count it.
        """
        with self._lock:
            self._finished.add(item)
            count -= self._parts.pop(item, 0)
            if not in_rate:
                self._bar.initial += count
                self._bar.last_print_n += count
            self._bar.update(count)


@contextlib.contextmanager
def progress_line(total: int, unit: str, description: str = "") -> Iterator[Progress]:
    """Show a progress line on stderr until the end of the context; if stderr is no terminal, every 30 seconds only."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(
        total=total,
        file=_Terminal(),
        unit=f" {unit}",
        desc=description or None,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
        smoothing=0,  # the mean rate since the start
        unit_scale=False,
    ) as bar:
        yield Progress(bar)
