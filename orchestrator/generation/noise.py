"""The noise of generated images, drawn by threads before the chain asks for it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.order import Purpose, index_rng

THREADS = 2  # numpy draws without the interpreter's lock
AHEAD = 4  # tensors drawn before they are asked for


class Draw(NamedTuple):
    """The key of a tensor of standard normal noise, float32 [n, C, H, W]."""

    indices: tuple[int, ...]
    shape: tuple[int, int, int]  # C, H, W
    purpose: Purpose
    timestep: int = 0  # the original one


DrawNoise = Callable[[Draw], Tensor]


def draw_noise(seed: int, draw: Draw) -> Tensor:
    """The noise of a key: equal for equal keys, whatever else is drawn."""
    rows = np.empty((len(draw.indices), *draw.shape), np.float32)
    for row, index in zip(rows, draw.indices, strict=True):
        index_rng(seed, index, draw.purpose, draw.timestep).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


class NoiseAhead:
    """`draw_noise` for a plan of draws, in its order: while one is used, threads draw the next ones.

    A context; `pin` puts the tensors where a GPU fetches them without waiting.
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
            raise RuntimeError(f"the chain asks for {draw.purpose.name} {draw.timestep}, which is not what was planned")
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
