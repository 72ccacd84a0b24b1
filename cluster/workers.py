"""A pool of warm workers: items in, results as they complete; workers may come, go and die at any time."""

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from cluster.metrics import publish
from cluster.session import accelerator

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]
MakeWorker = Callable[[], Work[Item, Result]]

START_TRIES = 5  # how often a worker may die while it is made, in a row, before it is given up
LOST_WORKERS = 10  # that an item may cost before it is taken for the cause; elsewhere, nodes are taken away at random
STRAGGLING = 3.0  # times the mean duration: an item that takes longer is given to an idle worker as well
LOOK_SECONDS = 1.0  # between two looks for such items

log = logging.getLogger(__name__)


class ItemsFailed(RuntimeError):
    """Some items failed for good; all others are done."""


def map_items(
    make_worker: MakeWorker[Item, Result],
    items: Iterable[Item],
    num_workers: int,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    tries: int = 3,
) -> Iterator[tuple[Item, Result]]:
    """Run every item on one of `num_workers` workers (0: in this process); yield (item, result) as they complete.

    Raises what `Pool.map` raises.
    """
    with pool(make_worker, num_workers, num_cpus, num_gpus) as workers:
        yield from workers.map(items, tries)


@contextlib.contextmanager
def pool(
    make_worker: MakeWorker[Item, Result], num_workers: int, num_cpus: float = 1.0, num_gpus: float = 0.0
) -> Iterator["Pool[Item, Result]"]:
    """`num_workers` actors, each of which calls `make_worker` once; they end with the context.

    Where the cluster is too small for all of them now, the others join when it has grown. With none of them, this
    process does the work.
    """
    if num_workers == 0:
        yield _Here(make_worker())
        return
    import ray

    kind = {"accelerator_type": accelerator()} if num_gpus and accelerator() else {}
    remote = ray.remote(_Worker).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1, **kind)
    actors: list[Any] = [remote.remote(make_worker) for _ in range(num_workers)]
    try:
        yield Pool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


class Pool(Generic[Item, Result]):
    """Handles on the workers. It can be sent to other processes, and several may map over it at once: each keeps
    at most one item on a worker, so that they share it fairly and whoever stops frees its share at once."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def map(self, items: Iterable[Item], tries: int = 3) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) as they complete, each item once, in no particular order.

        Work is handed out only to workers that have answered. A worker that dies is started again by Ray, where
        there is room, and its item goes to another. An item that hangs somewhere is given to an idle worker too. So
        results may be computed twice, never lost. Memory does not grow with the number of items.

        Raises:
            ItemsFailed: some items raised an error `tries` times, or lost ten workers; all others are done.
            RuntimeError: a worker could not be made, or none is left.
        """
        yield from _Mapping[Item, Result](self._actors, items, tries).results()


class _Here(Pool[Item, Result]):
    """This process as a pool: items are done in order, and an error is raised as it is."""

    def __init__(self, work: Work[Item, Result]) -> None:
        super().__init__([])
        self._work = work

    def map(self, items: Iterable[Item], tries: int = 3) -> Iterator[tuple[Item, Result]]:
        yield from ((item, self._work(item)) for item in items)


@dataclass(eq=False)
class _Task(Generic[Item]):
    """An item on its way."""

    item: Item
    failures: int = 0  # errors that it raised
    lost: int = 0  # workers that died of it, or at it
    copies: int = 0  # workers that have it at this moment
    begun: float = 0.0  # when it was handed out first since it last failed, in seconds


