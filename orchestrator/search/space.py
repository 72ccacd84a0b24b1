"""What a search may try, and who proposes it: a grid, or Optuna, asked in rounds and told in order."""

import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from pydantic import BaseModel, Field, model_validator

from models.costs import sampling_evaluations
from models.diffusion import DiffusionConfig
from models.guidance import WHOLE_CHAIN, GuidanceConfig, GuidanceKind, Interval, check_interval
from models.samplers import SAMPLERS, SamplerConfig, SamplerName
from orchestrator.order import Purpose, keyed_rng

ASKS = 200  # proposals in a row that were made before, after which there is nothing new to propose

Guide = tuple[GuidanceKind, str | None]  # a kind of guidance, with the weaker model of the kind auto
UNGUIDED = GuidanceConfig(kind="none")

SHIFT = 0.4  # the best scale falls as the number of steps to this power; ADM's scales at 25 and 250 steps give 0.38

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Setting(BaseModel, frozen=True, extra="forbid"):
    """One way to sample: what a trial tries."""

    weights: str  # the diffusion model
    sampler: SamplerConfig
    guidance: GuidanceConfig = UNGUIDED
    evaluations: float = Field(0.0, exclude=True)  # network evaluations per image, in passes of the diffusion model

    @property
    def name(self) -> str:
        """Return a name for folders: readable, with a hash of all."""
        digest = hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        return f"{self.sampler.name}-{self.sampler.num_steps}-scale{self.guidance.scale:.4g}-{digest[:8]}"

    def __str__(self) -> str:
        sampler, guidance = self.sampler, self.guidance
        kind = "" if guidance.kind in ("none", "classifier") else f"{guidance.kind} "
        parts = [f"{sampler.name}, {sampler.num_steps} steps, {kind}scale {guidance.scale:.4g}"]
        parts += [f"weaker model {guidance.weak_weights}"] if guidance.weak_weights else []
        parts += [f"eta {sampler.eta:g}"] if sampler.eta else []
        parts += [f"churn {sampler.s_churn:g}"] if sampler.s_churn else []
        low, high = guidance.interval
        parts += [f"guided from {low:g} to {high:g}"] if guidance.interval != WHOLE_CHAIN else []
        return ", ".join(parts)


