"""Measure the time saved by drawing noise in advance. Run by hand:

    python -m tests.benchmarks.noise_ahead [--pairs 8]

A step of a chain waits for its device (a sleep, because an accelerator leaves the CPU free) and then needs noise, which
is drawn either on demand or in advance by threads. The same is measured for steps that keep one core busy, as sampling
on a CPU does: there drawing in advance can save nothing and should cost nothing. Prints the median seconds of a chain
for both ways, and the median ratio.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import tyro

from orchestrator.generation.noise import Draw, draw_noise, noise_ahead
from orchestrator.order import Purpose
from tests.benchmarks.pool_efficiency import median_interval


@dataclass(frozen=True)
class Options:
    """The measurement."""

    pairs: int = 8
    steps: int = 6  # of a chain


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    matrix = torch.randn(1024, 1024)

    def busy(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            matrix @ matrix

    print(f"{'shape':16} {'step':>22} {'demand s':>8} {'ahead s':>8} {'demand/ahead':>12}  95% interval")
    for batch, size, seconds in ((256, 64, 0.19), (64, 256, 0.40), (64, 8, 0.02)):
        for kind, step in (("device", time.sleep), ("this core", busy)):
            row(options, (batch, 3, size, size), f"{seconds * 1e3:.0f} ms on {kind}", partial(step, seconds))


def row(options: Options, shape: tuple[int, int, int, int], name: str, step: Callable[[], None]) -> None:
    """Print a row: alternating chains with noise on demand and in advance."""
    keys = [Draw(tuple(range(shape[0])), shape[1:], Purpose.STEP, t) for t in range(options.steps)]

    def on_demand() -> None:
        for key in keys:
            step()
            draw_noise(0, key)

    def ahead() -> None:
        with noise_ahead(0, keys) as draw:
            for key in keys:
                step()
                draw(key)

    times: dict[str, list[float]] = {"demand": [], "ahead": []}
    for pair in range(options.pairs):
        for kind, run in sorted({"demand": on_demand, "ahead": ahead}.items(), reverse=bool(pair % 2)):
            begun = time.perf_counter()
            run()
            times[kind].append(time.perf_counter() - begun)
    ratios = np.sort(np.array(times["demand"]) / np.array(times["ahead"]))
    low, high = median_interval(ratios)
    medians = f"{np.median(times['demand']):8.2f} {np.median(times['ahead']):8.2f}"
    print(f"{shape!s:16} {name:>22} {medians} {np.median(ratios):12.2f}  {low:.2f} to {high:.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
