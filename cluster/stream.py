"""Ray Data as an ordered, prefetching reader: units of work in, blocks of arrays out, in the units' order."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np

Unit = TypeVar("Unit")
Block = dict[str, np.ndarray]

CHUNK = 256  # units in one pipeline
TASKS = 2  # reads of one caller that run at a time
BLOCK_BYTES = 4 << 20  # what a task hands over at once: small blocks keep the object store small
AHEAD = 4  # blocks that wait in this process; they also bridge the start of the next pipeline


def stream(
    units: Iterable[Unit], read_unit: Callable[[Unit], Iterator[Block]], num_cpus: float = 0.25
) -> Iterator[Block]:
    """Read every unit in tasks of `num_cpus` CPUs, ahead of the caller; yield the rows in the units' order.

    `units` may be endless. `read_unit` runs in Ray tasks and yields dicts of arrays with one row for each
    sample; it should yield uint8 rather than float, a few megabytes at a time, and hold locations, not data.
    Blocks may be cut elsewhere than `read_unit` cut them, never across units. The arrays are the caller's.

    Raises:
        RuntimeError: a unit could not be read; the message is the original error's.
    """
    from ray.exceptions import RayError, RayTaskError

    try:
        yield from _ahead(_blocks(iter(units), read_unit, num_cpus))
    except RayError as error:
        reason = str(error.cause if isinstance(error, RayTaskError) else error)
        first_line = reason.strip().split("\n", 1)[0]  # Ray adds advice beneath
        raise RuntimeError(f"reading data failed: {first_line}") from error


def _blocks(
    units: Iterator[Unit], read_unit: Callable[[Unit], Iterator[Block]], num_cpus: float
) -> Generator[Block, None, None]:
    """The blocks of one pipeline after the other."""
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, once, by `stream`
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    while chunk := list(islice(units, CHUNK)):
        reference = ray.put(chunk)  # once, rather than a block of its own for each unit

        def read(batch: dict[str, np.ndarray], reference: Any = reference) -> Iterator[Block]:
            try:
                yield from read_unit(ray.get(reference)[int(batch["item"][0])])
            except Exception as error:  # Ray would put its advice in the place of an OSError's file name
                raise RuntimeError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error

        with DataContext.current(context):
            numbers = ray.data.from_items(list(range(len(chunk))), override_num_blocks=len(chunk))
            dataset = numbers.map_batches(read, batch_size=1, num_cpus=num_cpus, compute=TaskPoolStrategy(size=TASKS))
        for block in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
            # A copy frees the object store at once; a view would pin it for as long as rows wait their turn.
            yield {name: np.array(column) for name, column in block.items()}


def _ahead(blocks: Generator[Block, None, None]) -> Iterator[Block]:
    """Draw `blocks` in a thread, at most AHEAD of them ahead of the caller."""
    queue: Queue[Block | BaseException | None] = Queue(maxsize=AHEAD)
    closed = Event()

    def put(item: Block | BaseException | None) -> None:
        while not closed.is_set():
            try:
                queue.put(item, timeout=0.2)
                return
            except Full:
                continue

    def draw() -> None:
        try:
            for block in blocks:
                put(block)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            put(error)
        finally:
            blocks.close()  # ends the pipeline

    thread = Thread(target=draw, name="stream", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
