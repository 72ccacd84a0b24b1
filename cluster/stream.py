"""An ordered, prefetching reader: Ray tasks read units of work, and blocks of arrays arrive in the units' order."""

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

TASKS = 4  # that one stream runs, on the CPUs that its worker has reserved for data
LOST_TASKS = 5  # processes that a unit may cost before it counts as the cause; nodes are preempted at random
CHECK_SECONDS = 0.2  # between two checks for more room and for the end, while no block arrives
CLOSING_SECONDS = 10  # that a consumer who stops early waits for the tasks to end, at most

log = logging.getLogger(__name__)


def stream(units: Iterable[Unit], read_unit: ReadUnit[Unit], ahead: int) -> Iterator[Block]:
    """Read every unit in a Ray task on this node, up to `ahead` units ahead; yield the blocks in the units' order.

    `units` may be endless. `read_unit` runs in Ray tasks and yields one or more dicts of arrays with a row for each
    sample, the same blocks each time; it travels to the tasks, so it should hold locations rather than data. A thread
    of this process copies every block out of the object store as soon as it is there. So the object store holds only
    the blocks of running tasks, and this process holds at most `ahead` units. The arrays belong to the caller.

    A task whose process or node dies is run again, and sends only the blocks that have not arrived yet.

    Raises:
        RuntimeError: a unit could not be read; the message is the original error's.
    """
    reader = _Reader(iter(units), read_unit, ahead)
    reader.thread.start()
    try:
        while (reading := reader.readings.get()) is not None:
            if isinstance(reading, BaseException):
                raise reading
            while (block := reading.blocks.get()) is not None:
                if isinstance(block, BaseException):
                    raise block
                yield block
            reader.room.release()
    finally:
        reader.close()


@dataclass(eq=False)
class _Reading:
    """A unit that a task reads."""

    unit: Any
    blocks: "SimpleQueue[Block | BaseException | None]" = field(default_factory=SimpleQueue)  # None: there are no more
    taken: int = 0  # blocks that have arrived
    lost: int = 0  # tasks whose process ended


class _Reader:
    """The thread that starts tasks and copies what they read; it alone calls Ray."""

    def __init__(self, units: Iterator[Any], read_unit: ReadUnit[Any], ahead: int) -> None:
        self.readings: SimpleQueue[_Reading | BaseException | None] = SimpleQueue()  # in the units' order
        self.room = Semaphore(ahead)
        self.thread = Thread(target=self._run, name="stream", daemon=True)
        self._units, self._read_unit = units, read_unit
        self._closed = False
        self._running: dict[Any, _Reading] = {}  # by the task's generator of references

    def close(self) -> None:
        """End the tasks and the thread: what still calls Ray when Ray is shut down would end the process."""
        self._closed = True
        self.thread.join()

    def _run(self) -> None:
        import ray

        try:
            task: Any = ray.remote(_read)
            self._task = task.options(
                **on_this_node(),
                num_returns="streaming",
                max_retries=0,
                enable_task_events=False,  # Ray's records of tasks would grow with the number of units
            )
            self._reference = ray.put(self._read_unit)
            self._read_all()
            self.readings.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised in the consumer's thread
            for reading in self._running.values():
                reading.blocks.put(error)
            self.readings.put(error)
        finally:
            with suppress(Exception):  # Ray has been shut down
                self._end_tasks()

    def _end_tasks(self) -> None:
        """End what still runs, and wait until it has ended: nobody reads on behalf of a closed stream."""
        import ray

        tasks = {generator.completed(): generator for generator in self._running}
        left = list(tasks)
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=CHECK_SECONDS)  # some have nothing left to do
        for task in left:  # with their processes, since an interrupted import may break these for later tasks
            ray.cancel(tasks[task], force=True)
        if left:
            ray.wait(left, num_returns=len(left), timeout=CLOSING_SECONDS)

    def _read_all(self) -> None:
        import ray

        left = True
        while (left or self._running) and not self._closed:
            if left and len(self._running) < TASKS and self.room.acquire(timeout=0 if self._running else CHECK_SECONDS):
                try:
                    reading = _Reading(next(self._units))
                except StopIteration:
                    left = False
                    continue
                self.readings.put(reading)
                self._start(reading)
            elif self._running:
                for generator in ray.wait(list(self._running), timeout=CHECK_SECONDS)[0]:
                    self._take(generator)

    def _start(self, reading: _Reading) -> None:
        self._running[self._task.remote(self._reference, reading.unit, reading.taken)] = reading

    def _take(self, generator: Any) -> None:
        """Take the next block of a task, or its end."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        reading = self._running[generator]
        try:
            views = ray.get(next(generator))
            # A view would keep its block in the object store for as long as rows wait for their turn.
            reading.blocks.put({name: np.array(view) for name, view in views.items()})
            reading.taken += 1
            return
        except StopIteration:
            reading.blocks.put(None)
        except RayError as error:
            reading.lost += 1
            if not isinstance(error, RayTaskError) and reading.lost < LOST_TASKS:
                log.warning("a task that reads data was lost, it is run again: %s", reason_of(error))
                self._start(reading)
            else:
                reading.blocks.put(RuntimeError(f"reading data failed: {reason_of(error)}"))
        del self._running[generator]


def _read(read_unit: ReadUnit[Any], unit: Any, taken: int) -> Iterator[Block]:
    """Yield the blocks of a unit but for those that were taken from an earlier task."""
    for number, block in enumerate(read_unit(unit)):
        if number >= taken:
            yield block
