"""What a search may try, and who proposes it: a grid, or Optuna, asked in rounds and told in order."""

import hashlib
import itertools
import json
import warnings
from typing import Any

import numpy as np
import optuna
from pydantic import BaseModel, Field, model_validator

from models.costs import sampling_evaluations
from models.guidance import WHOLE_CHAIN, GuidanceConfig, Interval, check_interval
from models.samplers import SAMPLERS, SamplerConfig, SamplerName
from orchestrator.order import Purpose, keyed_rng

ASKS = 200  # proposals in a row that were made before, after which there is nothing new to propose

SHIFT = 0.4  # the best scale falls as the number of steps to this power; ADM's scales at 25 and 250 steps give 0.38

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Setting(BaseModel, frozen=True, extra="forbid"):
    """One way to sample: what a trial tries."""

    weights: str  # the diffusion model
    sampler: SamplerName
    num_steps: int  # steps of the chain
    eta: float = 0.0  # ddim only
    scale: float = 0.0  # guidance scale
    interval: Interval = WHOLE_CHAIN  # guided part of the chain, as fractions: 0 = clean, 1 = noise
    evaluations: int = Field(0, exclude=True)  # of networks, per image; it follows from the rest

    @property
    def sampling(self) -> SamplerConfig:
        """The sampler that it means."""
        return SamplerConfig(name=self.sampler, num_steps=self.num_steps, eta=self.eta)

    @property
    def guidance(self) -> GuidanceConfig:
        """The guidance that it means."""
        return GuidanceConfig(scale=self.scale, interval=self.interval)

    @property
    def name(self) -> str:
        """A name for folders: readable, with a hash of all."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return f"{self.sampler}-{self.num_steps}-scale{self.scale:.4g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        parts = [f"{self.sampler}, {self.num_steps} steps, scale {self.scale:.4g}"]
        parts += [f"eta {self.eta:g}"] if self.eta else []
        parts += [f"guided from {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval != WHOLE_CHAIN else []
        return ", ".join(parts)


class SpaceConfig(BaseModel, frozen=True, extra="forbid"):
    """The values that a search may combine."""

    scales: tuple[float, ...] = Field((0.0, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)  # guidance scales, rising
    continuous: bool = True  # any scale between those given, not those alone
    num_steps: tuple[int, ...] = Field((10, 25), min_length=1)  # steps of the chain, rising
    samplers: tuple[SamplerName, ...] = Field(("ddim",), min_length=1)  # by name
    etas: tuple[float, ...] = Field((0.0,), min_length=1)  # of ddim: 0 = deterministic, 1 = ancestral
    intervals: tuple[Interval, ...] = Field((WHOLE_CHAIN,), min_length=1)  # guided part: 0 = clean, 1 = noisy

    @model_validator(mode="after")
    def _check(self) -> "SpaceConfig":
        for name in ("scales", "num_steps"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}={values} must rise from one value to the next")
        if self.scales[0] < 0:
            raise ValueError(f"scales={self.scales} must not be negative")
        for interval in self.intervals:
            check_interval(interval)
        return self


class Space:
    """The settings that a config allows, for models whose diffusion has `num_timesteps` steps."""

    def __init__(self, config: SpaceConfig, weights: tuple[str, ...], num_timesteps: int, most: float) -> None:
        self._config, self._weights, self._most = config, weights, most
        self._num_timesteps = num_timesteps

    def grid(self) -> list[Setting]:
        """Every combination of the values given that is allowed, each once."""
        c = self._config
        found = (
            self._setting(weights, sampler, num_steps, eta, scale, interval)
            for weights, sampler, num_steps, eta, scale, interval in itertools.product(
                self._weights, c.samplers, c.num_steps, c.etas, c.scales, c.intervals
            )
        )
        return [setting for setting in dict.fromkeys(found) if self.allows(setting)]

    def allows(self, setting: Setting) -> bool:
        """Whether it takes no more evaluations than it may."""
        return setting.evaluations <= self._most

    def suggest(self, trial: optuna.Trial) -> Setting:
        """What a trial of the study stands for; a parameter is asked for only where it has a meaning."""
        c = self._config
        weights = trial.suggest_categorical("weights", self._weights) if len(self._weights) > 1 else self._weights[0]
        sampler = trial.suggest_categorical("sampler", c.samplers) if len(c.samplers) > 1 else c.samplers[0]
        num_steps = c.num_steps[trial.suggest_int("num_steps", 0, len(c.num_steps) - 1)]
        if c.continuous:
            scale = self.scale_at(trial.suggest_float("scale", 0, len(c.scales) - 1))
        else:
            scale = c.scales[trial.suggest_int("scale", 0, len(c.scales) - 1)]
        eta = c.etas[trial.suggest_int("eta", 0, len(c.etas) - 1)] if SAMPLERS[sampler].takes_eta else 0.0
        guided = scale > 0 and len(c.intervals) > 1
        number = trial.suggest_categorical("interval", range(len(c.intervals))) if guided else 0
        return self._setting(weights, sampler, num_steps, eta, scale, c.intervals[number])

    def spread(self, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Parameters of `count` trials that cover the space evenly: a Latin square over scales, steps and samplers."""
        c = self._config

        def levels(values: int) -> np.ndarray:
            return rng.permutation(np.arange(count) % values)

        places = (np.arange(count) + 0.5) / count * (len(c.scales) - 1)
        scales = rng.permutation(places) if c.continuous else levels(len(c.scales))
        columns = {"scale": scales.tolist(), "num_steps": levels(len(c.num_steps)).tolist()}
        if len(c.samplers) > 1:
            columns["sampler"] = [c.samplers[i] for i in levels(len(c.samplers))]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def scale_at(self, place: float) -> float:
        """The scale at a place among those given, in straight lines between them; four digits are enough."""
        knots = self._config.scales
        return float(f"{np.interp(place, np.arange(len(knots)), knots):.4g}")

    def _setting(
        self, weights: str, sampler: SamplerName, num_steps: int, eta: float, scale: float, interval: Interval
    ) -> Setting:
        """A setting without what has no meaning in it."""
        setting = Setting(
            weights=weights,
            sampler=sampler,
            num_steps=num_steps,
            eta=eta if SAMPLERS[sampler].takes_eta else 0.0,
            scale=scale,
            interval=interval if scale > 0 else WHOLE_CHAIN,
        )
        counted = sampling_evaluations(setting.sampling, setting.guidance, self._num_timesteps)
        return setting.model_copy(update={"evaluations": counted.total})


