"""Measure the overhead of the worker pool: two actors compared with two plain processes. Run by hand:

    python -m tests.benchmarks.pool_efficiency --store DIR [--pairs 20] [--shards 8]

DIR contains `digits/diffusion` and `digits/classifier` of the quickstart. Both sides sample with the same function and
running workers; the plain processes take ranges from a queue. A pair is one short run of each side, in random order.
Prints the rates of both, and the median ratio of the pool's rate to the plain rate with a 95% interval. The exit code
is 0 if the lower end of the interval is at least 0.95.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tyro

from cluster.session import session
from cluster.workers import pool
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator import storage
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.job import make_generator
from orchestrator.generation.samples import Shard

WORKERS = 2
SIZE = 64  # images in a shard
Run = Callable[[list[Shard]], None]


@dataclass(frozen=True)
class Options:
    """The measurement."""

    store: str  # with digits/diffusion and digits/classifier
    pairs: int = 20  # alternating pairs
    shards: int = 12  # of 64 images, in each run
    num_steps: int = 10  # of the DDIM chain


def main(options: Options) -> int:
    """Print the rates, and return the exit code."""
    rng, rates = np.random.default_rng(0), dict[str, list[float]](pool=[], plain=[])
    with tempfile.TemporaryDirectory() as folder, actors(options, folder) as ours, processes(options, folder) as plain:
        sides, begin = {"pool": ours, "plain": plain}, 0
        for pair in range(-1, options.pairs):  # the first pair is a warm-up
            for name in rng.permutation(list(sides)):
                shards = [Shard(begin + i * SIZE, begin + (i + 1) * SIZE) for i in range(options.shards)]
                begin += options.shards * SIZE
                started = time.perf_counter()
                sides[name](shards)
                if pair >= 0:
                    rates[name].append(options.shards * SIZE / (time.perf_counter() - started))
    ratios = np.sort(np.array(rates["pool"]) / np.array(rates["plain"]))
    low, high = median_interval(ratios)
    for name, values in rates.items():
        print(f"{name:5} {np.median(values):7.1f} images/s")
    print(
        f"pool/plain over {options.pairs} pairs: median {np.median(ratios):.3f}, 95% interval {low:.3f} to {high:.3f}"
    )
    return 0 if low >= 0.95 else 1


def median_interval(ordered: np.ndarray) -> tuple[float, float]:
    """Return order statistics that contain the median with at least 95%: n/2 -+ 1.96 sqrt(n)/2, rounded outwards."""
    half = 0.98 * np.sqrt(len(ordered))
    low, high = int(np.floor(len(ordered) / 2 - half)), int(np.ceil(len(ordered) / 2 + half))
    return float(ordered[max(low, 0)]), float(ordered[min(high, len(ordered) - 1)])


def generation(options: Options, output: str) -> GenerationConfig:
    """Return the config of guided sampling of digits."""
    return GenerationConfig(
        store=options.store, weights="digits/diffusion", classifier="digits/classifier", output=output,
        num_samples=10**9, sampler=SamplerConfig(name="ddim", num_steps=options.num_steps),
        guidance=GuidanceConfig(scale=1.0), batch_size=SIZE, shard_size=SIZE,
    )  # fmt: skip


@contextmanager
def actors(options: Options, folder: str) -> Iterator[Run]:
    """Yield a function that samples shards with the pool."""
    make = partial(make_generator, generation(options, storage.join(folder, "pool")))
    with session(WORKERS, object_store_memory=100 << 20), pool(make, WORKERS) as workers:

        def run(shards: list[Shard]) -> None:
            for _ in workers.map(shards):
                pass

        yield run


@contextmanager
def processes(options: Options, folder: str) -> Iterator[Run]:
    """Yield a function that samples shards with plain processes, which take them from a queue."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    config = generation(options, storage.join(folder, "plain"))
    workers = [context.Process(target=work, args=(config, todo, done), daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()

    def run(shards: list[Shard]) -> None:
        for shard in shards:
            todo.put(shard)
        for _ in shards:
            done.get(timeout=300)

    yield run
    for _ in workers:
        todo.put(None)
    for worker in workers:
        worker.join()


def work(config: GenerationConfig, todo: Any, done: Any) -> None:
    """Sample shards from a queue, in a plain process."""
    os.nice(15)  # like Ray's workers, so that both sides have the same priority
    make_shard = make_generator(config)
    while (shard := todo.get()) is not None:
        done.put(make_shard(shard))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options, description=__doc__)))
