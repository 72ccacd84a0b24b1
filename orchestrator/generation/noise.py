"""The noise of generated images, which threads draw ahead of the sampler."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.order import Purpose, index_rng

THREADS = 2  # numpy releases the GIL while it draws
AHEAD = 4  # tensors that are drawn ahead


class Draw(NamedTuple):
    """The key of a tensor of standard normal noise, float32 [n, C, H, W]."""

    indices: tuple[int, ...]
    shape: tuple[int, int, int]  # C, H, W
    purpose: Purpose
    timestep: int = 0  # of the original chain


DrawNoise = Callable[[Draw], Tensor]


def draw_noise(seed: int, draw: Draw) -> Tensor:
    """Return the noise of a key; it depends on the seed and the key only."""
    rows = np.empty((len(draw.indices), *draw.shape), np.float32)
    for row, index in zip(rows, draw.indices, strict=True):
        index_rng(seed, index, draw.purpose, draw.timestep).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


class NoiseAhead:
    """A context that returns the noise of a plan of draws in its order, while threads draw the next tensors.

    pin: return tensors in pinned memory, from which copies to a GPU are asynchronous.
    """

    def __init__(self, seed: int, plan: Iterable[Draw], pin: bool = False) -> None:
        self._seed, self._pin = seed, pin
        self._plan: Iterator[Draw] = iter(plan)
        self._drawn: deque[tuple[Draw, Future[Tensor]]] = deque()
        self._threads = ThreadPoolExecutor(THREADS, "noise")
        self._go_on(AHEAD)

    def __call__(self, draw: Draw) -> Tensor:
        planned, tensor = self._drawn.popleft()
        if planned != draw:
            raise RuntimeError(f"the noise of {draw.purpose.name} {draw.timestep} is not the next in the plan")
        self._go_on(1)
        return tensor.result()

    def __enter__(self) -> "NoiseAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _go_on(self, count: int) -> None:
        for draw in islice(self._plan, count):
            self._drawn.append((draw, self._threads.submit(self._make, draw)))

    def _make(self, draw: Draw) -> Tensor:
        tensor = draw_noise(self._seed, draw)
        return tensor.pin_memory() if self._pin else tensor
