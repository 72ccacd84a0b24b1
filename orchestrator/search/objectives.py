"""What a search optimises and what bounds it: entries of the table of metrics, and evaluations, known beforehand."""

import re
from typing import NamedTuple

import numpy as np

from models.metrics import MIN_CORRECTED_RATIO
from orchestrator.evaluation.extraction import ArrayName
from orchestrator.evaluation.metrics import METRICS, Comparison, Metric, metric_named

EVALUATIONS = "evaluations"  # of networks, per image: known without sampling


def sign_of(name: str) -> int:
    """Return 1 for a metric of which less is better, and -1 where more is."""
    return 1 if name == EVALUATIONS else metric_named(name).sign


class Objective(NamedTuple):
    """A metric to optimise, or to bound."""

    name: str
    metric: Metric | None  # None = evaluations

    @classmethod
    def parse(cls, name: str, extractor: str) -> "Objective":
        """Return the metric of this name by the extractor of that one.

        Raises:
            ValueError: there is none whose sampling error is known.
        """
        known: dict[str, Metric | None] = {m.named(extractor): m for m in METRICS.values() if m.scores}
        known[EVALUATIONS] = None
        if name not in known:
            raise ValueError(f"{name!r} is no metric that a search can compare trials by: {', '.join(known)}")
        return cls(name, known[name])

    def scores(self, made: Comparison, evaluations: float) -> np.ndarray:
        """Return scores [n] of the samples, of which less is better; an empty array where n is too small.

        Raises:
            ValueError: the samples lack what the metric needs, such as labels of the reference's classes.
        """
        if self.metric is None:
            return np.full(len(made.labels), float(evaluations))
        assert self.metric.scores is not None, "parse takes no other metric"
        if (reason := self.metric.lacks(made)) is not None:
            raise ValueError(f"{self.name} cannot be measured{f': {reason}' if reason else ''}")
        return self.metric.scores(made)

    def is_unbiased(self, made: Comparison, full: bool) -> bool:
        """Return whether the mean of the scores is the metric's own value; differences of trials need less.

        full: n is that of the last rung, at which a metric that depends on n is meant.
        """
        arrays: dict[str, ArrayName] = {"fd": "pool", "sfd": "spatial"}
        if self.metric is None or self.metric.name not in arrays:
            return self.metric is None or self.metric.name != "recall" or full
        n, dimension = made.array(arrays[self.metric.name]).shape
        return n >= MIN_CORRECTED_RATIO * dimension


class Constraint(NamedTuple):
    """A bound on a metric, as "recall>=0.4"."""

    metric: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        """Return the bound that the text is; ValueError where it is none."""
        found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*([-+.\deE]+)\s*", text)
        if not found:
            raise ValueError(f"constraint {text!r} is not of the form metric<=bound or metric>=bound")
        if found[1] == EVALUATIONS and found[2] == ">=":
            raise ValueError(f"constraint {text!r}: evaluations can only be bounded from above, as evaluations<=25")
        return cls(found[1], found[2] == "<=", float(found[3]))

    def excess(self, scores: np.ndarray) -> np.ndarray:
        """Return [n] numbers whose mean is by how much the metric breaks the bound; 0 or less where it keeps it."""
        above = sign_of(self.metric) * scores - self.bound
        return above if self.at_most else -above
