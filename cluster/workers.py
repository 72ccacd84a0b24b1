"""A pool of workers that map items to results. Workers may join, fail and die at any time."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from cluster.actor import WorkerActor, is_device_error, is_raised, reason_of, restart_process
from cluster.capacity import refuse_infeasible, report_waiting, worker_resources
from cluster.metrics import publish

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]
MakeWorker = Callable[[], Work[Item, Result]]

START_TRIES = 3  # consecutive failures to create a worker, after which it is no longer used
STRIKES_TO_RESTART = 2  # consecutive items that raise errors on a worker, after which its process is restarted
STRIKES_TO_BENCH = 4  # consecutive items that fail on a worker, after which it gets none while others succeed
LOST_WORKERS = 10  # processes that may die with an item, before the item counts as the cause (nodes are preempted)
MOST_TRIES = 10  # of an item that failed only on workers that may be faulty themselves
STRAGGLING = 3.0  # times the mean duration: an item that takes longer is also given to an idle worker
SLOW = 10.0  # times the mean duration: an item that takes longer is logged
SLOW_SECONDS = 60.0  # an item that takes less is never logged; also the first pause between two such log lines
# A process ends itself if an item misses its deadline. An item may compile first and take hours on a slow GPU, so the
# shortest deadline is long. Idle workers repeat items that hang much earlier (STRAGGLING).
HANG_SECONDS = 120 * 60.0  # the shortest deadline; it doubles for an item each time the item misses it
HANGING = 10.0  # times the duration of the longest item so far: the deadline, if this is longer
PATIENCE_SECONDS = 300.0  # how long a failed item waits for an absent worker that has not tried it
POLL_SECONDS = 1.0  # between two checks of all this

log = logging.getLogger(__name__)


class ItemsFailed(RuntimeError):
    """Some items failed permanently; all others are done."""


def map_items(
    make_worker: MakeWorker[Item, Result],
    items: Iterable[Item],
    num_workers: int,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    tries: int = 3,
) -> Iterator[tuple[Item, Result]]:
    """Run every item on one of `num_workers` workers (0: in this process). Yield (item, result) as items complete.

    Raises what `pool` and `Pool.map` raise.
    """
    with pool(make_worker, num_workers, num_cpus, num_gpus) as workers:
        yield from workers.map(items, tries)


@contextlib.contextmanager
def pool(
    make_worker: MakeWorker[Item, Result], num_workers: int, num_cpus: float = 1.0, num_gpus: float = 0.0
) -> Iterator["Pool[Item, Result]"]:
    """Start `num_workers` actors, each of which calls `make_worker` once. They end with the context.

    If the cluster has no room for all of them now, the others join later, and the log says what they wait for. With
    `num_workers=0`, this process does the work.

    Raises:
        ValueError: no node can ever hold a worker.
    """
    if num_workers == 0:
        yield _Here(make_worker())
        return
    import ray

    resources = worker_resources(num_cpus, num_gpus)
    refuse_infeasible(resources)
    others = {name: value for name, value in resources.items() if name not in ("CPU", "GPU")}
    remote = ray.remote(WorkerActor).options(num_cpus=num_cpus, num_gpus=num_gpus, resources=others, max_restarts=-1)
    actors: list[Any] = [remote.remote(make_worker) for _ in range(num_workers)]
    ended = threading.Event()
    reporter = threading.Thread(target=report_waiting, args=(actors, resources, ended), daemon=True)
    reporter.start()
    try:
        yield Pool(actors)
    finally:
        ended.set()
        reporter.join()
        for actor in actors:
            ray.kill(actor)


class Pool(Generic[Item, Result]):
    """Handles on the workers, which can be sent to other processes.

    Several processes may map over one pool at the same time. Each has at most one item on a worker, so that they share
    the pool fairly, and a process that stops frees its share at once.
    """

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def map(self, items: Iterable[Item], tries: int = 3) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) as items complete, each item once, in no particular order.

        An item that fails is retried, on another worker if there is one. A worker that fails repeatedly is restarted,
        and then gets no items while others succeed. A worker that cannot be created is not used. A worker that hangs
        ends at a deadline, and before that an idle worker repeats its item. A result may be computed twice, but it is
        yielded exactly once. Memory does not grow with the number of items. At the end, the log names the workers that
        failed and their nodes.

        Raises:
            ItemsFailed: some items raised an error or hung `tries` times, or ten workers died with them; all others
                are done.
            RuntimeError: no worker could be created, or none is left.
        """
        yield from _Mapping[Item, Result](self._actors, items, tries).results()


