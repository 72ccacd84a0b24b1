"""What a search costs: samples and evaluations drawn, what the budget still affords, and estimates beforehand."""

import math
import time
from dataclasses import dataclass

import numpy as np

from models.costs import sampling_evaluations, sampling_flops
from models.unet import Architecture
from orchestrator.cost import GUIDED_SAMPLING, Cost, gpu_seconds
from orchestrator.search.config import Limit, SearchConfig
from orchestrator.search.halving import Evaluation
from orchestrator.search.space import Setting


class SampleBudget:
    """What a search has drawn, and what its limit still holds.

    A trial that goes to a higher rung costs its new samples only.
    """

    def __init__(self, limit: Limit, batch_size: int, full: int) -> None:
        self._limit, self._batch_size, self._full = limit, batch_size, full
        self._drawn: dict[tuple[Setting, int], int] = {}
        self._begin, self._made = time.monotonic(), 0  # evaluations made since then

    @property
    def samples(self) -> int:
        """All that was drawn, whole batches."""
        return sum(self._drawn.values())

    @property
    def evaluations(self) -> int:
        """Network evaluations behind them."""
        return sum(count * setting.evaluations for (setting, _), count in self._drawn.items())

    def of(self, setting: Setting) -> int:
        """Samples of one setting, on all seeds."""
        return sum(count for (other, _), count in self._drawn.items() if other == setting)

    def affords(self, tasks: list[Evaluation], beside: int) -> bool:
        """Return whether these evaluations, and `beside` trials drawn to the full besides, stay within the limit."""
        new = {task: self._new(task) for task in tasks}
        reserve = beside * self._whole(self._full)
        if self.samples + sum(new.values()) + reserve > self._limit.samples:
            return False
        seconds = time.monotonic() - self._begin
        evaluations = sum(count * task.setting.evaluations for task, count in new.items())
        evaluations += reserve * max(task.setting.evaluations for task in tasks)
        expected = seconds / self._made * evaluations if self._made else 0.0
        return seconds + expected <= 3600 * self._limit.hours

    def spend(self, tasks: list[Evaluation]) -> None:
        """Count these evaluations as drawn."""
        for task in tasks:
            self._made += self._new(task) * task.setting.evaluations
            self._drawn[task.setting, task.seed] = self._drawn.get((task.setting, task.seed), 0) + self._new(task)

    def _whole(self, n: int) -> int:
        return -(-n // self._batch_size) * self._batch_size

    def _new(self, task: Evaluation) -> int:
        return max(0, self._whole(task.n) - self._drawn.get((task.setting, task.seed), 0))


@dataclass(frozen=True)
class Expectation:
    """Work of a search."""

    samples: float
    evaluations: float  # of networks
    gpu_hours: float

    def __str__(self) -> str:
        work = f"{self.samples:,.0f} samples, {self.evaluations:,.0f} network evaluations"
        return f"{work}, {self.gpu_hours:,.3g} GPU-hours"


def expected_costs(
    config: SearchConfig,
    settings: list[Setting],
    num_timesteps: int,
    model: Architecture,
    classifier: Architecture | None,
) -> tuple[Expectation, Expectation]:
    """The worst case, where no decision ever falls, and what is expected: half of a round is stopped at every rung.

    An image takes what the most expensive of `settings` does in the worst case, else their mean.
    """
    rungs, limit = config.rungs, Limit.parse(config.budget)
    rounds = [min(config.round_size, config.trials - first) for first in range(0, config.trials, config.round_size)]
    new = [high - low for low, high in zip((0, *rungs), rungs, strict=False)]
    halving = sum(math.ceil(count / 2**level) * drawn for count in rounds for level, drawn in enumerate(new))
    finals = min(config.finalists, config.trials) * rungs[-1]
    worst = min(config.trials * rungs[-1] + finals, limit.samples)
    likely = min(halving + finals, limit.samples)

    counted = [sampling_evaluations(setting.sampling, setting.guidance, num_timesteps) for setting in settings]
    each = np.array([evaluations.total for evaluations in counted])
    flops = np.array([sampling_flops(evaluations, model, classifier) for evaluations in counted])

    def expectation(samples: float, evaluations: float, flops_per_image: float) -> Expectation:
        cost = Cost(int(samples), flops_per_image, {}, GUIDED_SAMPLING, "")
        seconds = gpu_seconds(cost, config.cost, half=config.dtype != "float32")
        return Expectation(samples, samples * evaluations, seconds / 3600)

    return (
        expectation(worst, float(each.max()), float(flops.max())),
        expectation(likely, float(each.mean()), float(flops.mean())),
    )