def narrowed(fewest: dict[Setting, float], more: list[Setting]) -> list[Setting]:
    """Return the settings of more steps that are worth a trial, by the objective of those of the fewest steps.

    Of each kind (weights, sampler, eta, interval) the two best scales at the fewest steps span what is tried at more
    steps. There the best scale is lower: ADM's own is about 2.4 times as large at 25 DDIM steps as at 250, so the span
    begins at the scale of the grid at or below its least one times (fewest / steps)^0.4.
    """
    found: list[Setting] = []
    for setting in more:
        first = {other.scale: value for other, value in fewest.items() if _kind(other) == _kind(setting)}
        two = sorted(sorted(first, key=lambda scale: first[scale])[:2])
        least = min(other.num_steps for other in fewest if _kind(other) == _kind(setting))
        shifted = two[0] * (least / setting.num_steps) ** SHIFT
        below = max((scale for scale in first if scale <= shifted), default=two[0])
        if below <= setting.scale <= two[-1]:
            found.append(setting)
    return found


def _kind(setting: Setting) -> tuple[object, ...]:
    return setting.weights, setting.sampler, setting.eta


class GridProposals:
    """Every setting of a grid in order; with `proxy` those of the fewest steps first, and what they leave of the rest.

    See `SuccessiveHalving` for what is asked and told.
    """

    def __init__(self, grid: list[Setting], proxy: bool) -> None:
        least = {kind: min(s.num_steps for s in grid if _kind(s) == kind) for kind in map(_kind, grid)}
        first = [setting for setting in grid if not proxy or setting.num_steps == least[_kind(setting)]]
        self._waiting, self._rest = first, [setting for setting in grid if setting not in first]
        self._values: dict[Setting, float] = {}

    def ask(self, count: int) -> list[Setting]:
        if not self._waiting and self._rest:
            self._waiting, self._rest = narrowed(self._values, self._rest), []
        found, self._waiting = self._waiting[:count], self._waiting[count:]
        return found

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        self._values[setting] = values[0] if values and violation <= 0 else np.inf


class OptunaProposals:
    """Proposals of Optuna's TPE, which learns from the first rung.

    A fresh study for each process: the same asks and tells in the same order give the same proposals. Tune's own
    OptunaSearch cannot promise that: it tells the study of trials in the order in which they end, and TPE weighs
    them by that order.
    """

    def __init__(self, space: Space, seed: int, num_objectives: int, round_size: int) -> None:
        self._space = space
        self._open: dict[Setting, optuna.Trial | None] = {}
        rng = keyed_rng(Purpose.SEARCH, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=int(rng.integers(2**31)),
                n_startup_trials=round_size,
                multivariate=True,
                group=True,  # parameters that only some settings have
            )
        self._study = optuna.create_study(directions=["minimize"] * num_objectives, sampler=sampler)
        for parameters in space.spread(round_size, rng):
            self._study.enqueue_trial(parameters)

    def ask(self, count: int) -> list[Setting]:
        found: list[Setting] = []
        for _ in range(ASKS):
            if len(found) == count:
                break
            trial = self._study.ask()
            setting = self._space.suggest(trial)
            if setting in self._open or not self._space.allows(setting):
                self._tell(trial, [], 1.0)
                continue
            self._open[setting] = trial
            found.append(setting)
        return found

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        trial = self._open[setting]
        assert trial is not None, "told twice"
        self._open[setting] = None
        self._tell(trial, values, violation)

    def _tell(self, trial: optuna.Trial, values: list[float], violation: float) -> None:
        trial.set_constraint("violation", violation)
        if values and np.isfinite(values).all():
            self._study.tell(trial, values)
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
