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

from cluster.actor import WorkerActor, is_device_error, is_task_error, reason_of, restart_process
from cluster.capacity import refuse_infeasible, report_waiting, worker_resources
from cluster.metrics import publish

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]
MakeWorker = Callable[[], Work[Item, Result]]
Callback = Callable[[Any], tuple[Item, Result] | None]  # takes a future; may return an item and its result

START_TRIES = 3  # consecutive failures to create a worker, after which it is no longer used
FAILURES_TO_RESTART = 2  # consecutive items that raise errors on a worker, after which its process is restarted
FAILURES_TO_BENCH = 4  # consecutive items that fail on a worker, after which it gets none while others succeed
LOST_WORKERS = 10  # processes that may die with an item, before the item counts as the cause (nodes are preempted)
MAX_TRIES = 10  # of an item that failed only on workers that may be faulty themselves
# The next two are factors of the mean duration of an item.
STRAGGLING = 3.0  # an item that takes longer is also given to an idle worker
SLOW = 10.0  # an item that takes longer is logged
SLOW_SECONDS = 60.0  # an item that takes less is never logged; also the first pause between two such log lines
# A process ends itself if an item misses its deadline. The deadline is the longer of these two. An item may compile
# first and take hours on a slow GPU, so HANG_SECONDS is long. Idle workers repeat hung items much earlier (STRAGGLING).
HANG_SECONDS = 120 * 60.0  # doubled for an item each time the item misses its deadline
HANGING = 10.0  # factor of the duration of the longest item so far
PATIENCE_SECONDS = 300.0  # how long a failed item waits for an absent worker that has not tried it
POLL_SECONDS = 1.0  # between two calls of `_Mapping._check`
FAILURES_SHOWN = 5  # failed items that an error names
WORKERS_SHOWN = 10  # failed workers that an error or a log line names

log = logging.getLogger(__name__)


class ItemsFailed(RuntimeError):
    """Some items failed permanently; all others are done."""


