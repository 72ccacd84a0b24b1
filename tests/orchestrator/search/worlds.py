"""Simulated searches: the scores of a setting are a known function of the setting and the index."""

from collections.abc import Callable
from typing import Any

import numpy as np

from models.guidance import GuidanceConfig
from models.metrics import Gaussian
from models.samplers import SamplerConfig
from models.scores import frechet_scores, share_scores
from orchestrator.search.config import Limit, SearchConfig
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Evaluation, Outcome, Proposals, SuccessiveHalving
from orchestrator.search.space import GridProposals, Setting

FD, PRECISION = "fd_digits", "precision"
World = Callable[[Evaluation], Outcome]


def grid(count: int) -> list[Setting]:
    """Return settings that differ in the guidance scale; setting i has the scale i."""
    sampler = SamplerConfig(name="ddim", num_steps=10)
    guides = [GuidanceConfig(scale=float(i)) for i in range(count)]
    return [Setting(weights="w", sampler=sampler, guidance=guide, evaluations=20) for guide in guides]


def config_of(trials: int, **changes: Any) -> SearchConfig:
    settings: dict[str, Any] = {
        "weights": ("w",), "classifier": "c", "reference": "r", "output": "o", "objective": (FD,), "finalists": 1,
        "rungs": (64, 128, 256, 512, 1024), "trials": trials, "round_size": trials, "fresh_seed": 9,
    }  # fmt: skip
    return SearchConfig(**settings | changes)


def search(
    config: SearchConfig, world: World, settings: list[Setting] | None = None, limit: Limit | None = None,
    proposals: Proposals | None = None,
) -> tuple[SuccessiveHalving, list[list[Evaluation]]]:  # fmt: skip
    """Run a search in a world; return it with the evaluations of each round."""
    settings = settings or grid(config.trials)
    full = config.rungs[-1] * float(sum(setting.evaluations for setting in settings))
    budget = SampleBudget(limit or Limit(), 1, full)
    halving = SuccessiveHalving(config, config.trials, proposals or GridProposals(settings, False), budget, world)
    return halving, [step.tasks for step in halving.run()]


def normal(quality: Callable[[int], float], run: int, count: int, full: int = 1024) -> World:
    """Return normal scores; half of their variance is common to all trials."""
    rng = np.random.default_rng([30, run])
    scores = rng.standard_normal(full) + rng.standard_normal((count, full))

    def world(task: Evaluation) -> Outcome:
        number = int(task.setting.guidance.scale)
        return Outcome({FD: quality(number) + scores[number, : task.n]}, unbiased=(FD,))

    return world


def catastrophes(run: int, count: int, full: int = 1024) -> World:
    """Return scores by which trial 0 is the best: the others gain 0.3, but lose 50 in each of 1% of their samples."""
    rng = np.random.default_rng([31, run])
    scores = rng.standard_normal(full) + 0.5 * rng.standard_normal((count, full))
    scores[1:] += 50.0 * (rng.random((count - 1, full)) < 0.01) - 0.3

    def world(task: Evaluation) -> Outcome:
        return Outcome({FD: scores[int(task.setting.guidance.scale), : task.n]}, unbiased=(FD,))

    return world


def bounded(run: int, count: int, full: int = 1024) -> World:
    """Return scores with a precision; trial 0 is the best with at least 0.6, and better ones have 0.58."""
    rng = np.random.default_rng([32, run])
    scores = rng.standard_normal(full) + rng.standard_normal((count, full))
    level, precision = rng.random((count, full)), np.where(np.arange(count) % 2, 0.58, 0.62)
    scores += np.where(np.arange(count) % 2, -0.5, 0.3)[:, None] * (np.arange(count) > 0)[:, None]

    def world(task: Evaluation) -> Outcome:
        i = int(task.setting.guidance.scale)
        hits = level[i, : task.n] < precision[i]
        return Outcome({FD: scores[i, : task.n], PRECISION: share_scores(hits)}, unbiased=(FD, PRECISION))

    return world


PRECISE = ("precision>=0.6",)


def trade_off(run: int, count: int, full: int = 1024, dimension: int = 64) -> World:
    """Return scores of features of ten classes in 64 dimensions; trial 2 is the best.

    More guidance moves the classes apart and narrows them, and less guidance blurs the samples.
    """
    rng = np.random.default_rng([33, run])
    spectrum = np.geomspace(1.0, 0.02, dimension)
    means = np.random.default_rng(34).standard_normal((10, dimension)) * np.sqrt(0.6 * spectrum)
    means -= means.mean(axis=0)
    labels = np.arange(full) % 10
    noise = np.sqrt(0.4 * spectrum) * rng.standard_normal((full, dimension))
    blur = np.sqrt(spectrum) * rng.standard_normal((full, dimension))
    target = Gaussian(np.zeros(dimension), means.T @ means / 10 + np.diag(0.4 * spectrum))

    def world(task: Evaluation) -> Outcome:
        scale, n = task.setting.guidance.scale, task.n
        samples = (1 + 0.015 * scale) * means[labels[:n]] + (1 - 0.03 * scale) * noise[:n]
        samples += 0.6 * np.exp(-scale / 2) * blur[:n]
        strata = labels[:n]
        return Outcome({FD: frechet_scores(samples, target, strata)}, strata, unbiased=(FD,) * (n >= 16 * dimension))

    return world
