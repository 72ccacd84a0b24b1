"""Measure the cost of the pool's scheduling in the driver, for a thousand simulated actors. Run by hand:

    python -m tests.benchmarks.scheduler [--actors 1000] [--ranges 100000] [--seconds 5]

Prints the maximum rate at which the driver assigns ranges, and for comparison the time of `ray.wait` over all running
calls for each result. Then simulates a whole run of ranges with random durations, and prints its efficiency, its tail
(the time from the last assignment to the end), and the memory of the driver.
"""

import itertools
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tyro

from cluster.session import session
from cluster.workers import Pool
from tests.cluster.timed_actors import Clock, TimedActor


@dataclass(frozen=True)
class Options:
    """The simulation."""

    actors: int = 1_000
    ranges: int = 100_000
    seconds: float = 1.0  # mean duration of a range in the whole run; uniform from 0.5 to 1.5 times it
    ray_wait: bool = True  # also measure ray.wait over as many calls
    seed: int = 0


def main(options: Options) -> None:
    """Print the results."""
    print(options)
    for actors in (1, 10, 100, options.actors):
        seconds, _, _ = simulate(actors, min(options.ranges, 20_000), lambda _: 0.0)
        print(f"{actors:5d} actors, work without duration: {min(options.ranges, 20_000) / seconds:9,.0f} ranges/s")
    if options.ray_wait:
        print(
            f"{options.actors:5d} calls under ray.wait: {ray_wait_seconds(options.actors) * 1e3:.2f} ms for each result"
        )
    draws = random.Random(options.seed)
    lengths = [options.seconds * draws.uniform(0.5, 1.5) for _ in range(options.ranges)]
    tracemalloc.start()
    seconds, tail, memory = simulate(options.actors, options.ranges, lengths.__getitem__)
    ideal = sum(lengths) / options.actors
    print(
        f"{options.ranges:,} ranges of {options.seconds:g} s on {options.actors:,} actors: {seconds:.1f} s, "
        f"ideal {ideal:.1f} s ({ideal / seconds:.1%}); {options.ranges / seconds:,.0f} ranges/s, tail {tail:.2f} s; "
        f"driver's memory at a tenth {memory[0] / 2**20:.2f} MiB, at the end {memory[1] / 2**20:.2f} MiB"
    )


def simulate(actors: int, ranges: int, length: Callable[[int], float]) -> tuple[float, float, tuple[int, int]]:
    """Map `ranges` over `actors`; return the seconds, those of the tail, and traced bytes at a tenth and at the end."""
    clock = Clock()
    workers = [TimedActor(clock, length) for _ in range(actors)]
    for worker in workers:
        worker.worked = _EmptyList()
    last_handed = begun = time.perf_counter()
    memory = [0, 0]

    def items() -> Iterator[int]:
        nonlocal last_handed
        yield from range(ranges)
        last_handed = time.perf_counter()

    for done, _ in enumerate(Pool[int, int](workers).map(items()), 1):
        if tracemalloc.is_tracing() and done in (ranges // 10, ranges - actors):
            memory[done == ranges - actors] = tracemalloc.get_traced_memory()[0]
    ended = time.perf_counter()
    clock.end()
    return ended - begun, ended - last_handed, (memory[0], memory[1])


class _EmptyList(list):
    """A list that stays empty, so that the simulation's own memory does not grow."""

    def append(self, item: object) -> None:
        pass


def ray_wait_seconds(calls: int, repetitions: int = 50) -> float:
    """Return the mean seconds of `ray.wait` for the first of `calls` running calls."""
    import ray

    @ray.remote
    class Sleeper:
        def work(self, seconds: float) -> None:
            time.sleep(seconds)

    with session(1, object_store_memory=100 << 20):
        actor = Sleeper.remote()  # type: ignore[attr-defined]
        running = [actor.work.remote(3600.0) for _ in range(calls)]
        done = [ray.put(None) for _ in range(repetitions)]
        begun = time.perf_counter()
        for finished in itertools.islice(done, repetitions):
            ray.wait([*running, finished], num_returns=1)
        return (time.perf_counter() - begun) / repetitions


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