class _Here(Pool[Item, Result]):
    """A pool of this process only: items run in order, and errors are raised unchanged."""

    def __init__(self, work: Work[Item, Result]) -> None:
        super().__init__([])
        self._work = work

    def map(self, items: Iterable[Item], tries: int = 3) -> Iterator[tuple[Item, Result]]:
        yield from ((item, self._work(item)) for item in items)


@dataclass(eq=False)
class _Worker:
    """The state of a worker from the view of one mapping, which gives it one item at a time."""

    actor: Any
    node: str = "a node that is not known yet"
    is_running: bool = False  # its process runs
    dropped: bool = False  # no longer used
    is_healthy: bool = False  # its last item succeeded
    starts: int = 0  # consecutive failures to create it
    strikes: int = 0  # consecutive items that failed on it
    failures: int = 0  # in total, without those of items that fail on all workers
    reason: str = ""  # of the last failure
    task: Any = None  # the task that it runs, or ran last
    begun: float = 0.0  # time at which the task began, in seconds
    deadline: float = 0.0  # of the task, in seconds after `begun`

    @property
    def is_benched(self) -> bool:
        return self.strikes >= STRIKES_TO_BENCH

    def note(self, reason: str) -> None:
        """Record a failure."""
        self.failures += 1
        self.reason = reason


@dataclass(eq=False)
class _Task(Generic[Item]):
    """An item and its failures."""

    item: Item
    failures: int = 0  # errors that it raised, and deadlines that it missed
    proven: int = 0  # of these, failures on healthy workers
    missed: int = 0  # of these, missed deadlines
    lost: int = 0  # workers that died with it, or whose device failed
    failed_on: list[_Worker] = field(default_factory=list)
    failed_at: float = 0.0  # time of the first failure, in seconds
    copies: int = 0  # workers that have it now


