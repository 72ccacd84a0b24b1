"""The cost of a search: the samples that its trials drew, what remains of the budget, and an estimate in advance."""

import time
from collections import Counter
from typing import Any

import numpy as np

from models.costs import forward_multiply_adds
from models.unet import Architecture
from orchestrator import storage
from orchestrator.cost import GUIDED_SAMPLING, Cost, gpu_seconds
from orchestrator.search.config import Limit, SearchConfig, round_up
from orchestrator.search.halving import Evaluation
from orchestrator.search.space import Setting


class Clock:
    """The time that a search has taken in all its attempts, and the time at which each round began.

    Both are on storage. A round that is replayed begins at the recorded time, so that a search that was killed makes
    the same decisions when it is started again.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        stored: dict[str, Any] = storage.read_json(uri) if storage.exists(uri) else {"seconds": 0.0, "rounds": []}
        self._earlier_seconds, self._rounds = stored["seconds"], stored["rounds"]
        self._start, self._round = time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Return the seconds of all attempts so far."""
        return self._earlier_seconds + time.monotonic() - self._start

    def next_round(self) -> float:
        """Begin the next round; return the seconds at which it began, in this attempt or in an earlier one."""
        if self._round == len(self._rounds):
            self._rounds.append(self.seconds)
        self._round += 1
        return self._rounds[self._round - 1]

    def save(self) -> None:
        """Record the time; call it after each evaluation."""
        storage.write_json(self._uri, {"seconds": self.seconds, "rounds": self._rounds})


class SampleBudget:
    """The samples that a search has drawn, and what remains of its limit.

    The limit is in samples, network evaluations or seconds. A trial that is promoted pays only for its new samples.
    full: network evaluations of which a limit in % is a share.
    """

    def __init__(self, limit: Limit, batch_size: int, full: float, clock: Clock | None = None) -> None:
        self._limit, self._batch_size, self._clock = limit, batch_size, clock
        self._total = {"samples": 1, "%": full / 100, "h": 3600}[limit.unit] * limit.amount  # in the unit of `prices`
        self._drawn: Counter[tuple[Setting, int]] = Counter()  # samples by setting and seed
        self._seconds = 0.0  # when this round began

    @property
    def samples(self) -> int:
        """Return the number of samples drawn, in whole batches."""
        return self._drawn.total()

    def evaluations(self, seed: int | None = None) -> float:
        """Return the network evaluations for the samples of a seed (None: all), in passes of the diffusion model."""
        return sum(
            count * setting.evaluations for (setting, other), count in self._drawn.items() if seed in (None, other)
        )

    def samples_of(self, setting: Setting) -> int:
        """Return the number of samples of one setting, on all seeds."""
        return sum(count for (other, _), count in self._drawn.items() if other == setting)

    def left(self, reserve: list[Evaluation]) -> float:
        """Return what remains after paying for `reserve`, the final evaluation, which a limit in % does not include."""
        spent = {"samples": self.samples, "%": self.evaluations(), "h": self._seconds}[self._limit.unit]
        return self._total - spent - (0.0 if self._limit.unit == "%" else sum(self.prices(reserve)))

    def prices(self, tasks: list[Evaluation]) -> list[float]:
        """Return the cost of new samples by task: their number, network evaluations, or seconds at the speed so far."""
        if self._limit.unit == "samples":
            return [self.new_samples(task) for task in tasks]
        seconds = self._seconds / (self.evaluations() or 1) if self._limit.unit == "h" else 1.0
        return [self.new_samples(task) * task.setting.evaluations * seconds for task in tasks]

    def spend(self, tasks: list[Evaluation]) -> None:
        """Count the samples of these evaluations as drawn, at the end of a round."""
        for task in tasks:
            self._drawn[task.setting, task.seed] += self.new_samples(task)
        if self._clock is not None:
            self._seconds = self._clock.next_round()

    def new_samples(self, task: Evaluation) -> int:
        """Return the number of samples that an evaluation has to draw, in whole batches."""
        return max(0, round_up(task.n, self._batch_size) - self._drawn[task.setting, task.seed])


def full_evaluations(config: SearchConfig, settings: list[Setting]) -> float:
    """Return the network evaluations if every trial reached the last rung, at the mean cost of these settings."""
    mean_evaluations = float(np.mean([setting.evaluations for setting in settings]))
    return config.num_trials(settings) * round_up(config.rungs[-1], config.batch_size) * mean_evaluations


def max_work(config: SearchConfig, settings: list[Setting], model: Architecture) -> tuple[float, float, float]:
    """Return the samples, network evaluations and GPU-hours of a search in which no trial is eliminated.

    The budget limits them, unless it is in hours. The mean cost of `settings` is assumed for all trials.
    """
    evaluations = float(np.mean([setting.evaluations for setting in settings]))
    flops = evaluations * 2.0 * forward_multiply_adds(model)
    trials, full = config.num_trials(settings), config.rungs[-1]
    samples: float = (trials + min(config.finalists, trials)) * full
    limit = Limit.parse(config.budget)
    if limit.unit == "samples":
        samples = min(samples, limit.amount)
    elif limit.unit == "%":
        samples -= max(1 - limit.amount / 100, 0.0) * trials * full
    cost = Cost(int(samples), flops, {}, GUIDED_SAMPLING, "")
    seconds = gpu_seconds(cost, config.cost, half=config.dtype != "float32")
    return samples, samples * evaluations, seconds / 3600
