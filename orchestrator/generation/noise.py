"""The noise of generated images, which threads draw ahead of the sampler."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.order import Purpose, index_rng

THREADS = 2  # threads that draw; numpy releases the GIL while it does
AHEAD = 4  # tensors that are drawn ahead


class Draw(NamedTuple):
    """The key of a tensor of standard normal noise, float32 [n, C, H, W]."""

    indices: tuple[int, ...]  # of the n samples
    shape: tuple[int, int, int]  # C, H, W
    purpose: Purpose
    timestep: int = 0  # of the original chain


def draw_noise(seed: int, draw: Draw) -> Tensor:
    """Return the noise of a key. It depends only on the seed and the key."""
    rows = np.empty((len(draw.indices), *draw.shape), np.float32)
    for row, index in zip(rows, draw.indices, strict=True):
        index_rng(seed, index, draw.purpose, draw.timestep).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


@contextlib.contextmanager
def noise_ahead(seed: int, plan: Iterable[Draw], pin: bool = False) -> Iterator[Callable[[Draw], Tensor]]:
    """Yield a function that returns the noise of a key, while threads draw the noise of the next keys.

    plan: the keys in the order in which the function is called with them.
    pin: return tensors in pinned memory, from which copies to a GPU are asynchronous.
    """
    remaining = iter(plan)
    drawn_ahead = deque[tuple[Draw, Future[Tensor]]]()
    threads = ThreadPoolExecutor(THREADS, "noise")

    def draw_tensor(draw: Draw) -> Tensor:
        tensor = draw_noise(seed, draw)
        return tensor.pin_memory() if pin else tensor

    def submit(count: int) -> None:
        drawn_ahead.extend((draw, threads.submit(draw_tensor, draw)) for draw in islice(remaining, count))

    def next_noise(draw: Draw) -> Tensor:
        planned, future = drawn_ahead.popleft()
        if planned != draw:
            raise RuntimeError(f"the noise of {draw.purpose.name} {draw.timestep} is not the next in the plan")
        submit(1)
        return future.result()

    try:
        submit(AHEAD)
        yield next_noise
    finally:
        threads.shutdown(cancel_futures=True)
