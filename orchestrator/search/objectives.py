"""Objectives and constraints of a search: entries of the table of metrics, and the number of network evaluations."""

import re
from typing import NamedTuple

import numpy as np

from models.metrics import MIN_CORRECTED_RATIO
from orchestrator.evaluation.extraction import ArrayName
from orchestrator.evaluation.metrics import METRICS, Comparison, Metric, metric_named

EVALUATIONS = "evaluations"  # of networks, per image; known without sampling


def sign_of(name: str) -> int:
    """Return 1 if smaller values of a metric are better, and -1 if larger values are."""
    return 1 if name == EVALUATIONS else metric_named(name).sign


class Objective(NamedTuple):
    """A metric to optimize or to bound."""

    name: str
    metric: Metric | None  # None = network evaluations

    @classmethod
    def parse(cls, name: str, extractor: str) -> "Objective":
        """Return the objective of this name, measured with the named extractor.

        Raises:
            ValueError: there is no such metric, or a search cannot compare trials by it.
        """
        metrics: dict[str, Metric | None] = {m.report_name(extractor): m for m in METRICS.values() if m.scores}
        metrics[EVALUATIONS] = None
        if name not in metrics:
            raise ValueError(f"{name!r} is not a metric that a search can compare trials by; use {', '.join(metrics)}")
        return cls(name, metrics[name])

    def scores(self, comparison: Comparison, evaluations: float) -> np.ndarray:
        """Return scores [n] of the samples, smaller is better; an empty array if n is too small.

        Raises:
            ValueError: the samples lack what the metric needs, such as labels of the reference's classes.
        """
        if self.metric is None:
            return np.full(len(comparison.labels), float(evaluations))
        assert self.metric.scores is not None, "parse accepts no other metric"
        if (reason := self.metric.missing_reason(comparison)) is not None:
            raise ValueError(f"{self.name} cannot be measured{f': {reason}' if reason else ''}")
        return self.metric.scores(comparison)

    def is_unbiased(self, comparison: Comparison, is_last_rung: bool) -> bool:
        """Return whether the mean of the scores is an unbiased estimate of the metric.

        Intervals and constraints need this; paired differences of trials do not. The value of recall depends on n, and
        its value at the last rung is the one that constraints bound.
        """
        arrays: dict[str, ArrayName] = {"fd": "pool", "sfd": "spatial"}
        if self.metric is None:  # network evaluations are exact
            return True
        if self.metric.name == "recall":
            return is_last_rung
        if self.metric.name not in arrays:
            return True
        n, dimension = comparison.array(arrays[self.metric.name]).shape
        return n >= MIN_CORRECTED_RATIO * dimension


class Constraint(NamedTuple):
    """A bound on a metric, such as "recall>=0.4"."""

    metric: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        """Parse metric<=bound or metric>=bound; raise ValueError for any other text."""
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        if not match:
            raise ValueError(
                f"constraint {text!r} is not of the form metric<=bound or metric>=bound; pass one such as recall>=0.4"
            )
        if match[1] == EVALUATIONS and match[2] == ">=":
            raise ValueError(f"constraint {text!r}: evaluations can only be bounded from above, as in evaluations<=25")
        return cls(match[1], match[2] == "<=", float(match[3]))

    def excess(self, scores: np.ndarray) -> np.ndarray:
        """Return values [n] whose mean is by how much the metric breaks the bound; 0 or less if it satisfies it."""
        excess = sign_of(self.metric) * scores - self.bound
        return excess if self.at_most else -excess
