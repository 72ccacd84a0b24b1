"""A pool of warm workers: items in, results as they complete; any worker may die at any time."""

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]
MakeWorker = Callable[[], Work[Item, Result]]

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
    if num_workers == 0:
        work = make_worker()
        yield from ((item, work(item)) for item in items)
        return
    with pool(make_worker, num_workers, num_cpus, num_gpus) as workers:
        yield from workers.map(items, tries)


@contextlib.contextmanager
def pool(
    make_worker: MakeWorker[Item, Result], num_workers: int, num_cpus: float = 1.0, num_gpus: float = 0.0
) -> Iterator["Pool[Item, Result]"]:
    """`num_workers` actors, each of which calls `make_worker` once; they end with the context."""
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": -1}
    actors: list[Any] = [ray.remote(_Worker).options(**options).remote(make_worker) for _ in range(num_workers)]
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
        """Yield (item, result) as they complete, in no particular order.

        Work is handed out only to workers that have answered. A worker that dies is started again by Ray, and its
        item goes to another; results may therefore be computed twice, never lost.

        Raises:
            ItemsFailed: some items raised an error, or lost their worker, `tries` times; all others are done.
            RuntimeError: a worker could not be made, or none is left.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting, failures, errors = deque(enumerate(items)), Counter[int](), {}
        starting = {actor.ready.remote(): actor for actor in self._actors}
        running: dict[Any, tuple[Any, int, Item]] = {}
        idle: list[Any] = []
        while waiting or running:
            while waiting and idle:
                actor, (number, item) = idle.pop(), waiting.popleft()
                running[actor.work.remote(item)] = (actor, number, item)
            if not running and not starting:
                raise RuntimeError(f"no worker is left; {len(waiting)} items are not done")
            done, _ = ray.wait([*running, *starting], num_returns=1)
            if (reference := done[0]) in starting:
                actor = starting.pop(reference)
                try:
                    ray.get(reference)
                    idle.append(actor)
                except RayActorError as error:
                    log.warning("a worker ended for good: %s", _reason(error))
                except RayTaskError as error:
                    raise RuntimeError(f"a worker could not be made: {_reason(error)}") from error
                continue
            actor, number, item = running.pop(reference)
            try:
                result = ray.get(reference)
            except (RayActorError, RayTaskError) as error:
                if isinstance(error, RayTaskError):
                    idle.append(actor)
                else:
                    starting[actor.ready.remote()] = actor
                failures[number] += 1
                if failures[number] < tries:
                    waiting.append((number, item))
                else:
                    errors[number] = (item, _reason(error))
                continue
            idle.append(actor)
            yield item, result
        if errors:
            reasons = "; ".join(f"{item}: {reason}" for item, reason in list(errors.values())[:5])
            raise ItemsFailed(f"{len(errors)} items failed {tries} times each, the others are done: {reasons}")


class _Worker:
    """What runs in an actor. The worker is made in `ready`, so that its errors come back as errors of a call."""

    def __init__(self, make_worker: MakeWorker[Any, Any]) -> None:
        self._make_worker = make_worker
        self._work: Work[Any, Any] | None = None

    def ready(self) -> None:
        if self._work is None:
            self._work = self._make_worker()

    def work(self, item: Any) -> Any:
        if self._work is None:  # started again after its death, and given work before it was asked to be ready
            self.ready()
        assert self._work is not None
        return self._work(item)


def _reason(error: Exception) -> str:
    """The last line of a remote error: its type and message, without the remote traceback."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
