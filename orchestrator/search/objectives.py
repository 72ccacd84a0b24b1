"""What a search optimises and what bounds it: entries of the table of metrics, and evaluations, known beforehand."""

import re
from typing import Any, NamedTuple

import numpy as np

from models.metrics import MIN_INTERVAL_RATIO
from orchestrator.evaluation.extraction import ArrayName
from orchestrator.evaluation.metrics import METRICS, Comparison, Metric, metric_named

EVALUATIONS = "evaluations"  # of networks, per image: known without sampling


def sign_of(name: str) -> int:
    """Return 1 for a metric of which less is better, and -1 where more is."""
    return 1 if name == EVALUATIONS else metric_named(name).sign


class Objective(NamedTuple):
    """A metric to optimise."""

    name: str
    metric: Metric | None  # None = evaluations

    @classmethod
    def parse(cls, name: str, extractor: str) -> "Objective":
        """The metric of this name by the extractor of that one.

        Raises:
            ValueError: there is none.
        """
        known: dict[str, Metric | None] = {m.named(extractor): m for m in METRICS.values() if m.scores}
        known[EVALUATIONS] = None
        if name not in known:
            raise ValueError(f"objective={name!r} is none of {', '.join(known)}")
        return cls(name, known[name])

    def stands_in(self, made: Comparison) -> bool:
        """Whether the kernel distance stands in its place, since n <= 2 D."""
        names: dict[str, ArrayName] = {"fd": "pool", "sfd": "spatial"}
        array = made.read(names[self.metric.name]) if self.metric and self.metric.name in names else None
        return array is not None and len(array) <= MIN_INTERVAL_RATIO * array.shape[1]

    def scores(self, made: Comparison, evaluations: int) -> np.ndarray:
        """Return scores [c, n] of the samples: less is better, and all criteria must agree.

        Raises:
            RuntimeError: the extractor has no such features.
        """
        if self.metric is None:
            return np.full((1, len(made.labels)), float(evaluations))
        assert self.metric.scores is not None, "parse takes no other metric"
        return self.metric.scores(made)


class Constraint(NamedTuple):
    """A bound on a metric, as "recall>=0.4"."""

    metric: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        """Raises ValueError where the text is no such bound."""
        found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        if not found:
            raise ValueError(f"constraint {text!r} is not of the form metric<=bound or metric>=bound")
        return cls(found[1], found[2] == "<=", float(found[3]))

    def violation(self, metrics: dict[str, Any], surely: bool) -> float:
        """By how much `metrics` break it, 0 or less where they keep it; with `surely` by the interval's better end.

        Raises:
            ValueError: there is no such metric.
        """
        if self.metric not in metrics:
            raise ValueError(f"constraint on {self.metric!r}: it is none of {', '.join(sorted(metrics))}")
        found = metrics[self.metric]
        if surely and found["interval"] is None:
            return 0.0
        low, high = found["interval"] if surely else (found["value"],) * 2
        return float(low - self.bound if self.at_most else self.bound - high)
