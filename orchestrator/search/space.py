"""The settings that a search may try, and who proposes them: a grid, or Optuna."""

import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import optuna
from pydantic import BaseModel, Field, model_validator

from models.costs import sampling_evaluations
from models.diffusion import DiffusionConfig
from models.guidance import WHOLE_CHAIN, GuidanceConfig, GuidanceKind, Interval, check_interval
from models.samplers import SAMPLERS, SamplerConfig, SamplerName
from orchestrator.order import Purpose, keyed_rng

MAX_ATTEMPTS = 200  # proposals of Optuna in one round, of which those made before are dropped

Guide = tuple[GuidanceKind, str | None]  # a kind of guidance, and the weaker model if the kind is auto
UNGUIDED = GuidanceConfig(kind="none")

SHIFT = 0.4  # the best scale falls as the number of steps to this power; ADM's scales at 25 and 250 steps give 0.38

Value = TypeVar("Value")

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Setting(BaseModel, frozen=True, extra="forbid"):
    """A way to sample, which a trial evaluates."""

    weights: str  # the diffusion model
    sampler: SamplerConfig
    guidance: GuidanceConfig = UNGUIDED
    evaluations: float = Field(0.0, exclude=True)  # network evaluations per image, in passes of the diffusion model

    @property
    def name(self) -> str:
        """Return a name for folders: the main values and a hash of all."""
        digest = hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        return f"{self.sampler.name}-{self.sampler.num_steps}-scale{self.guidance.scale:.4g}-{digest[:8]}"

    @property
    def chain(self) -> str:
        """Return a description of the sampler."""
        parts = [self.sampler.name, f"{self.sampler.num_steps} steps"]
        parts += [f"eta {self.sampler.eta:g}"] if self.sampler.eta else []
        parts += [f"churn {self.sampler.s_churn:g}"] if self.sampler.s_churn else []
        return ", ".join(parts)

    def __str__(self) -> str:
        guidance = self.guidance
        kind = "" if guidance.kind in ("none", "classifier") else f"{guidance.kind} "
        parts = [self.chain, f"{kind}scale {guidance.scale:.4g}"]
        parts += [f"weaker model {guidance.weak_weights}"] if guidance.weak_weights else []
        low, high = guidance.interval
        parts += [f"guided from {low:g} to {high:g}"] if guidance.interval != WHOLE_CHAIN else []
        return ", ".join(parts)


