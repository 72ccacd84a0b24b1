"""What a search may try, and who proposes it: Optuna, asked in rounds and told in order."""

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


class Proposer:
    """A fresh study for each process: the same asks and tells in the same order give the same proposals."""

    def __init__(self, space: Space, seed: int, num_objectives: int, first_round: int) -> None:
        self._space = space
        self._seen: set[Setting] = set()
        rng = keyed_rng(Purpose.SEARCH, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=int(rng.integers(2**31)),
                n_startup_trials=first_round,
                multivariate=True,
                group=True,  # parameters that only some settings have
            )
        self._study = optuna.create_study(directions=["minimize"] * num_objectives, sampler=sampler)
        for parameters in space.spread(first_round, rng):
            self._study.enqueue_trial(parameters)

    def ask(self, count: int) -> list[tuple[optuna.Trial, Setting]]:
        """Up to `count` settings that were not proposed before; fewer where there are no more."""
        found: list[tuple[optuna.Trial, Setting]] = []
        for _ in range(ASKS):
            if len(found) == count:
                break
            trial = self._study.ask()
            setting = self._space.suggest(trial)
            if setting in self._seen or not self._space.allows(setting):
                self.tell(trial, [], finished=False, violation=1.0)
                continue
            self._seen.add(setting)
            found.append((trial, setting))
        return found

    def tell(self, trial: optuna.Trial, rungs: list[tuple[float, ...]], finished: bool, violation: float) -> None:
        """What became of a proposal: its scores, less is better, at every rung that it reached; none where it failed.

        With one objective those that were stopped count by the rung that they reached, then by their score there.
        With two all count by the first rung, where all have been. `violation` above 0: it breaks a constraint.
        """
        trial.set_constraint("violation", violation)
        if not rungs or not np.isfinite(rungs[-1]).all():
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif len(rungs[0]) > 1:
            self._study.tell(trial, rungs[0])
        else:
            for level, (value,) in enumerate(rungs):
                trial.report(value, level)
            if finished:
                self._study.tell(trial, rungs[-1])
            else:
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
