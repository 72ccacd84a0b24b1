"""Ray Data as an ordered, prefetching reader: units of work in, blocks of arrays out, in the units' order."""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from mmap import mmap
from queue import Queue
from threading import Event, Lock, Semaphore, Thread
from typing import Any, TypeVar

import numpy as np

from cluster.session import on_this_node

Unit = TypeVar("Unit")
Block = dict[str, np.ndarray]
Pipeline = Callable[[list[Any]], Iterator[Block]]
Queues = list["Queue[Block | BaseException | None]"]  # a unit's blocks as they come, then None

TASKS = 4  # reads of one pipeline at a time: those that find no CPU wait in Ray, so that none is idle between two
BLOCKS_AHEAD = 6  # that a task may have made and nobody taken: Ray Data looks ten times a second
CHUNKS_AHEAD = 2  # chunks in this process: one that is consumed, one that is read meanwhile
PAGED_BYTES = 1 << 20  # of an array that has pages of its own
FREE_PAGES = 16  # arrays' worth of them that are kept for the next ones
CLOSING_SECONDS = 10  # that a caller who stops early waits for each running pipeline, at most

_building = Lock()  # Ray Data's context belongs to the process


def stream(
    units: Iterable[Unit],
    read_unit: Callable[[Unit], Iterator[Block]],
    chunk: int,
    block_bytes: int = 4 << 20,
) -> Iterator[Block]:
    """Read every unit in tasks of one CPU, ahead of the caller; yield the rows in the units' order.

    `units` may be endless. Each `chunk` of them is a Ray Data pipeline of its own, drained at once into this process,
    which so holds at most two chunks: an executor that waits for a slow consumer keeps polling, in this process, and
    would take half a core from the training step. Its tasks hand over blocks in whatever order they are ready; the
    units' order is restored here, so that nothing waits for its turn in the object store. `read_unit` runs in Ray tasks
    and yields one or more dicts of arrays, a row for each sample: uint8 rather than float, about `block_bytes`
    at a time, and hold locations, not data. Small blocks keep the object store small. Much smaller ones are put
    together, much larger ones cut, each with a copy, but never across units. The arrays are the caller's own.

    Raises:
        RuntimeError: a unit could not be read; the message is the original error's.
    """
    from ray.exceptions import RayError, RayTaskError

    try:
        yield from _ahead(iter(units), chunk, partial(_pipeline, read_unit, block_bytes, _Pages(block_bytes)))
    except RayError as error:
        reason = str(error.cause if isinstance(error, RayTaskError) else error)
        first_line = reason.strip().split("\n", 1)[0]  # Ray adds advice beneath
        raise RuntimeError(f"reading data failed: {first_line}") from error


def _ahead(units: Iterator[Unit], chunk: int, pipeline: Pipeline) -> Iterator[Block]:
    """Read chunk after chunk, each in a thread, while there is room for another."""
    chunks: Queue[Queues | BaseException | None] = Queue()
    room, closed = Semaphore(CHUNKS_AHEAD), Event()
    pipelines: deque[Thread] = deque(maxlen=CHUNKS_AHEAD)

    def read() -> None:
        try:
            while not closed.is_set() and (taken := list(islice(units, chunk))):
                room.acquire()
                if closed.is_set():
                    return
                queues: Queues = [Queue() for _ in taken]
                chunks.put(queues)
                ending = Event()
                arguments = (queues, pipeline(taken), ending, closed)
                pipelines.append(Thread(target=_fill, args=arguments, name="chunk", daemon=True))
                pipelines[-1].start()
                ending.wait()  # the next pipeline starts while this one's last tasks run
            chunks.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            chunks.put(error)

    reader = Thread(target=read, name="stream", daemon=True)
    reader.start()
    try:
        while (queues := chunks.get()) is not None:
            if isinstance(queues, BaseException):
                raise queues
            for queue in queues:
                while (block := queue.get()) is not None:
                    if isinstance(block, BaseException):
                        raise block
                    yield block
            room.release()
    finally:
        closed.set()
        room.release()
        for thread in (reader, *pipelines):  # what still asks Ray when Ray is shut down would end the process
            thread.join(CLOSING_SECONDS)


def _fill(queues: Queues, blocks: Iterator[Block], ending: Event, closed: Event) -> None:
    """Deal a pipeline's blocks to the units' queues; `ending` once half of its tasks may have nothing left to do."""
    left = len(queues)
    try:
        for block in blocks:
            if closed.is_set():
                return
            queue = queues[int(block.pop("unit_of_chunk")[0])]
            last = bool(block.pop("last_of_unit")[-1])
            queue.put(block)
            if last:
                queue.put(None)
                left -= 1
            if left <= TASKS // 2:
                ending.set()
    except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
        for queue in queues:
            queue.put(error)
    finally:
        ending.set()


def _pipeline(
    read_unit: Callable[[Unit], Iterator[Block]], block_bytes: int, pages: "_Pages", units: list[Unit]
) -> Iterator[Block]:
    """The blocks of some units, by one Ray Data execution, each with its unit's number and where the unit ends."""
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, once, by `stream`
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = False
    context.target_max_block_size = block_bytes
    context._max_num_blocks_in_streaming_gen_buffer = BLOCKS_AHEAD  # there is no public name for it
    # Reservations start from nothing and are first looked at again after a second, in which one task runs; each chunk
    # would lose that second. What they guard is bounded here: by TASKS, and by who takes the blocks at once.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    reference = ray.put(units)  # once, rather than a block of its own for each unit

    def read(batch: dict[str, np.ndarray], reference: Any = reference) -> Iterator[Block]:
        number = int(batch["item"][0])
        try:
            blocks = iter(read_unit(ray.get(reference)[number]))
            block = next(blocks)
            for following in blocks:
                yield _tagged(block, number, False)
                block = following
            yield _tagged(block, number, True)
        except Exception as error:  # Ray would put its advice in the place of an OSError's file name
            raise RuntimeError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error

    with _building, DataContext.current(context):
        numbers = ray.data.from_items(list(range(len(units))), override_num_blocks=len(units))
        dataset = numbers.map_batches(read, batch_size=1, compute=TaskPoolStrategy(size=TASKS), **on_this_node())
    for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        # A copy frees the object store at once; a view would pin it for as long as rows wait their turn.
        yield {name: pages.copy(column) for name, column in block.items()}


class _Pages:
    """Copies that take no more memory than they have bytes.

    Large ones have pages of their own: malloc's would stay behind, scattered over the arenas of the threads that come
    and go here, as twice the memory of what is held. Some of these pages serve again: fresh ones cost as much as the
    copy. All are made for a whole block, so that any fits what comes: what is not touched takes no memory.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._free: deque[mmap] = deque(maxlen=FREE_PAGES)

    def copy(self, column: np.ndarray) -> np.ndarray:
        if column.nbytes < PAGED_BYTES:
            return np.array(column)
        try:
            pages = self._free.pop()
        except IndexError:
            pages = mmap(-1, max(column.nbytes, self._block_bytes))
        if len(pages) < column.nbytes:
            pages = mmap(-1, column.nbytes)
        whole = np.frombuffer(pages, column.dtype, column.size)
        weakref.finalize(whole, self._free.append, pages).atexit = False  # views keep `whole` alive
        copy = whole.reshape(column.shape)
        copy[...] = column
        return copy


def _tagged(block: Block, number: int, last: bool) -> Block:
    rows = len(next(iter(block.values())))
    ends = np.zeros(rows, dtype=bool)
    ends[-1] = last
    return block | {"unit_of_chunk": np.full(rows, number), "last_of_unit": ends}
