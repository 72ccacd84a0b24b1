"""Measure the regret of searches: how much worse the chosen setting is than the best, over hundreds of replays.

    python -m tests.benchmarks.search_regret --store runs/demo-search

Draws 24 settings x 2,048 samples of the digits model on three seeds once, and stores their features. Each replay
shuffles these 6,144 indices within their classes, in the same way for all settings, and every strategy searches the
first 2,048. The truth is the bias-corrected Fréchet distance of all 6,144. Prints a table. Every strategy compares
trials by the same objective, so that only the allocation differs.

    python -m tests.benchmarks.search_regret --synthetic 2 --replays 40 --full 1024

does the same in 2 worlds of synthetic features, without a model.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from cluster.workers import map_items
from models.features import extract
from models.guidance import GuidanceConfig
from models.metrics import Gaussian, Moments, moments
from models.samplers import SamplerConfig
from models.scores import frechet_scores
from orchestrator.evaluation.extraction import EXTRACTOR_BATCH
from orchestrator.evaluation.extractors import CPU
from orchestrator.evaluation.references import extract_reference, find_reference
from orchestrator.generation.sampling import SamplingWorker, make_batch
from orchestrator.search.config import Limit, SearchConfig, space_of
from orchestrator.search.cost import SampleBudget
from orchestrator.search.evaluator import networks_config
from orchestrator.search.halving import Outcome, SuccessiveHalving
from orchestrator.search.job import pass_costs
from orchestrator.search.space import UNGUIDED, GridProposals, Setting, SpaceConfig

OBJECTIVE = "fd_digits"
FIRST = 64  # samples at the first rung; each next one has twice as many
BATCH = 256  # samples that are drawn and stored together


@dataclass(frozen=True)
class Regret:
    """The samples that are drawn, and the searches that are replayed."""

    store: str = "runs/demo-search"  # with the digits' dataset and networks of `make demo-search`
    cache: str = "runs/search-regret"  # features of all settings
    weights: str = "digits/diffusion"
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    num_steps: tuple[int, ...] = (4, 8, 16)
    samplers: tuple[str, ...] = ("ddpm", "ddim")
    seeds: tuple[int, ...] = (0, 1, 2)
    full: int = 2048  # samples at the last rung, of each seed
    replays: int = 200
    shares: tuple[float, ...] = (0.1, 0.25)  # of the network evaluations of the full grid
    workers: int = 0
    synthetic: int = 0  # worlds of synthetic features; 0 = the digits model's


# ------------------------------------------------------------------------------------------------ the cache


def config_of(regret: Regret) -> SearchConfig:
    """Return the config of the search whose settings are drawn."""
    return SearchConfig(
        store=regret.store, weights=(regret.weights,), classifier="digits/classifier", reference="datasets/digits",
        output="regret", batch_size=BATCH, rungs=rungs_to(regret.full), num_workers=regret.workers,
        space=SpaceConfig.model_validate({"scales": regret.scales, "continuous": False, "num_steps": regret.num_steps,
                                          "samplers": regret.samplers}),
    )  # fmt: skip


def rungs_to(full: int) -> tuple[int, ...]:
    return tuple(FIRST * 2**level for level in range(int(np.log2(full // FIRST)) + 1))


class Part(NamedTuple):
    """A batch of a setting."""

    setting: Setting
    seed: int
    number: int


def parts(regret: Regret, grid: list[Setting]) -> Iterator[Part]:
    for seed, number in itertools.product(regret.seeds, range(regret.full // BATCH)):
        yield from (Part(setting, seed, number) for setting in grid)


def path_of(regret: Regret, part: Part) -> Path:
    return Path(regret.cache, f"{part.setting.name}-{part.seed}-{part.number}.npz")


def fill(regret: Regret, grid: list[Setting]) -> None:
    """Draw the batches that are missing from the cache."""
    Path(regret.cache).mkdir(parents=True, exist_ok=True)
    todo = [part for part in parts(regret, grid) if not path_of(regret, part).exists()]
    begin = time.monotonic()
    for number, _ in enumerate(map_items(partial(make_drawer, regret), todo, regret.workers), 1):
        print(f"{number} of {len(todo)} drawn, {time.monotonic() - begin:.0f} s", flush=True)


def make_drawer(regret: Regret) -> Callable[[Part], None]:
    config = config_of(regret)
    worker = SamplingWorker(networks_config(config, {}, config.weights[0]))
    extractor = config.extractor_loader(worker.networks.weights.architecture.image_size)(CPU).network

    def draw(part: Part) -> None:
        generation = config.generation(part.setting.weights, part.seed, part.setting)
        (batch,) = make_batch(worker.networks, generation, part.number)
        features = extract(extractor, batch.images, EXTRACTOR_BATCH)
        np.savez(path_of(regret, part), pool=features.pool, labels=batch.labels)

    return draw


# ------------------------------------------------------------------------------------------------ a world


class World:
    """Settings with their samples in memory, which are shuffled for each replay."""

    def __init__(self, features: dict[Setting, np.ndarray], labels: np.ndarray, reference: Gaussian, full: int) -> None:
        self.full, self.rungs = full, rungs_to(full)
        self.settings = list(features)
        self.reference = reference
        self._features, self._labels = features, labels
        self.truth = {s: float(frechet_scores(x, reference, labels).mean()) for s, x in features.items()}
        self.best = min(self.truth, key=lambda setting: self.truth[setting])

    def shuffle(self, seed: int) -> None:
        """Choose the indices of a replay: index i has class i modulo K, as with balanced labels."""
        self.seed, rng = seed, np.random.default_rng([20, seed])
        classes = [rng.permutation(np.flatnonzero(self._labels == label)) for label in np.unique(self._labels)]
        rows_per_class = -(-self.full // len(classes))
        self._rows = np.stack([rows[:rows_per_class] for rows in classes], axis=1).ravel()[: self.full]
        self._known: dict[tuple[Setting, int], Outcome] = {}

    def outcome(self, setting: Setting, n: int) -> Outcome:
        if (setting, n) not in self._known:
            rows, strata = self._features[setting][self._rows[:n]], self._labels[self._rows[:n]]
            scores = {OBJECTIVE: frechet_scores(rows, self.reference, strata)}
            self._known[setting, n] = Outcome(scores, strata, {}, (OBJECTIVE,))
        return self._known[setting, n]

    def value(self, setting: Setting, n: int) -> float:
        return float(self.outcome(setting, n).scores[OBJECTIVE].mean())

    @property
    def full_evaluations(self) -> float:
        """Return the number of network evaluations of the full grid."""
        return self.full * float(sum(setting.evaluations for setting in self.settings))


# ------------------------------------------------------------------------------------------------ strategies


@dataclass
class Choice:
    """The choice of a strategy, and its cost."""

    setting: Setting
    samples: float
    evaluations: float
    eliminated_best: bool = False


def uniform(world: World, share: float) -> Choice:
    """Draw the same number of samples of every setting."""
    n = int(share * world.full)
    chosen = min(world.settings, key=lambda setting: world.value(setting, n))
    return Choice(chosen, n * len(world.settings), share * world.full_evaluations)


def plain_halving(world: World, share: float) -> Choice:
    """Run plain successive halving: every rung has an equal budget and keeps the better half, until one is left.

    The budget is in network evaluations, like that of the other strategies.
    """
    alive, drawn = list(world.settings), dict.fromkeys(world.settings, 0)
    rungs = int(np.ceil(np.log2(len(alive))))
    for _ in range(rungs):
        more = int(share * world.full_evaluations / rungs / sum(setting.evaluations for setting in alive))
        for setting in alive:
            drawn[setting] = min(drawn[setting] + more, world.full)
        alive.sort(key=lambda setting: world.value(setting, drawn[setting]))
        alive = alive[: -(-len(alive) // 2)]
    return _spent(alive[0], drawn)


def asha(world: World, share: float) -> Choice:
    """Run ASHA with reduction factor 2: promote a trial as soon as it is in the better half of its rung."""
    drawn = dict.fromkeys(world.settings, 0)
    rungs: list[list[Setting]] = [[] for _ in world.rungs]
    waiting = [world.settings[i] for i in np.random.default_rng([21, world.seed]).permutation(len(world.settings))]
    while True:
        promotion = _promotable(world, rungs)
        if promotion is None and not waiting:
            break
        level, setting = promotion or (0, waiting.pop(0))
        cost = (world.rungs[level] - drawn[setting]) * setting.evaluations
        if sum(n * s.evaluations for s, n in drawn.items()) + cost > share * world.full_evaluations:
            break
        drawn[setting] = world.rungs[level]
        rungs[level].append(setting)
    top = max(level for level, settings in enumerate(rungs) if settings)
    return _spent(min(rungs[top], key=lambda setting: world.value(setting, world.rungs[top])), drawn)


def _promotable(world: World, rungs: list[list[Setting]]) -> tuple[int, Setting] | None:
    for level in range(len(world.rungs) - 2, -1, -1):
        ranked = sorted(rungs[level], key=lambda setting: world.value(setting, world.rungs[level]))
        for setting in ranked[: len(ranked) // 2]:
            if setting not in rungs[level + 1]:
                return level + 1, setting
    return None


def _spent(chosen: Setting, drawn: dict[Setting, int]) -> Choice:
    return Choice(chosen, sum(drawn.values()), sum(n * setting.evaluations for setting, n in drawn.items()))


def ours(world: World, share: float, proxy: bool = False) -> Choice:
    """Run the search of `orchestrator.search`."""
    limit = Limit(100 * share, "%") if share < 1 else Limit()
    budget = SampleBudget(limit, 1, world.full_evaluations)
    config = SearchConfig(weights=("w",), classifier="c", reference="r", output="o", rungs=world.rungs)
    config = config.model_copy(update={"finalists": 0})  # the truth is known, so that no final evaluation is needed
    proposals = GridProposals(world.settings, proxy)
    halving = SuccessiveHalving(
        config, len(world.settings), proposals, budget, lambda task: world.outcome(task.setting, task.n)
    )
    list(halving.run())
    best = [trial for trial in halving.trials if trial.setting == world.best]
    chosen = halving.ranked()[0].setting
    return Choice(chosen, budget.samples, budget.evaluations(), any(trial.eliminated for trial in best))


Strategy = Callable[[World, float], Choice]

STRATEGIES: dict[str, Strategy] = {
    "uniform": uniform,
    "successive halving": plain_halving,
    "ASHA": asha,
    "search": ours,
    "search, few steps first": partial(ours, proxy=True),
}


# ------------------------------------------------------------------------------------------------ the table


def rows(world: World, replays: int, shares: tuple[float, ...]) -> Iterator[dict[str, float | str]]:
    """Yield a row for each strategy and budget."""
    runs: list[tuple[str, float, Strategy]] = [("full grid", 1.0, uniform), ("search, no budget", 1.0, ours)]
    runs += [(name, share, strategy) for share in shares for name, strategy in STRATEGIES.items()]
    choices_by_run: list[list[Choice]] = [[] for _ in runs]
    for seed in range(replays):
        world.shuffle(seed)
        for choices, (_, share, strategy) in zip(choices_by_run, runs, strict=True):
            choices.append(strategy(world, share))
    for (name, share, _), choices in zip(runs, choices_by_run, strict=True):
        regrets = np.array([world.truth[choice.setting] - world.truth[world.best] for choice in choices])
        yield {
            "strategy": name,
            "share": share,
            "regret": float(regrets.mean()),
            "error": float(regrets.std(ddof=1) / np.sqrt(replays)),
            "best": float(np.mean([choice.setting == world.best for choice in choices])),
            "eliminated": float(np.mean([choice.eliminated_best for choice in choices])),
            "samples": float(np.mean([choice.samples for choice in choices])) / (world.full * len(world.settings)),
            "evaluations": float(np.mean([choice.evaluations for choice in choices])) / world.full_evaluations,
        }


def load(regret: Regret) -> World:
    """Fill the cache and read it."""
    config = config_of(regret)
    grid = space_of(config, pass_costs(config.space.guides, config.generation(config.weights[0], config.seed))).grid()
    fill(regret, grid)
    loader = config.extractor_loader(8)
    folder = str(Path(regret.cache, "reference"))
    input_ = find_reference(config.path(config.reference), 8)
    reference = extract_reference(input_, loader, loader(CPU), folder, 0).statistics["pool"]
    files = {setting: [np.load(path_of(regret, part)) for part in parts(regret, [setting])] for setting in grid}
    features = {setting: np.concatenate([file["pool"] for file in batches]) for setting, batches in files.items()}
    labels = np.concatenate([file["labels"] for file in files[grid[0]]])
    gaussian = reference.gaussian if isinstance(reference, Moments) else reference
    return World(features, labels, gaussian, regret.full)


def synthetic(regret: Regret, seed: int) -> World:
    """Return a world like that of a guided model: the scale separates and narrows classes, and steps reduce an error.

    It has 32 dimensions with a falling spectrum, 10 classes, and noise that the settings share like x_T.
    """
    rng, count = np.random.default_rng([7, seed]), 3 * regret.full
    dimensions, classes = 32, 10
    spectrum = np.geomspace(1, 0.01, dimensions)
    centres = rng.standard_normal((classes, dimensions)) * np.sqrt(0.6 * spectrum)
    centres, spread = centres - centres.mean(0), np.sqrt(0.4 * spectrum)
    drawn = np.tile(np.arange(classes), 1000)
    reference = moments(centres[drawn] + spread * rng.standard_normal((len(drawn), dimensions))).gaussian
    labels = np.arange(count) % classes
    shared, blur = rng.standard_normal((2, count, dimensions))
    confused, wrong_label = rng.random(count), rng.integers(0, classes, count)
    drift = rng.standard_normal(dimensions) * np.sqrt(spectrum) * 0.3
    features = {}
    for sampler, steps, scale in itertools.product(regret.samplers, regret.num_steps, regret.scales):
        error, correlation = (1.0 / steps, 0.9) if sampler == "ddim" else (1.6 / steps, 0.5)
        noise = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.standard_normal((count, dimensions))
        label = np.where(confused < 0.25 * np.exp(-scale), wrong_label, labels)
        x = (1 + 0.03 * scale) * centres[label] + (1 - 0.05 * scale) * spread * noise
        x = x + error * (drift + 0.5 * np.exp(-scale / 2) * np.sqrt(spectrum) * blur)
        setting = Setting(
            weights="w", sampler=SamplerConfig(name=sampler, num_steps=steps),
            guidance=GuidanceConfig(scale=scale) if scale else UNGUIDED, evaluations=steps * (2 if scale else 1),
        )  # fmt: skip
        features[setting] = x
    return World(features, labels, reference, regret.full)


def main(regret: Regret) -> None:
    """Print the truth and the table of every world."""
    worlds = [synthetic(regret, seed) for seed in range(regret.synthetic)] or [load(regret)]
    for world in worlds:
        order = sorted(world.truth, key=lambda setting: world.truth[setting])
        print("truth: " + "; ".join(f"{setting}: {world.truth[setting]:.4f}" for setting in order))
        for row in rows(world, regret.replays, regret.shares):
            print(json.dumps({k: v if isinstance(v, str) else round(v, 5) for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Regret, description=__doc__))
