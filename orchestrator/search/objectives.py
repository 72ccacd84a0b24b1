"""Objectives and constraints of a search: entries of the table of metrics, and the number of network evaluations."""

import re
from typing import NamedTuple

import numpy as np

from models.metrics import MIN_CORRECTED_RATIO
from orchestrator.evaluation.extraction import ArrayName
from orchestrator.evaluation.metrics import METRICS, Comparison, Metric, metric_named

EVALUATIONS = "evaluations"  # of networks, per image; known without sampling


def sign_of(name: str) -> int:
    """Return 1 for a metric of which less is better, and -1 for one of which more is better."""
    return 1 if name == EVALUATIONS else metric_named(name).sign


class Objective(NamedTuple):
    """A metric to optimise or to bound."""

    name: str
    metric: Metric | None  # None = network evaluations

    @classmethod
    def parse(cls, name: str, extractor: str) -> "Objective":
        """Return the metric of this name, measured with the named extractor.

        Raises:
            ValueError: a search cannot compare trials by this metric, or there is none of this name.
        """
        known: dict[str, Metric | None] = {m.report_name(extractor): m for m in METRICS.values() if m.scores}
        known[EVALUATIONS] = None
        if name not in known:
            raise ValueError(f"{name!r} is not a metric that a search can compare trials by; use {', '.join(known)}")
        return cls(name, known[name])

    def scores(self, comparison: Comparison, evaluations: float) -> np.ndarray:
        """Return scores [n] of the samples, of which less is better; an empty array if n is too small.

        Raises:
            ValueError: the samples lack what the metric needs, such as labels of the reference's classes.
        """
        if self.metric is None:
            return np.full(len(comparison.labels), float(evaluations))
        assert self.metric.scores is not None, "parse accepts no other metric"
        if (reason := self.metric.missing_reason(comparison)) is not None:
            raise ValueError(f"{self.name} cannot be measured{f': {reason}' if reason else ''}")
        return self.metric.scores(comparison)

    def is_unbiased(self, comparison: Comparison, full: bool) -> bool:
        """Return whether the mean of the scores is an unbiased estimate of the metric.

        Paired differences of trials do not need this. `full` states that n is that of the last rung: the value of
        recall depends on n, and its value there is the one that constraints bound.
        """
        arrays: dict[str, ArrayName] = {"fd": "pool", "sfd": "spatial"}
        if self.metric is None or self.metric.name not in arrays:
            return self.metric is None or self.metric.name != "recall" or full
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
            raise ValueError(f"constraint {text!r} is not of the form metric<=bound or metric>=bound")
        if match[1] == EVALUATIONS and match[2] == ">=":
            raise ValueError(f"constraint {text!r}: evaluations can only be bounded from above, as in evaluations<=25")
        return cls(match[1], match[2] == "<=", float(match[3]))

    def excess(self, scores: np.ndarray) -> np.ndarray:
        """Return numbers [n] whose mean is the excess of the metric over the bound (0 or less if it does not)."""
        above = sign_of(self.metric) * scores - self.bound
        return above if self.at_most else -above
