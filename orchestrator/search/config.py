"""The config of a search, and the base config of all jobs that evaluate settings."""

import math
import re
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from pydantic import Field, model_validator

from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig
from orchestrator.evaluation.extractors import LoadExtractor, extractor_loader
from orchestrator.generation.config import GenerationConfig
from orchestrator.search.objectives import EVALUATIONS, Constraint
from orchestrator.search.space import PassCosts, Setting, Space, SpaceConfig


class Limit(NamedTuple):
    """A limit of the budget; by default infinite."""

    amount: float = math.inf
    unit: Literal["samples", "%", "h"] = "samples"  # % = of the network evaluations if all trials reach the last rung

    @classmethod
    def parse(cls, text: str | None) -> "Limit":
        """Parse a text such as "20000", "25%" or "1.5h"; raise ValueError for any other."""
        if text is None:
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|h?)", text.replace(",", "").strip())
        if not match or not float(match[1]):
            raise ValueError(
                f"budget={text!r} is not accepted; pass a number of samples (20000), a share of the cost of all trials "
                "(25%) or hours (1.5h)"
            )
        return cls(float(match[1]), cast(Literal["%", "h"], match[2]) or "samples")


def round_up(n: int, batch_size: int) -> int:
    """Return n rounded up to whole batches."""
    return -(-n // batch_size) * batch_size


class TrialsConfig(JobConfig):
    """How settings are sampled, all with the same labels and noise, and how their samples are measured."""

    classifier: str | None = None  # classifier for guidance: a run's folder or a file
    reference: str  # prepared dataset (its training split) or published batch (.npz) with images
    output: str  # folder of records and results
    objective: tuple[str, ...] = Field(("fd_digits",), min_length=1, max_length=2)  # one or two metrics
    seed: int = Field(0, ge=0)  # seed of labels and noise, which all settings share
    labels: str = "balanced"  # balanced, uniform, or any other value that generate_samples accepts
    batch_size: int = Field(64, gt=0)  # images in a batch
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of convolutions and attention
    compile: Operational[bool] = False  # torch.compile the networks: a slower start, but faster on long runs
    extractor: str = "digits"  # inception, efficientnet, digits, or your own as package.module.name
    extractor_weights: str | None = None  # weights file of inception; None = the released file in extractors/
    num_workers: Operational[int] = Field(1, ge=0)  # sampling workers for all trials; 0 = in this process, without Ray
    num_gpus: Operational[float] = Field(0.0, ge=0)  # GPUs for each worker
    num_threads: Operational[int] = Field(1, gt=0)  # CPU threads of each worker
    cost: Operational[CostConfig] = CostConfig()

    @property
    def max_samples(self) -> int:
        """Return the maximum number of samples of a setting."""
        raise NotImplementedError

    @property
    def max_networks(self) -> int:
        """Return how many combinations of networks a worker keeps in memory."""
        return 1

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        """Return the constraints on sampled metrics."""
        return ()

    def generation(self, weights: str, seed: int, setting: Setting | None = None) -> GenerationConfig:
        """Return the config that samples from a diffusion model, with the sampler and guidance of `setting`, if any."""
        names = (
            "store", "classifier", "output", "labels", "dtype", "batch_size", "num_gpus", "num_threads", "compile",
        )  # fmt: skip
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        if setting is not None:
            fields |= {"sampler": setting.sampler, "guidance": setting.guidance}
        return GenerationConfig(
            weights=weights, num_samples=self.max_samples, seed=seed, shard_size=self.batch_size, **fields
        )

    def extractor_loader(self, image_size: int) -> LoadExtractor:
        """Return the function that loads the feature network."""
        dataset = None if self.reference.endswith(".npz") else self.path(self.reference)
        weights = self.path(self.extractor_weights) if self.extractor_weights else None
        folder = self.path("extractors")
        return extractor_loader(self.extractor, weights, dataset, folder, image_size)


class SearchConfig(TrialsConfig):
    """Which settings of which networks are tried, and how they are compared."""

    weights: tuple[str, ...] = Field(min_length=1)  # diffusion models to choose from, such as several averages of a run
    space: SpaceConfig = SpaceConfig()
    constraints: tuple[str, ...] = ()  # bounds on metrics, such as evaluations<=25 or recall>=0.4
    rungs: tuple[int, ...] = Field((64, 128, 256, 512, 1024, 2048), min_length=1)  # samples at which trials compete
    trials: int = Field(24, gt=0)  # maximum number of settings to try
    round_size: int = Field(8, gt=0)  # settings that Optuna proposes at once; a grid is proposed as a whole
    proxy: bool = False  # for a grid: try the fewest steps first, then more steps near the best scales
    finalists: int = Field(2, gt=0)  # number of best trials that are evaluated again on fresh seeds
    alpha: float = Field(0.05, gt=0, lt=1)  # family-wise error: probability of ever eliminating the best trial
    budget: Operational[str | None] = None  # samples (20000), hours (1.5h), or a share of the cost of all trials (25%)
    fresh_seed: int = Field(1_000_003, ge=0)  # seed of the final evaluation, which no decision has used

    @property
    def max_samples(self) -> int:
        return self.rungs[-1]

    @property
    def max_networks(self) -> int:
        return len(self.weights) * (1 + len(self.space.weak_weights))

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 32:
            raise ValueError(f"rungs={self.rungs} must increase, and the first rung must be at least 32")
        if "classifier" in self.space.guidance and self.space.scales[-1] > 0 and self.classifier is None:
            raise ValueError(f"space.scales={self.space.scales} has scales above 0, which need --classifier")
        if self.seed == self.fresh_seed:
            raise ValueError(f"fresh_seed={self.fresh_seed} must differ from seed, so that the final samples are new")
        if len(set(self.objective)) < len(self.objective):
            raise ValueError(f"objective={self.objective} has a metric twice; pass one metric, or two different ones")
        for text in self.constraints:
            Constraint.parse(text)
        first, last = (round_up(n, self.batch_size) for n in (self.rungs[0], self.rungs[-1]))
        minimum = first + self.finalists * last
        limit = Limit.parse(self.budget)
        if limit.unit == "samples" and limit.amount < minimum:
            raise ValueError(
                f"budget={self.budget} must be at least {minimum:,} samples, for one trial at the first rung and for "
                "the final evaluation"
            )
        return self

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        """Return the constraints on sampled metrics; those on network evaluations limit the space instead."""
        return tuple(c for c in map(Constraint.parse, self.constraints) if c.metric != EVALUATIONS)

    def num_trials(self, grid: list[Setting]) -> int:
        """Return the maximum number of settings to try."""
        return self.trials if self.space.has_scales_between else min(self.trials, len(grid))

    def proposes_grid(self, grid: list[Setting]) -> bool:
        """Return whether the whole grid is tried; otherwise Optuna proposes settings."""
        return not self.space.has_scales_between and len(grid) <= self.trials


def space_of(config: SearchConfig, passes: PassCosts) -> Space:
    """Return the space of settings for networks whose passes have these costs.

    Raises:
        ValueError: a number of steps does not fit a sampler, or no setting satisfies the bound on network evaluations.
    """
    bounds = map(Constraint.parse, config.constraints)
    max_evaluations = min((c.bound for c in bounds if c.metric == EVALUATIONS), default=np.inf)
    space = Space(config.space, config.weights, passes, max_evaluations)
    if not space.grid():
        raise ValueError(f"constraints={', '.join(config.constraints)}: no setting of the space satisfies them")
    return space
