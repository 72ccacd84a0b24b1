"""One progress line: done, total, rate, time left."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


def counted(count: float, noun: str) -> str:
    """Return a count with its noun in the singular or the plural: 1 worker, 2 workers."""
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,g} {noun}{plural}" if isinstance(count, float) else f"{count:,} {noun}{plural}"


class _Terminal:
    """Standard error, to which a write never fails: tqdm keeps its lock where one does, and then waits for ever."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal, or whoever read the pipe, is gone
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class Progress:
    """A line that is told how far the work is."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    @property
    def done(self) -> int:
        """How far it is."""
        return int(self._bar.n)

    def start(self, done: int, description: str = "") -> None:
        """Begin, or begin again: `done` was done before, and time and rate count from now on."""
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.start_t = self._bar.last_print_t = self._bar._time()
        self._bar.set_description(description or None)

    def skip(self, count: int) -> None:
        """Count what was done before: it is no part of the rate."""
        self._bar.initial += count
        self._bar.last_print_n += count
        self._bar.n += count

    def update_to(self, done: int, **numbers: float) -> None:
        """Show `done`, and the numbers beside it."""
        if numbers:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
        self._bar.update(done - self._bar.n)


@contextlib.contextmanager
def progress_line(total: int, unit: str, description: str = "") -> Iterator[Progress]:
    """A progress line on stderr while inside; where that is no terminal, a line only every 30 seconds."""
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