def map_items(
    make_worker: MakeWorker[Item, Result],
    items: Iterable[Item],
    num_workers: int,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Iterator[tuple[Item, Result]]:
    """Run every item on one of `num_workers` workers (0: in this process). Yield (item, result) as items complete.

    Raises what `pool` and `Pool.map` raise.
    """
    with pool(make_worker, num_workers, num_cpus, num_gpus) as workers:
        yield from workers.map(items)


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
        yield _InProcessPool(make_worker())
        return
    import ray

    resources = worker_resources(num_cpus, num_gpus)
    refuse_infeasible(resources)
    kind = {name: value for name, value in resources.items() if name not in ("CPU", "GPU")}
    remote = ray.remote(WorkerActor).options(num_cpus=num_cpus, num_gpus=num_gpus, resources=kind, max_restarts=-1)
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
    """Handles on the workers of a pool, which can be sent to other processes.

    Several processes may map over one pool at the same time. Each has at most one item on a worker, so that they share
    the pool fairly. The share of a process that stops is free at once.
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


class _InProcessPool(Pool[Item, Result]):
    """A pool of this process only: items run in order, and errors are raised unchanged."""

    def __init__(self, work: Work[Item, Result]) -> None:
        super().__init__([])
        self._work = work

    def map(self, items: Iterable[Item], tries: int = 3) -> Iterator[tuple[Item, Result]]:
        for item in items:
            yield item, self._work(item)


@dataclass(eq=False)
class _Worker:
    """The state of a worker from the view of one mapping, which gives it one item at a time."""

    actor: Any
    node: str = "a node that is not known yet"
    is_alive: bool = False  # its process runs
    is_dropped: bool = False  # it is no longer used, because it could not be created
    is_healthy: bool = False  # its last item succeeded
    failed_starts: int = 0  # consecutive failures to create it
    consecutive_failures: int = 0  # consecutive items that failed on it
    failures: int = 0  # in total, without those of items that fail on all workers
    reason: str = ""  # of the last failure
    task: Any = None  # the task that it runs, or ran last
    began_at: float = 0.0  # when the task began, in seconds of the monotonic clock
    deadline: float = 0.0  # of the task, in seconds after `began_at`

    @property
    def is_benched(self) -> bool:
        """Return whether it gets no items while other workers succeed."""
        return self.consecutive_failures >= FAILURES_TO_BENCH

    def note(self, reason: str) -> None:
        """Record a failure."""
        self.failures += 1
        self.reason = reason


@dataclass(eq=False)
class _Task(Generic[Item]):
    """An item and its failures."""

    item: Item
    failures: int = 0  # errors that it raised, and deadlines that it missed
    proven_failures: int = 0  # of these, failures on healthy workers
    missed_deadlines: int = 0  # of these, missed deadlines
    lost_workers: int = 0  # workers that died with it, or whose device failed
    failed_on: list[_Worker] = field(default_factory=list)
    failed_at: float = 0.0  # when it failed first, in seconds of the monotonic clock
    num_running: int = 0  # workers that run it now


class _Mapping(Generic[Item, Result]):
    """The loop of one `Pool.map`.

    A call of an actor puts its future into a queue when it is done, so the loop's time for an item does not depend on
    the number of workers.
    """

    def __init__(self, actors: list[Any], items: Iterable[Item], tries: int) -> None:
        self._tries = tries
        self._workers = [_Worker(actor) for actor in actors]
        self._idle: deque[_Worker] = deque()
        self._busy: dict[_Worker, None] = {}  # in the order in which their tasks began
        self._absent: deque[tuple[float, _Worker]] = deque()  # (time of the next attempt to locate it, worker)
        self._new_tasks = (_Task(item) for item in items)
        self._next_task = next(self._new_tasks, None)
        self._unfinished: set[_Task[Item]] = set()  # tasks that have begun, but neither succeeded nor failed for good
        self._to_retry: deque[_Task[Item]] = deque()  # unfinished tasks that failed and wait for a worker
        self._completions: SimpleQueue[tuple[Callback[Item, Result], Any]] = SimpleQueue()  # (callback, future)
        self._num_done, self._total_seconds, self._longest_seconds = 0, 0.0, 0.0  # of the items that are done
        self._num_failed = 0
        self._failure_texts: list[str] = []  # about the first of the failed items
        self._any_created = False  # whether any worker was ever created
        self._started_at, self._checked_at = time.monotonic(), 0.0
        self._slow_log_due, self._slow_log_pause = 0.0, SLOW_SECONDS  # time of the next line, and the pause after it

    def results(self) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) as items complete."""
        for worker in self._workers:
            self._locate(worker)
        while self._next_task is not None or self._unfinished:
            self._assign_tasks()
            result = None
            with contextlib.suppress(Empty):
                callback, future = self._completions.get(timeout=POLL_SECONDS)
                result = callback(future)
            if result is not None:
                yield result
            if time.monotonic() > self._checked_at + POLL_SECONDS:
                self._check()
        self._publish()
        self._conclude()

    def _when_done(self, reference: Any, callback: Callback[Item, Result]) -> None:
        """Let the loop call `callback(future)` when the call of an actor has returned."""
        reference.future().add_done_callback(lambda future: self._completions.put((callback, future)))

    # The life of a worker: it is located, created, and given items. When its process ends, it is located again.

    def _locate(self, worker: _Worker) -> None:
        """Ask the worker for its node. It responds when its process has started."""
        self._when_done(worker.actor.node_name.remote(), partial(self._on_located, worker))

    def _locate_later(self, worker: _Worker) -> None:
        self._absent.append((time.monotonic() + POLL_SECONDS, worker))

    def _on_located(self, worker: _Worker, future: Any) -> None:
        from ray.exceptions import ActorDiedError

        if isinstance(error := future.exception(), ActorDiedError):
            self._on_creation_failed(worker, error)
        elif error is not None:  # Ray restarts it when a node has room
            self._locate_later(worker)
        else:
            worker.is_alive = True
            if worker.node != future.result():  # failures on another node do not count on this one
                worker.node, worker.failed_starts, worker.consecutive_failures = future.result(), 0, 0
            self._when_done(worker.actor.ready.remote(HANG_SECONDS), partial(self._on_created, worker))

    def _on_created(self, worker: _Worker, future: Any) -> None:
        if (error := future.exception()) is not None:
            self._on_creation_failed(worker, error)
            return
        self._any_created, worker.failed_starts = True, 0
        self._idle.append(worker)

    def _on_creation_failed(self, worker: _Worker, error: BaseException) -> None:
        worker.is_alive = is_task_error(error)
        worker.failed_starts += 1
        worker.note(f"it could not be created: {reason_of(error)}")
        if worker.failed_starts >= START_TRIES:
            log.warning("the worker on %s is not used any more, the others continue: %s", worker.node, worker.reason)
            worker.is_alive, worker.is_dropped = False, True
        elif is_device_error(error):
            self._restart(worker)
        else:
            self._locate_later(worker)

    def _record_failure(self, worker: _Worker, reason: str, restart: bool, died: bool) -> None:
        """Record an item that failed on a worker, and restart the worker if necessary."""
        worker.note(reason)
        worker.is_healthy = False
        worker.consecutive_failures += 1
        if worker.consecutive_failures == FAILURES_TO_BENCH:
            log.warning("the worker on %s gets no items while others succeed: %s", worker.node, reason)
        if died:  # Ray restarts it
            worker.is_alive = False
            self._locate(worker)
        elif restart or worker.consecutive_failures % FAILURES_TO_RESTART == 0:
            self._restart(worker)
        else:
            self._idle.append(worker)

    def _restart(self, worker: _Worker) -> None:
        log.warning("restarting the worker on %s, the job continues: %s", worker.node, worker.reason)
        worker.is_alive = False
        restart_process(worker.actor)
        self._locate_later(worker)

    # The life of an item: a worker runs it, and it succeeds, fails or hangs.

    def _assign_tasks(self) -> None:
        """Give tasks to idle workers, until there are no tasks that they may run."""
        for _ in range(len(self._idle)):
            worker = self._idle.popleft()
            task = self._choose_task(worker)
            if task is None:
                self._idle.append(worker)
                if not self._to_retry and not worker.is_benched:
                    return  # the other idle workers would not get a task either
                continue
            task.num_running += 1
            worker.task, worker.began_at = task, time.monotonic()
            worker.deadline = max(HANG_SECONDS, HANGING * self._longest_seconds) * 2**task.missed_deadlines
            self._busy[worker] = None
            self._when_done(worker.actor.work.remote(task.item, worker.deadline), partial(self._on_result, worker))

    def _choose_task(self, worker: _Worker) -> _Task[Item] | None:
        """Return a task for an idle worker: one that failed elsewhere, else a new one, else a straggler, or None."""
        if worker.is_benched and any(w.is_alive and not w.is_benched for w in self._workers):
            return None
        for task in self._to_retry:
            if worker not in task.failed_on or not self._has_untried(task):
                self._to_retry.remove(task)
                return task
        if self._next_task is not None:
            task, self._next_task = self._next_task, next(self._new_tasks, None)
            self._unfinished.add(task)
            return task
        # The worker that has been busy for longest with a task that no other worker repeats.
        slowest = next((w for w in self._busy if w.task.num_running == 1 and w.task in self._unfinished), None)
        if slowest is None or worker in slowest.task.failed_on or not self._is_straggling(slowest):
            return None
        return slowest.task

    def _is_straggling(self, worker: _Worker) -> bool:
        """Return whether a busy worker takes much longer than the mean, so that its item should be repeated."""
        mean = self._total_seconds / self._num_done if self._num_done else float("inf")
        return time.monotonic() - worker.began_at > max(POLL_SECONDS, STRAGGLING * mean)

    def _has_untried(self, task: _Task[Item]) -> bool:
        """Return whether a worker has not tried a task. For a while after its failure, absent workers count too."""
        absent_count = time.monotonic() < task.failed_at + PATIENCE_SECONDS
        usable = (w for w in self._workers if (w.is_alive or absent_count) and not w.is_dropped and not w.is_benched)
        return any(worker not in task.failed_on for worker in usable)

    def _on_result(self, worker: _Worker, future: Any) -> tuple[Item, Result] | None:
        """Return the item and its result, or None if it failed or another worker has returned it already."""
        del self._busy[worker]
        task, seconds = worker.task, time.monotonic() - worker.began_at
        task.num_running -= 1
        if (error := future.exception()) is None:
            worker.is_healthy, worker.consecutive_failures = True, 0
            self._idle.append(worker)
            if task not in self._unfinished:
                return None
            self._unfinished.remove(task)
            self._total_seconds += seconds
            self._longest_seconds = max(self._longest_seconds, seconds)
            self._num_done += 1
            return task.item, future.result()
        died, is_broken = not is_task_error(error), is_device_error(error)
        hung = died and seconds >= worker.deadline
        is_lost = (died and not hung) or is_broken
        if is_lost:
            task.lost_workers += 1
        else:
            task.failures += 1
            task.missed_deadlines += hung
            task.proven_failures += worker.is_healthy
        task.failed_at = task.failed_at or time.monotonic()
        task.failed_on.append(worker)
        reason = f"item {task.item} gave no result in {seconds:.0f} s" if hung else reason_of(error)
        self._record_failure(worker, reason, restart=is_broken, died=died)
        if task in self._unfinished and not task.num_running:
            self._retry(task, reason)
        return None

    def _retry(self, task: _Task[Item], reason: str) -> None:
        """Retry a task, or count its item as failed if it fails on healthy workers or on all workers."""
        has_no_other_worker = task.failures >= MAX_TRIES or not self._has_untried(task)
        has_failed = (
            task.lost_workers >= LOST_WORKERS
            or task.proven_failures >= self._tries
            or (task.failures >= self._tries and has_no_other_worker)
        )
        if not has_failed:
            self._to_retry.append(task)
            return
        for worker in task.failed_on:  # the item is the cause, not these workers
            worker.consecutive_failures = max(0, worker.consecutive_failures - 1)
            worker.failures -= 1
        self._unfinished.remove(task)
        self._num_failed += 1
        text = f"{task.item}, {task.failures + task.lost_workers} times: {reason}"
        if len(self._failure_texts) < FAILURES_SHOWN:
            self._failure_texts.append(text)
        log.warning("an item failed permanently, the others continue: %s", text)

    def _check(self) -> None:
        """Locate absent workers, log slow items, publish metrics, and raise RuntimeError if no worker is left."""
        self._checked_at = now = time.monotonic()
        while self._absent and self._absent[0][0] <= now:
            self._locate(self._absent.popleft()[1])
        self._log_slow_items(now)
        self._publish()
        may_wait = (  # for workers that are absent
            self._any_created
            or now < self._started_at + PATIENCE_SECONDS
            or not any(w.is_dropped for w in self._workers)
        )
        if not any(w.is_alive or (may_wait and not w.is_dropped) for w in self._workers):
            raise RuntimeError(f"no worker is left, and some items are not done: {self._summary()}")

    def _log_slow_items(self, now: float) -> None:
        """Log the items that take much longer than others. The pause between two lines doubles each time."""
        if now < self._slow_log_due or not self._num_done:
            return
        mean = self._total_seconds / self._num_done
        limit = max(SLOW_SECONDS, SLOW * mean)
        slow = [worker for worker in self._busy if now - worker.began_at > limit]
        for worker in slow:
            worker.note(f"item {worker.task.item} runs for {now - worker.began_at:.0f} s, others for {mean:.1f} s")
        if slow:
            listed = "; ".join(f"{worker.node}: {worker.reason}" for worker in slow[:3])
            log.warning("slow workers (%d), the job continues: %s", len(slow), listed)
            self._slow_log_due, self._slow_log_pause = now + self._slow_log_pause, 2 * self._slow_log_pause

    def _publish(self) -> None:
        publish(
            "pool",
            {
                "items_running": len(self._busy),
                "items_done": self._num_done,
                "items_failed": self._num_failed,
                "items_to_repeat": len(self._to_retry),
                "workers_idle": len(self._idle),
                "workers_away": sum(not w.is_alive and not w.is_dropped for w in self._workers),
                "workers_lost": sum(w.is_dropped or w.is_benched for w in self._workers),
            },
        )

    def _conclude(self) -> None:
        """Log the workers that failed. Raise `ItemsFailed` if items failed."""
        for worker in filter(self._is_straggling, self._busy):
            worker.note(f"it gave no result for item {worker.task.item}, which another worker has done")
        summary = self._summary()
        if self._num_failed:
            reasons = "; ".join(self._failure_texts)
            workers = f"; workers that failed: {summary}" if summary else ""
            raise ItemsFailed(f"{self._num_failed} items failed, the others are done: {reasons}{workers}")
        if summary:
            log.warning("all items are done, workers that failed: %s", summary)

    def _summary(self) -> str:
        """Return the workers that failed, with their nodes and reasons, or an empty string."""
        failed = [worker for worker in self._workers if worker.failures]
        parts = []
        for worker in failed[:WORKERS_SHOWN]:
            unused = ", unused" if worker.is_dropped or worker.is_benched else ""
            parts.append(f"{worker.node}: {worker.failures} times{unused}: {worker.reason}")
        if len(failed) > WORKERS_SHOWN:
            parts.append(f"and {len(failed) - WORKERS_SHOWN} more")
        return "; ".join(parts)
