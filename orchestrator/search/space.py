"""The settings that a search may try, and two ways to propose them: a grid, or Optuna."""

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

MAX_ATTEMPTS = 200  # proposals that Optuna is asked for in one round, because it may repeat earlier ones

Guide = tuple[GuidanceKind, str | None]  # a kind of guidance, and the weaker model if the kind is auto
UNGUIDED = GuidanceConfig(kind="none")

SCALE_EXPONENT = 0.4  # the best scale is about proportional to steps^-0.4; ADM's at 25 and 250 steps give 0.38

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
    def sampler_label(self) -> str:
        """Return a description of the sampler."""
        parts = [self.sampler.name, f"{self.sampler.num_steps} steps"]
        parts += [f"eta {self.sampler.eta:g}"] if self.sampler.eta else []
        parts += [f"churn {self.sampler.s_churn:g}"] if self.sampler.s_churn else []
        return ", ".join(parts)

    def __str__(self) -> str:
        guidance = self.guidance
        kind = "" if guidance.kind in ("none", "classifier") else f"{guidance.kind} "
        parts = [self.sampler_label, f"{kind}scale {guidance.scale:.4g}"]
        parts += [f"weaker model {guidance.weak_weights}"] if guidance.weak_weights else []
        low, high = guidance.interval
        parts += [f"guided from {low:g} to {high:g}"] if guidance.interval != WHOLE_CHAIN else []
        return ", ".join(parts)