class _Mapping(Generic[Item, Result]):
    """One `map` over a pool.

    Futures put themselves into a queue when they are done, so the time for an item does not depend on the number of
    workers.
    """

    def __init__(self, actors: list[Any], items: Iterable[Item], tries: int) -> None:
        self._tries = tries
        self._workers = [_Worker(actor) for actor in actors]
        self._idle: deque[_Worker] = deque()
        self._busy: dict[_Worker, None] = {}  # in the order in which their tasks began
        self._away: deque[tuple[float, _Worker]] = deque()  # (time of the next search for it, worker)
        self._fresh = (_Task(item) for item in items)
        self._next = next(self._fresh, None)
        self._open: set[_Task[Item]] = set()  # tasks that have begun, and have neither succeeded nor been given up
        self._waiting: deque[_Task[Item]] = deque()  # those of them that failed
        self._answers: SimpleQueue[tuple[Callable[[Any], tuple[Item, Result] | None], Any]] = SimpleQueue()
        self._seconds, self._longest, self._done = 0.0, 0.0, 0  # of all done items
        self._failed, self._reasons = 0, list[str]()
        self._any_made = False
        self._begun, self._checked = time.monotonic(), 0.0
        self._name_after, self._name_pause = 0.0, SLOW_SECONDS  # next log line about slow items, and the pause after it

    def results(self) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) as items complete."""
        for worker in self._workers:
            self._find(worker)
        while self._next is not None or self._open:
            self._hand_out()
            result = None
            with contextlib.suppress(Empty):
                take, future = self._answers.get(timeout=POLL_SECONDS)
                result = take(future)
            if result is not None:
                yield result
            if time.monotonic() > self._checked + POLL_SECONDS:
                self._check()
        self._publish()
        self._conclude()

    def _ask(self, reference: Any, take: Callable[[Any], tuple[Item, Result] | None]) -> None:
        """Let the loop call `take(future)`, which may return a result, when the call of an actor has returned."""
        reference.future().add_done_callback(lambda future: self._answers.put((take, future)))

    # A worker is found, created and given items. When its process ends, for any reason, it is searched for again.

    def _find(self, worker: _Worker) -> None:
        self._ask(worker.actor.is_there.remote(), partial(self._found, worker))

    def _find_later(self, worker: _Worker) -> None:
        self._away.append((time.monotonic() + POLL_SECONDS, worker))

    def _found(self, worker: _Worker, future: Any) -> None:
        from ray.exceptions import ActorDiedError

        if isinstance(error := future.exception(), ActorDiedError):
            self._not_made(worker, error)
        elif error is not None:  # Ray restarts it when a node has room
            self._find_later(worker)
        else:
            worker.is_running = True
            if worker.node != future.result():  # failures on another node do not count on this one
                worker.node, worker.starts, worker.strikes = future.result(), 0, 0
            self._ask(worker.actor.ready.remote(HANG_SECONDS), partial(self._made, worker))

    def _made(self, worker: _Worker, future: Any) -> None:
        if (error := future.exception()) is not None:
            self._not_made(worker, error)
            return
        self._any_made, worker.starts = True, 0
        self._idle.append(worker)

    def _not_made(self, worker: _Worker, error: BaseException) -> None:
        worker.is_running = is_raised(error)
        worker.starts += 1
        worker.note(f"it could not be created: {reason_of(error)}")
        if worker.starts >= START_TRIES:
            log.warning("the worker on %s is not used any more, the others continue: %s", worker.node, worker.reason)
            worker.is_running, worker.dropped = False, True
        elif is_device_error(error):
            self._restart(worker)
        else:
            self._find_later(worker)

    def _strike(self, worker: _Worker, reason: str, restart: bool, died: bool) -> None:
        """Record an item that failed on a worker, and restart the worker if it must be."""
        worker.note(reason)
        worker.is_healthy = False
        worker.strikes += 1
        if worker.strikes == STRIKES_TO_BENCH:
            log.warning("the worker on %s gets no items while others succeed: %s", worker.node, reason)
        if died:  # Ray restarts it
            worker.is_running = False
            self._find(worker)
        elif restart or worker.strikes % STRIKES_TO_RESTART == 0:
            self._restart(worker)
        else:
            self._idle.append(worker)

    def _restart(self, worker: _Worker) -> None:
        log.warning("restarting the worker on %s, the job continues: %s", worker.node, worker.reason)
        worker.is_running = False
        restart_process(worker.actor)
        self._find_later(worker)

    # An item is given to a worker, and is done, fails, or hangs.

    def _hand_out(self) -> None:
        for _ in range(len(self._idle)):
            worker = self._idle.popleft()
            if (task := self._choose(worker)) is not None:
                task.copies += 1
                worker.task, worker.begun = task, time.monotonic()
                worker.deadline = max(HANG_SECONDS, HANGING * self._longest) * 2**task.missed
                self._busy[worker] = None
                self._ask(worker.actor.work.remote(task.item, worker.deadline), partial(self._answered, worker))
                continue
            self._idle.append(worker)
            if not self._waiting and not worker.is_benched:
                return

    def _choose(self, worker: _Worker) -> _Task[Item] | None:
        """Return an item for an idle worker: one that failed elsewhere, else a new one, else a straggler."""
        if worker.is_benched and any(w.is_running and not w.is_benched for w in self._workers):
            return None
        for task in self._waiting:
            if worker not in task.failed_on or not self._has_untried(task):
                self._waiting.remove(task)
                return task
        if self._next is not None:
            task, self._next = self._next, next(self._fresh, None)
            self._open.add(task)
            return task
        first = next((busy for busy in self._busy if busy.task.copies == 1 and busy.task in self._open), None)
        if first is None or worker in first.task.failed_on or not self._is_straggling(first):
            return None
        return first.task

    def _is_straggling(self, worker: _Worker) -> bool:
        mean = self._seconds / self._done if self._done else float("inf")
        return time.monotonic() - worker.begun > max(POLL_SECONDS, STRAGGLING * mean)

    def _has_untried(self, task: _Task[Item]) -> bool:
        """Return whether there is a worker that has not tried an item, or one that is still worth waiting for."""
        absent_too = time.monotonic() < task.failed_at + PATIENCE_SECONDS
        usable = (w for w in self._workers if (w.is_running or absent_too) and not w.dropped and not w.is_benched)
        return any(worker not in task.failed_on for worker in usable)

    def _answered(self, worker: _Worker, future: Any) -> tuple[Item, Result] | None:
        """Return the item and its result, or None if it failed or another worker was quicker."""
        del self._busy[worker]
        task, seconds = worker.task, time.monotonic() - worker.begun
        task.copies -= 1
        if (error := future.exception()) is None:
            worker.is_healthy, worker.strikes = True, 0
            self._idle.append(worker)
            if task not in self._open:
                return None
            self._open.remove(task)
            self._seconds += seconds
            self._longest = max(self._longest, seconds)
            self._done += 1
            return task.item, future.result()
        died, broken = not is_raised(error), is_device_error(error)
        hung = died and seconds >= worker.deadline
        lost = (died and not hung) or broken
        task.missed += hung
        task.lost += lost
        task.failures += not lost
        task.proven += not lost and worker.is_healthy
        task.failed_at = task.failed_at or time.monotonic()
        task.failed_on.append(worker)
        reason = f"item {task.item} gave no result in {seconds:.0f} s" if hung else reason_of(error)
        self._strike(worker, reason, restart=broken, died=died)
        if task in self._open and not task.copies:
            self._retry(task, reason)
        return None

    def _retry(self, task: _Task[Item], reason: str) -> None:
        """Retry an item, or give it up if it fails on healthy workers or on all workers."""
        alone = task.failures >= MOST_TRIES or not self._has_untried(task)
        if task.lost < LOST_WORKERS and task.proven < self._tries and not (task.failures >= self._tries and alone):
            self._waiting.append(task)
            return
        for tried in task.failed_on:  # the item is the cause, not these workers
            tried.strikes = max(0, tried.strikes - 1)
            tried.failures -= 1
        self._open.remove(task)
        self._failed += 1
        text = f"{task.item}, {task.failures + task.lost} times: {reason}"
        if len(self._reasons) < 5:
            self._reasons.append(text)
        log.warning("an item failed permanently, the others continue: %s", text)

    # Once a second: search for absent workers, log slow items, and publish metrics.

    def _check(self) -> None:
        self._checked = now = time.monotonic()
        while self._away and self._away[0][0] <= now:
            self._find(self._away.popleft()[1])
        self._name_slow(now)
        self._publish()
        waits = self._any_made or now < self._begun + PATIENCE_SECONDS or all(not w.dropped for w in self._workers)
        if not any(w.is_running or (waits and not w.dropped) for w in self._workers):
            raise RuntimeError(f"no worker is left, and some items are not done: {self._summary()}")

    def _name_slow(self, now: float) -> None:
        """Log the items that take much longer than others, with growing pauses between the log lines."""
        if now < self._name_after or not self._done:
            return
        mean = self._seconds / self._done
        limit = max(SLOW_SECONDS, SLOW * mean)
        slow = [worker for worker in self._busy if now - worker.begun > limit]
        for worker in slow:
            worker.note(f"item {worker.task.item} runs for {now - worker.begun:.0f} s, others for {mean:.1f} s")
        if slow:
            named = "; ".join(f"{worker.node}: {worker.reason}" for worker in slow[:3])
            log.warning("slow workers (%d), the job continues: %s", len(slow), named)
            self._name_after, self._name_pause = now + self._name_pause, 2 * self._name_pause

    def _publish(self) -> None:
        publish(
            "pool",
            {
                "items_running": len(self._busy),
                "items_done": self._done,
                "items_failed": self._failed,
                "items_to_repeat": len(self._waiting),
                "workers_idle": len(self._idle),
                "workers_away": sum(not w.is_running and not w.dropped for w in self._workers),
                "workers_lost": sum(w.dropped or w.is_benched for w in self._workers),
            },
        )

    def _conclude(self) -> None:
        """Log the workers that failed. Raise `ItemsFailed` if items failed."""
        for worker in filter(self._is_straggling, self._busy):
            worker.note(f"it gave no result for item {worker.task.item}, which another worker has done")
        summary = self._summary()
        if self._failed:
            reasons = "; ".join(self._reasons)
            workers = f"; workers that failed: {summary}" if summary else ""
            raise ItemsFailed(f"{self._failed} items failed, the others are done: {reasons}{workers}")
        if summary:
            log.warning("all items are done, workers that failed: %s", summary)

    def _summary(self) -> str:
        failed = [w for w in self._workers if w.failures]
        named = [
            f"{w.node}: {w.failures} times{', unused' * (w.dropped or w.is_benched)}: {w.reason}" for w in failed[:10]
        ]
        return "; ".join(named + [f"and {len(failed) - 10} more"] * (len(failed) > 10))
