"""An ordered, prefetching reader: Ray actors read units, and their blocks of arrays arrive in the units' order."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, TypeVar

import numpy as np

from cluster.actor import reason_of
from cluster.session import on_this_node

Unit = TypeVar("Unit")
Block = dict[str, np.ndarray]
ReadUnit = Callable[[Unit], Iterator[Block]]

READERS = 2  # processes of one stream, on the CPU that its worker has reserved for data
LOST_READERS = 5  # processes that may die while they read one unit, before the unit counts as the cause
CHECK_SECONDS = 0.2  # between two checks for a free slot and for the end, while no block arrives

log = logging.getLogger(__name__)


def stream(units: Iterable[Unit], read_unit: ReadUnit[Unit], ahead: int) -> Iterator[Block]:
    """Read units in Ray actors on this node, up to `ahead` units ahead; yield their blocks in the order of the units.

    `units` may be endless. `read_unit` yields one or more blocks of a unit, which are dicts of arrays with a row for
    each sample. It must yield the same blocks each time. It is sent to the actors, so it should hold locations rather
    than data. A thread of this process copies every block out of the object store as soon as it arrives. Therefore the
    object store holds only blocks of units that are being read, and this process holds at most `ahead` units. The
    caller owns the arrays.

    If a reader dies, another one reads its unit again and sends only the blocks that have not arrived.

    Raises:
        RuntimeError: a unit could not be read; the message is that of the original error.
    """
    scheduler = _ReadScheduler(iter(units), read_unit, ahead)
    scheduler.thread.start()
    try:
        while (pending := scheduler.pending.get()) is not None:
            if isinstance(pending, BaseException):
                raise pending
            while (block := pending.blocks.get()) is not None:
                if isinstance(block, BaseException):
                    raise block
                yield block
            scheduler.free_slots.release()
    finally:
        scheduler.close()


@dataclass(eq=False)
class _PendingUnit:
    """A unit that is being read."""

    unit: Any
    blocks: "SimpleQueue[Block | BaseException | None]" = field(default_factory=SimpleQueue)  # None marks the end
    num_received: int = 0  # blocks that have arrived
    num_deaths: int = 0  # readers that died while they read it
    reader: Any = None  # the actor that reads it


class _ReadScheduler:
    """A thread that assigns units to the readers and copies their blocks. No other thread calls Ray.

    Readers are actors that live as long as the stream. Ray would end the processes of tasks soon after they are done,
    and every new process takes seconds and creates log files.
    """

    def __init__(self, units: Iterator[Any], read_unit: ReadUnit[Any], ahead: int) -> None:
        self.pending: SimpleQueue[_PendingUnit | BaseException | None] = SimpleQueue()  # in the order of the units
        self.free_slots = Semaphore(ahead)  # how many further units may be read ahead
        self.thread = Thread(target=self._run, name="stream", daemon=True)
        self._units, self._read_unit = units, read_unit
        self._closed = False
        self._running: dict[Any, _PendingUnit] = {}  # by the generator of references to its blocks
        self._idle: list[Any] = []  # readers

    def close(self) -> None:
        """End the thread and the readers. A thread that calls Ray after its shutdown would end this process."""
        self._closed = True
        self.thread.join()

    def _run(self) -> None:
        import ray

        try:
            self._idle = [self._new_reader() for _ in range(READERS)]
            self._read_all()
            self.pending.put(None)
        except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread
            for pending in self._running.values():
                pending.blocks.put(error)
            self.pending.put(error)
        finally:
            with suppress(Exception):  # Ray may have been shut down
                for reader in [*self._idle, *(pending.reader for pending in self._running.values())]:
                    ray.kill(reader)

    def _new_reader(self) -> Any:
        import ray

        # Without task events, because Ray's records of calls would grow with the number of units.
        actor: Any = ray.remote(_ReaderActor).options(**on_this_node(), enable_task_events=False)
        return actor.remote(self._read_unit)

    def _read_all(self) -> None:
        """Start a unit whenever a reader is idle and a slot is free; otherwise receive blocks."""
        import ray

        has_more = True
        while (has_more or self._running) and not self._closed:
            if has_more and self._idle and self.free_slots.acquire(timeout=0 if self._running else CHECK_SECONDS):
                try:
                    pending = _PendingUnit(next(self._units))
                except StopIteration:
                    has_more = False
                    continue
                self.pending.put(pending)
                self._start(pending)
            elif self._running:
                for generator in ray.wait(list(self._running), timeout=CHECK_SECONDS)[0]:
                    self._receive(generator)

    def _start(self, pending: _PendingUnit) -> None:
        pending.reader = self._idle.pop()
        call = pending.reader.read.options(num_returns="streaming")
        self._running[call.remote(pending.unit, pending.num_received)] = pending

    def _receive(self, generator: Any) -> None:
        """Receive the next block of a unit, its end, or an error."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        pending = self._running[generator]
        try:
            views = ray.get(next(generator))
            # Copies, because a view would keep its block in the object store until its last row is used.
            pending.blocks.put({name: np.array(view) for name, view in views.items()})
            pending.num_received += 1
            return
        except StopIteration:
            pending.blocks.put(None)
            self._idle.append(pending.reader)
        except RayTaskError as error:
            pending.blocks.put(RuntimeError(f"reading data failed: {reason_of(error)}"))
            self._idle.append(pending.reader)
        except RayError as error:
            pending.num_deaths += 1
            ray.kill(pending.reader)
            self._idle.append(self._new_reader())
            if pending.num_deaths < LOST_READERS:
                log.warning("a process that reads data died, another one reads its unit again: %s", reason_of(error))
                self._start(pending)
            else:
                pending.blocks.put(RuntimeError(f"reading data failed: {reason_of(error)}"))
        del self._running[generator]


class _ReaderActor:
    """An actor that reads one unit at a time."""

    def __init__(self, read_unit: ReadUnit[Any]) -> None:
        self._read_unit = read_unit

    def read(self, unit: Any, skip: int) -> Iterator[Block]:
        """Yield the blocks of a unit without the first `skip`, which an earlier reader has sent."""
        for number, block in enumerate(self._read_unit(unit)):
            if number >= skip:
                yield block