class SpaceConfig(BaseModel, frozen=True, extra="forbid"):
    """The values that a search combines."""

    guidance: tuple[GuidanceKind, ...] = Field(("classifier",), min_length=1)  # kinds of guidance
    weak_weights: tuple[str, ...] = ()  # weaker models for the kind auto, such as earlier snapshots
    scales: tuple[float, ...] = Field((0.0, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)  # guidance scales, increasing
    continuous: bool = True  # also try scales between those given
    num_steps: tuple[int, ...] = Field((10, 25), min_length=1)  # numbers of sampling steps, increasing
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
    def has_scales_between(self) -> bool:
        """Return whether the search also tries scales between those given; a single one, or no guidance, has none."""
        return self.continuous and len(self.scales) > 1 and self.guidance != ("none",)

    @property
    def guides(self) -> tuple[Guide, ...]:
        """Return every kind of guidance, combined with every weaker model if the kind is auto."""
        guides: list[Guide] = []
        for kind in self.guidance:
            guides += [(kind, weak) for weak in self.weak_weights] if kind == "auto" else [(kind, None)]
        return tuple(guides)


@dataclass(frozen=True)
class PassCosts:
    """The cost of a pass of each guide, relative to a pass of the diffusion model."""

    diffusion: DiffusionConfig
    guides: Mapping[Guide, float]  # multiply-adds of a guide's pass, as a multiple of the diffusion model's

    def evaluations(self, setting: Setting) -> float:
        """Return the network evaluations for an image, in passes of the diffusion model."""
        passes = sampling_evaluations(setting.sampler, setting.guidance, self.diffusion)
        cost = self.guides[setting.guidance.kind, setting.guidance.weak_weights] if passes.guide else 0.0
        return round(passes.model + passes.guide * cost, 4)


class Space:
    """The settings that a config allows with at most `max_evaluations` network evaluations for an image."""

    def __init__(
        self, config: SpaceConfig, weights: tuple[str, ...], passes: PassCosts, max_evaluations: float
    ) -> None:
        self._config, self._weights, self._passes, self._max_evaluations = config, weights, passes, max_evaluations

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
        """Return whether a setting needs at most the allowed number of network evaluations."""
        return setting.evaluations <= self._max_evaluations

    def suggest(self, trial: optuna.Trial) -> Setting:
        """Return the setting of a trial of an Optuna study; define only parameters that have an effect."""
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
        if c.has_scales_between:
            scale = self._scale_at(trial.suggest_float("scale", 0, len(c.scales) - 1))
        else:
            scale = choose("scale", c.scales)
        eta = choose("eta", c.etas, used=SAMPLERS[sampler].takes_eta)
        s_churn = choose("s_churn", c.s_churn, used=sampler == "edm")
        guide = choose("guide", c.guides, ordered=False, used=scale > 0)
        interval = choose("interval", c.intervals, ordered=False, used=scale > 0)
        return self._setting(weights, sampler, num_steps, eta, s_churn, guide, scale, interval)

    def first_parameters(self, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Return Optuna parameters of `count` trials that cover scales, numbers of steps and samplers evenly."""
        c = self._config

        def choices(values: int) -> list[int]:
            return rng.permutation(np.arange(count) % values).tolist()

        positions = (np.arange(count) + 0.5) / count * (len(c.scales) - 1)
        columns = {
            "scale": rng.permutation(positions).tolist() if c.has_scales_between else choices(len(c.scales)),
            "num_steps": choices(len(c.num_steps)),
            "sampler": choices(len(c.samplers)),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _scale_at(self, position: float) -> float:
        """Return the scale at a fractional position in the list of scales, by linear interpolation, to four digits."""
        knots = self._config.scales
        return float(f"{np.interp(position, np.arange(len(knots)), knots):.4g}")

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
        """Return a setting whose values without effect are the defaults, so that equivalent settings are equal."""
        sampler_config = SamplerConfig(
            name=sampler,
            num_steps=num_steps,
            eta=eta if SAMPLERS[sampler].takes_eta else 0.0,
            s_churn=s_churn if sampler == "edm" else 0.0,
        )
        kind, weak_weights = guide
        guidance = UNGUIDED
        if kind != "none" and scale > 0:
            guidance = GuidanceConfig(kind=kind, scale=scale, weak_weights=weak_weights, interval=interval)
        setting = Setting(weights=weights, sampler=sampler_config, guidance=guidance)
        return setting.model_copy(update={"evaluations": self._passes.evaluations(setting)})


def narrow_scales(measured: dict[Setting, float], candidates: list[Setting]) -> list[Setting]:
    """Return the candidates, which have more steps, whose scales are worth a trial.

    measured: the objective of the settings with the fewest steps.

    For each combination of weights, sampler and guide, the two best scales at the fewest steps bound the scales at more
    steps. The best scale falls with more steps: ADM's own is about 2.4 times as large at 25 DDIM steps as at 250.
    Therefore the lower bound is the largest scale of the grid up to the lower one of the two times
    (fewest / steps)^0.4. An unguided setting belongs to all guides.
    """
    kept: list[Setting] = []
    for setting in candidates:
        alike = {other: value for other, value in measured.items() if _family(other) == _family(setting)}
        fewest = min(other.sampler.num_steps for other in alike)
        shift = (fewest / setting.sampler.num_steps) ** SCALE_EXPONENT
        guides, own_guide = {_guide(other) for other in alike if other.guidance.scale}, _guide(setting)
        if own_guide in guides or not guides:  # else it is unguided, or no trial of its guide was measured
            guides = {own_guide}
        for guide in guides:
            objective = {
                other.guidance.scale: value
                for other, value in alike.items()
                if _guide(other) == guide or not other.guidance.scale
            }
            lowest, highest = _scale_bounds(objective, shift)
            if lowest <= setting.guidance.scale <= highest:
                kept.append(setting)
                break
    return kept


def _scale_bounds(objective: dict[float, float], shift: float) -> tuple[float, float]:
    """Return the lowest and the highest scale that `narrow_scales` keeps; objective: by scale, smaller is better."""
    best_two = sorted(sorted(objective, key=lambda scale: objective[scale])[:2])
    lowest = max((scale for scale in objective if scale <= best_two[0] * shift), default=best_two[0])
    return lowest, best_two[-1]


def _guide(setting: Setting) -> tuple[object, ...]:
    """Return what settings have in common that differ only in the scale of their guidance."""
    return setting.guidance.kind, setting.guidance.weak_weights, setting.guidance.interval


def _family(setting: Setting) -> tuple[object, ...]:
    """Return what settings have in common that differ only in the number of steps and the guidance."""
    return setting.weights, setting.sampler.name, setting.sampler.eta, setting.sampler.s_churn


class GridProposals:
    """Proposes all settings of a grid at once, whatever the requested count.

    With `proxy`, it first proposes the settings with the fewest steps, then those of the others that `narrow_scales`
    keeps. See `halving.Proposals` for the methods.
    """

    def __init__(self, grid: list[Setting], proxy: bool) -> None:
        fewest: dict[tuple[object, ...], int] = {}
        for setting in grid:
            steps = setting.sampler.num_steps
            fewest[_family(setting)] = min(steps, fewest.get(_family(setting), steps))
        self._next = [s for s in grid if not proxy or s.sampler.num_steps == fewest[_family(s)]]
        self._rest = [setting for setting in grid if setting not in self._next]
        self._values: dict[Setting, float] = {}

    def ask(self, count: int) -> list[Setting]:
        if not self._next and self._rest:
            self._next, self._rest = narrow_scales(self._values, self._rest), []
        proposed, self._next = self._next, []
        return proposed

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        self._values[setting] = values[0] if values and violation <= 0 else np.inf


class OptunaProposals:
    """Proposes settings by Optuna's TPE sampler, which learns from the outcomes at the first rung.

    Each process starts a new study. The same calls of `ask` and `tell` in the same order give the same proposals.
    Ray Tune's OptunaSearch cannot promise that: it reports trials to the study in the order in which they end, and TPE
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
        for parameters in space.first_parameters(round_size, rng):
            self._study.enqueue_trial(parameters)

    def ask(self, count: int) -> list[Setting]:
        proposed: list[Setting] = []
        for _ in range(MAX_ATTEMPTS):
            if len(proposed) == count:
                break
            trial = self._study.ask()
            setting = self._space.suggest(trial)
            if setting in self._trials or not self._space.allows(setting):
                self._tell(trial, [], 1.0)  # as a failed trial, so that Optuna proposes other settings
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
