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
    """Standard error whose writes never raise. After an error, tqdm would keep its lock and hang in its next call."""

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
        self._done_of: dict[Hashable, int] = {}  # units that are done of each unfinished item
        self._finished: set[Hashable] = set()

    @property
    def done(self) -> int:
        """Return the number of units that are done."""
        return int(self._bar.n)

    def start(self, done: int, description: str = "") -> None:
        """Start or restart the line at `done` units. Time and rate are measured from now on."""
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.start_t = self._bar.last_print_t = self._bar._time()
        self._bar.set_description(description or None)

    def update_to(self, done: int, **numbers: float) -> None:
        """Show that `done` units are done, with `numbers` behind them."""
        if numbers:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def update_item(self, item: Hashable, done: int) -> None:
        """Show that `done` units of an item are done.

        Outdated calls are ignored: those for a finished item, and those with fewer units than an earlier call, such as
        from a second worker that repeats the item.
        """
        with self._lock:
            before = self._done_of.get(item, 0)
            if item not in self._finished and done > before:
                self._done_of[item] = done
                self._bar.update(done - before)

    def finish_item(self, item: Hashable, count: int, in_rate: bool = True) -> None:
        """Show that an item of `count` units is finished.

        in_rate: False for an item that was finished before this job started, so that the rate does not count it.
        """
        with self._lock:
            self._finished.add(item)
            count -= self._done_of.pop(item, 0)
            if not in_rate:
                self._bar.initial += count
                self._bar.last_print_n += count
            self._bar.update(count)


@contextlib.contextmanager
def progress_line(total: int, unit: str, description: str = "") -> Iterator[Progress]:
    """Show a progress line on stderr until the context ends. If stderr is no terminal, print it every 30 seconds."""
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