class SpaceConfig(BaseModel, frozen=True, extra="forbid"):
    """The values that a search combines."""

    guidance: tuple[GuidanceKind, ...] = Field(("classifier",), min_length=1)  # kinds of guidance
    weak_weights: tuple[str, ...] = ()  # weaker models for the kind auto, such as earlier snapshots
    scales: tuple[float, ...] = Field((0.0, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)  # guidance scales, rising
    continuous: bool = True  # also try scales between those given
    num_steps: tuple[int, ...] = Field((10, 25), min_length=1)  # steps of the chain, rising
    samplers: tuple[SamplerName, ...] = Field(("ddim",), min_length=1)  # names of samplers
    etas: tuple[float, ...] = Field((0.0,), min_length=1)  # for ddim: 0 = deterministic, 1 = ancestral
    s_churn: tuple[float, ...] = Field((0.0,), min_length=1)  # for edm: amount of noise that is added
    intervals: tuple[Interval, ...] = Field((WHOLE_CHAIN,), min_length=1)  # guided parts of the chain: 0 clean, 1 noise

    @model_validator(mode="after")
    def _check(self) -> "SpaceConfig":
        for name in ("scales", "num_steps"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}={values} must increase from one value to the next")
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
        """Every kind of guidance, combined with every weaker model if the kind is auto."""
        guides: list[Guide] = []
        for kind in self.guidance:
            guides += [(kind, weak) for weak in self.weak_weights] if kind == "auto" else [(kind, None)]
        return tuple(guides)


@dataclass(frozen=True)
class Passes:
    """The cost of a forward pass of each network."""

    diffusion: DiffusionConfig
    guides: Mapping[Guide, float]  # multiply-adds of a guide's pass, as a multiple of the diffusion model's

    def of(self, setting: Setting) -> float:
        """Return the network evaluations for an image, in passes of the diffusion model."""
        counted = sampling_evaluations(setting.sampler, setting.guidance, self.diffusion)
        guide = self.guides[setting.guidance.kind, setting.guidance.weak_weights] if counted.guide else 0.0
        return round(counted.model + counted.guide * guide, 4)


class Space:
    """The settings that a config allows with at most `most` network evaluations for an image."""

    def __init__(self, config: SpaceConfig, weights: tuple[str, ...], passes: Passes, most: float) -> None:
        self._config, self._weights, self._passes, self._most = config, weights, passes, most

    def grid(self) -> list[Setting]:
        """Return every allowed combination of the given values, each once."""
        c = self._config
        settings = (
            self._setting(*values)
            for values in itertools.product(
                self._weights, c.samplers, c.num_steps, c.etas, c.s_churn, c.guides, c.scales, c.intervals
            )
        )
        return [setting for setting in dict.fromkeys(settings) if self.allows(setting)]

    def allows(self, setting: Setting) -> bool:
        """Return whether a setting takes at most the allowed number of network evaluations."""
        return setting.evaluations <= self._most

    def suggest(self, trial: optuna.Trial) -> Setting:
        """Return the setting of a trial of an Optuna study; ask only for parameters that have an effect."""
        c = self._config

        def choose(name: str, values: Sequence[Value], ordered: bool = True, used: bool = True) -> Value:
            if not used or len(values) == 1:
                return values[0]
            if ordered:
                return values[trial.suggest_int(name, 0, len(values) - 1)]
            return values[trial.suggest_categorical(name, range(len(values)))]

        weights = choose("weights", self._weights, ordered=False)
        sampler = choose("sampler", c.samplers, ordered=False)
        num_steps = choose("num_steps", c.num_steps)
        if c.continuous:
            scale = self._scale_at(trial.suggest_float("scale", 0, len(c.scales) - 1))
        else:
            scale = choose("scale", c.scales)
        eta = choose("eta", c.etas, used=SAMPLERS[sampler].takes_eta)
        s_churn = choose("s_churn", c.s_churn, used=sampler == "edm")
        guide = choose("guide", c.guides, ordered=False, used=scale > 0)
        interval = choose("interval", c.intervals, ordered=False, used=scale > 0)
        return self._setting(weights, sampler, num_steps, eta, s_churn, guide, scale, interval)

    def spread(self, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Return parameters of `count` trials that cover the space evenly: a Latin square of scale, steps, sampler."""
        c = self._config

        def levels(values: int) -> list[int]:
            return rng.permutation(np.arange(count) % values).tolist()

        places = (np.arange(count) + 0.5) / count * (len(c.scales) - 1)
        columns = {
            "scale": rng.permutation(places).tolist() if c.continuous else levels(len(c.scales)),
            "num_steps": levels(len(c.num_steps)),
            "sampler": levels(len(c.samplers)),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _scale_at(self, place: float) -> float:
        """Return the scale at a fractional position in the list of scales, by linear interpolation, to four digits."""
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
        """Return a setting in which values that have no effect are at their defaults, so that equal ones are equal."""
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
    """Return the settings with more steps that are worth a trial, given the objective of those with the fewest steps.

    For each weights, sampler and eta, the two best scales at the fewest steps bound the scales at more steps. The best
    scale falls with more steps: ADM's own is about 2.4 times as large at 25 DDIM steps as at 250. Therefore the lower
    bound is the largest scale of the grid that is at most the lower one of the two times (fewest / steps)^0.4.
    """
    kept: list[Setting] = []
    for setting in more:
        first = {other.guidance.scale: value for other, value in fewest.items() if _chain(other) == _chain(setting)}
        two = sorted(sorted(first, key=lambda scale: first[scale])[:2])
        least = min(other.sampler.num_steps for other in fewest if _chain(other) == _chain(setting))
        shifted = two[0] * (least / setting.sampler.num_steps) ** SHIFT
        below = max((scale for scale in first if scale <= shifted), default=two[0])
        if below <= setting.guidance.scale <= two[-1]:
            kept.append(setting)
    return kept


def _chain(setting: Setting) -> tuple[object, ...]:
    return setting.weights, setting.sampler.name, setting.sampler.eta, setting.sampler.s_churn


class GridProposals:
    """Proposes all settings of a grid at once, whatever the requested count.

    With `proxy`, it first proposes the settings with the fewest steps, then those that `narrowed` keeps of the others.
    See `halving.Proposals` for the methods.
    """

    def __init__(self, grid: list[Setting], proxy: bool) -> None:
        least = {chain: min(s.sampler.num_steps for s in grid if _chain(s) == chain) for chain in map(_chain, grid)}
        first = [setting for setting in grid if not proxy or setting.sampler.num_steps == least[_chain(setting)]]
        self._waiting, self._rest = first, [setting for setting in grid if setting not in first]
        self._values: dict[Setting, float] = {}

    def ask(self, count: int) -> list[Setting]:
        if not self._waiting and self._rest:
            self._waiting, self._rest = narrowed(self._values, self._rest), []
        proposed, self._waiting = self._waiting, []
        return proposed

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        self._values[setting] = values[0] if values and violation <= 0 else np.inf


class OptunaProposals:
    """Proposes settings by Optuna's TPE, which learns from the outcomes at the first rung.

    Each process starts a new study. The same calls of `ask` and `tell` in the same order give the same proposals.
    Ray Tune's OptunaSearch cannot promise that: it tells the study of trials in the order in which they end, and TPE
    depends on this order.
    """

    def __init__(self, space: Space, seed: int, num_objectives: int, round_size: int) -> None:
        self._space = space
        self._trials: dict[Setting, optuna.Trial] = {}
        rng = keyed_rng(Purpose.SEARCH, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=int(rng.integers(2**31)),
                n_startup_trials=round_size,
                multivariate=True,
                group=True,  # some settings lack some parameters
            )
        self._study = optuna.create_study(directions=["minimize"] * num_objectives, sampler=sampler)
        for parameters in space.spread(round_size, rng):
            self._study.enqueue_trial(parameters)

    def ask(self, count: int) -> list[Setting]:
        proposed: list[Setting] = []
        for _ in range(MAX_ATTEMPTS):
            if len(proposed) == count:
                break
            trial = self._study.ask()
            setting = self._space.suggest(trial)
            if setting in self._trials or not self._space.allows(setting):
                self._tell(trial, [], 1.0)
                continue
            self._trials[setting] = trial
            proposed.append(setting)
        return proposed

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        self._tell(self._trials[setting], values, violation)

    def _tell(self, trial: optuna.Trial, values: list[float], violation: float) -> None:
        trial.set_constraint("violation", violation)
        if values and np.isfinite(values).all():
            self._study.tell(trial, values)
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
