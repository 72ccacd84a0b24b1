"""What a search optimises and what bounds it: metrics by name, with the scores by which trials are compared."""

import re
from typing import Any, NamedTuple

import numpy as np

from models.features import Features
from models.manifolds import realism
from models.metrics import MIN_INTERVAL_RATIO, Gaussian, Moments, kid_scores, softmax
from models.paired_tests import KID_ROWS, frechet_criteria, inception_criteria, recall_criteria, share_criteria
from orchestrator.evaluation.extraction import ArrayName, Labelled
from orchestrator.evaluation.measurement import metric_name

EVALUATIONS = "evaluations"  # of networks, per image: known without sampling

OF_FEATURES = ("fd", "sfd", "kid", "inception_score")  # each extractor has its own name for them
PLAIN = ("precision", "recall", "accuracy", EVALUATIONS)
MORE_IS_BETTER = ("inception_score", "precision", "recall", "accuracy")


def sign_of(name: str) -> int:
    """1 for a metric of which less is better, -1 where more is."""
    return -1 if name.startswith(MORE_IS_BETTER) else 1


class Objective(NamedTuple):
    """A metric to optimise."""

    name: str
    kind: str  # the same without the extractor: "fd" of "fd_digits" and of "fid"

    @classmethod
    def parse(cls, name: str, extractor: str) -> "Objective":
        """The metric of this name by the extractor of that one.

        Raises:
            ValueError: there is none.
        """
        known = {metric_name(kind, extractor): kind for kind in OF_FEATURES} | {kind: kind for kind in PLAIN}
        if name not in known:
            raise ValueError(f"objective={name!r} is none of {', '.join(known)}")
        return cls(name, known[name])

    def stands_in(self, made: Features) -> bool:
        """Whether the kernel distance stands in its place, since n <= 2 D."""
        array = {"fd": made.pool, "sfd": made.spatial}.get(self.kind)
        return array is not None and len(array) <= MIN_INTERVAL_RATIO * array.shape[1]


class Held(NamedTuple):
    """What trials are held against: statistics of the whole reference, and features of some of its images."""

    statistics: dict[ArrayName, Moments | Gaussian]
    rows: Features
    num_classes: int


def criteria(objective: Objective, made: Labelled, held: Held, evaluations: int) -> np.ndarray:
    """Return scores [c, n] of the samples by an objective: less is better, all criteria must agree."""
    kind, features, n = objective.kind, made.features, len(made.labels)
    if kind == EVALUATIONS:
        return np.full((1, n), float(evaluations))
    if kind == "fd":
        return frechet_criteria(features.pool, held.rows.pool, held.statistics["pool"])
    if kind == "kid":
        return kid_scores(held.rows.pool[:KID_ROWS], features.pool)[None]
    if kind == "precision":
        return share_criteria(realism(held.rows.pool, features.pool) >= 1)
    if kind == "recall":
        return recall_criteria(held.rows.pool, features.pool)
    if kind == "sfd" and features.spatial is not None and held.rows.spatial is not None:
        return frechet_criteria(features.spatial, held.rows.spatial, held.statistics["spatial"])
    if kind == "inception_score" and features.logits is not None:
        return inception_criteria(softmax(features.logits))
    if kind == "accuracy" and features.logits is not None:
        return share_criteria(features.logits.argmax(axis=1) == made.labels)
    raise RuntimeError(f"objective={objective.name!r}: the extractor has no such features")


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