class _Mapping(Generic[Item, Result]):
    """One `map` over a pool. Answers come to a queue as they are there, so that an item costs the same time
    whether ten workers run or a thousand."""

    def __init__(self, actors: list[Any], items: Iterable[Item], tries: int) -> None:
        self._actors, self._tries = actors, tries
        self._fresh = (_Task(item) for item in items)
        self._waiting: deque[_Task[Item]] = deque()  # the next fresh one, and those that failed
        self._running: dict[_Task[Item], None] = {}  # in the order in which they were handed out
        self._idle: deque[Any] = deque()
        self._answers: SimpleQueue[tuple[Callable[[Any, Any], None], Any, Any]] = SimpleQueue()
        self._away: deque[tuple[float, Any]] = deque()  # (when to look again, worker) of those not there
        self._deaths = Counter[Any]()  # of a worker while it was made, in a row
        self._lost = 0  # workers given up
        self._seconds, self._done = 0.0, 0  # of all done items
        self._results: deque[tuple[Item, Result]] = deque()  # at most one
        self._failed, self._reasons = 0, list[str]()
        self._published = 0.0  # when numbers were last shown, in seconds

    def results(self) -> Iterator[tuple[Item, Result]]:
        """What `Pool.map` yields."""
        for actor in self._actors:
            self._look_for(actor)
        while self._is_waiting() or self._running:
            self._hand_out()
            while self._away and self._away[0][0] <= time.monotonic():
                self._look_for(self._away.popleft()[1])
            if self._lost == len(self._actors):
                raise RuntimeError("no worker is left, and not all items are done")
            looks = self._away or (self._idle and self._running)  # for a worker to return, or for stragglers
            with contextlib.suppress(Empty):
                take, actor, future = self._answers.get(timeout=LOOK_SECONDS if looks else None)
                take(actor, future)
            while self._results:
                yield self._results.popleft()
            if time.monotonic() > self._published + LOOK_SECONDS:
                self._publish()
        self._publish()
        if self._failed:
            raise ItemsFailed(f"{self._failed} items failed, the others are done: {'; '.join(self._reasons)}")

    def _publish(self) -> None:
        self._published = time.monotonic()
        retries = sum(task.failures > 0 for task in self._waiting)
        publish(
            "pool",
            {
                "items_running": len(self._running),
                "items_done": self._done,
                "items_failed": self._failed,
                "items_to_repeat": retries,
                "workers_idle": len(self._idle),
                "workers_away": len(self._away),
                "workers_lost": self._lost,
            },
        )

    def _is_waiting(self) -> bool:
        if not self._waiting:
            self._waiting.extend(islice(self._fresh, 1))
        return bool(self._waiting)

    def _call(self, actor: Any, reference: Any, take: Callable[[Any, Any], None]) -> None:
        """Have `take(actor, future)` called by the loop when the answer is there."""
        reference.future().add_done_callback(lambda future: self._answers.put((take, actor, future)))

    # a worker is looked for, made, given items; whatever ends its process, it is looked for again

    def _look_for(self, actor: Any) -> None:
        self._call(actor, actor.is_there.remote(), self._found)

    def _found(self, actor: Any, future: Any) -> None:
        from ray.exceptions import ActorDiedError

        error = future.exception()
        if error is None:
            self._call(actor, actor.ready.remote(), self._made)
        else:  # being started again, for which there may be no room now: that can last
            self._gone(actor, error, died=isinstance(error, ActorDiedError))

    def _made(self, actor: Any, future: Any) -> None:
        from ray.exceptions import RayTaskError

        error = future.exception()
        if isinstance(error, RayTaskError):
            raise RuntimeError(f"a worker could not be made: {_reason(error)}") from error
        if error is None:
            self._deaths[actor] = 0
            self._idle.append(actor)
        else:
            self._gone(actor, error, died=True)

    def _gone(self, actor: Any, error: BaseException, died: bool) -> None:
        """Look for a worker again in a while, unless it has died too often."""
        self._deaths[actor] += died
        if self._deaths[actor] < START_TRIES:
            self._away.append((time.monotonic() + LOOK_SECONDS, actor))
        else:
            self._lost += 1
            log.warning("a worker ended for good: %s", _reason(error))

    # an item is handed out, fails, or is done

    def _hand_out(self) -> None:
        while self._idle:
            task = self._waiting.popleft() if self._is_waiting() else self._straggler()
            if task is None:
                return
            if not task.copies:
                task.begun = time.monotonic()
                self._running[task] = None
            task.copies += 1
            actor = self._idle.popleft()
            self._call(actor, actor.work.remote(task.item), partial(self._answered, task))

    def _straggler(self) -> _Task[Item] | None:
        """The item that has run longest and far longer than items do, if only one worker has it."""
        task = next((task for task in self._running if task.copies == 1), None)
        if task is None or not self._done:
            return None
        limit = max(LOOK_SECONDS, STRAGGLING * self._seconds / self._done)
        return task if time.monotonic() - task.begun > limit else None

    def _answered(self, task: _Task[Item], actor: Any, future: Any) -> None:
        from ray.exceptions import RayTaskError

        error = future.exception()
        raised = isinstance(error, RayTaskError)
        if error is None or raised:
            self._idle.append(actor)
        else:  # its process is gone
            self._look_for(actor)
        task.copies -= 1
        if task not in self._running:  # another worker was quicker
            return
        if error is not None:
            self._failure(task, error, raised)
            return
        del self._running[task]
        self._seconds += time.monotonic() - task.begun
        self._done += 1
        self._results.append((task.item, future.result()))

    def _failure(self, task: _Task[Item], error: BaseException, raised: bool) -> None:
        task.failures += raised
        task.lost += not raised
        if task.copies:  # another worker has it too
            return
        del self._running[task]
        if task.failures < self._tries and task.lost < LOST_WORKERS:
            self._waiting.append(task)
            return
        self._failed += 1
        reason = f"{task.item}, {task.failures + task.lost} times: {_reason(error)}"
        if len(self._reasons) < 5:
            self._reasons.append(reason)
        log.warning("failed for good: %s", reason)


class _Worker:
    """What runs in an actor. The worker is made in `ready`, so that its errors come back as errors of a call."""

    def __init__(self, make_worker: MakeWorker[Any, Any]) -> None:
        self._make_worker = make_worker
        self._work: Work[Any, Any] | None = None

    def is_there(self) -> None:
        """Its process is up."""

    def ready(self) -> None:
        if self._work is None:
            self._work = self._make_worker()

    def work(self, item: Any) -> Any:
        if self._work is None:  # started again after its death, and given work before it was asked to be ready
            self.ready()
        assert self._work is not None
        return self._work(item)


def _reason(error: BaseException) -> str:
    """The last line of a remote error: its type and message, without the remote traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