class SpaceConfig(BaseModel, frozen=True, extra="forbid"):
    """The values that a search may combine."""

    guidance: tuple[GuidanceKind, ...] = Field(("classifier",), min_length=1)  # kinds of guidance
    weak_weights: tuple[str, ...] = ()  # weaker models for the kind auto, such as earlier snapshots
    scales: tuple[float, ...] = Field((0.0, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)  # guidance scales, rising
    continuous: bool = True  # also try scales between those given
    num_steps: tuple[int, ...] = Field((10, 25), min_length=1)  # steps of the chain, rising
    samplers: tuple[SamplerName, ...] = Field(("ddim",), min_length=1)  # names of samplers
    etas: tuple[float, ...] = Field((0.0,), min_length=1)  # for ddim: 0 = deterministic, 1 = ancestral
    s_churn: tuple[float, ...] = Field((0.0,), min_length=1)  # for edm: amount of noise that is added
    intervals: tuple[Interval, ...] = Field((WHOLE_CHAIN,), min_length=1)  # guided parts: 0 = clean, 1 = noise

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
        if ("auto" in self.guidance) != bool(self.weak_weights):
            raise ValueError(
                f"guidance={self.guidance} does not fit weak_weights={self.weak_weights}: name weaker models if "
                "guidance includes auto, and none otherwise"
            )
        return self

    @property
    def guides(self) -> tuple[Guide, ...]:
        """Every kind of guidance with every network that it may take."""
        found: list[Guide] = []
        for kind in self.guidance:
            found += [(kind, weak) for weak in self.weak_weights] if kind == "auto" else [(kind, None)]
        return tuple(found)


@dataclass(frozen=True)
class Passes:
    """What an evaluation of each network of a search costs."""

    diffusion: DiffusionConfig
    guides: Mapping[Guide, float]  # a guide's multiply-adds over the diffusion model's

    def of(self, setting: Setting) -> float:
        """Return the network evaluations of an image, in passes of the diffusion model."""
        counted = sampling_evaluations(setting.sampler, setting.guidance, self.diffusion)
        guide = self.guides[setting.guidance.kind, setting.guidance.weak_weights] if counted.guide else 0.0
        return round(counted.model + counted.guide * guide, 4)


class Space:
    """The settings that a config allows, with at most `most` network evaluations."""

    def __init__(self, config: SpaceConfig, weights: tuple[str, ...], passes: Passes, most: float) -> None:
        self._config, self._weights, self._passes, self._most = config, weights, passes, most

    def grid(self) -> list[Setting]:
        """Every combination of the values given that is allowed, each once."""
        c = self._config
        found = (
            self._setting(*values)
            for values in itertools.product(
                self._weights, c.samplers, c.num_steps, c.etas, c.s_churn, c.guides, c.scales, c.intervals
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
        churns = sampler == "edm" and len(c.s_churn) > 1
        s_churn = c.s_churn[trial.suggest_int("s_churn", 0, len(c.s_churn) - 1)] if churns else c.s_churn[0]
        chooses = scale > 0 and len(c.guides) > 1
        guide = trial.suggest_categorical("guide", range(len(c.guides))) if chooses else 0
        guided = scale > 0 and len(c.intervals) > 1
        number = trial.suggest_categorical("interval", range(len(c.intervals))) if guided else 0
        return self._setting(weights, sampler, num_steps, eta, s_churn, c.guides[guide], scale, c.intervals[number])

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
        self,
        weights: str,
        sampler: SamplerName,
        num_steps: int,
        eta: float,
        s_churn: float,
        guide: Guide,
        scale: float,
        interval: Interval,
    ) -> Setting:
        """A setting without what has no meaning in it."""
        chain = SamplerConfig(
            name=sampler,
            num_steps=num_steps,
            eta=eta if SAMPLERS[sampler].takes_eta else 0.0,
            s_churn=s_churn if sampler == "edm" else 0.0,
        )
        kind, weak_weights = guide
        guidance = UNGUIDED
        if kind != "none" and scale > 0:
            guidance = GuidanceConfig(kind=kind, scale=scale, weak_weights=weak_weights, interval=interval)
        setting = Setting(weights=weights, sampler=chain, guidance=guidance)
        return setting.model_copy(update={"evaluations": self._passes.of(setting)})


def narrowed(fewest: dict[Setting, float], more: list[Setting]) -> list[Setting]:
    """Return the settings of more steps that are worth a trial, by the objective of those of the fewest steps.

    Of each kind (weights, sampler, eta, interval) the two best scales at the fewest steps span what is tried at more
    steps. There the best scale is lower: ADM's own is about 2.4 times as large at 25 DDIM steps as at 250, so the span
    begins at the scale of the grid at or below its least one times (fewest / steps)^0.4.
    """
    found: list[Setting] = []
    for setting in more:
        first = {other.guidance.scale: value for other, value in fewest.items() if _kind(other) == _kind(setting)}
        two = sorted(sorted(first, key=lambda scale: first[scale])[:2])
        least = min(other.sampler.num_steps for other in fewest if _kind(other) == _kind(setting))
        shifted = two[0] * (least / setting.sampler.num_steps) ** SHIFT
        below = max((scale for scale in first if scale <= shifted), default=two[0])
        if below <= setting.guidance.scale <= two[-1]:
            found.append(setting)
    return found


def _kind(setting: Setting) -> tuple[object, ...]:
    return setting.weights, setting.sampler.name, setting.sampler.eta, setting.sampler.s_churn


class GridProposals:
    """Every setting of a grid in order; with `proxy` those of the fewest steps first, and what they leave of the rest.

    See `SuccessiveHalving` for what is asked and told.
    """

    def __init__(self, grid: list[Setting], proxy: bool) -> None:
        least = {kind: min(s.sampler.num_steps for s in grid if _kind(s) == kind) for kind in map(_kind, grid)}
        first = [setting for setting in grid if not proxy or setting.sampler.num_steps == least[_kind(setting)]]
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
