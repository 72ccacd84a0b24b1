"""The labels of samples: a pure function of the policy, the seed and the index."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.order import Purpose, index_rng


@dataclass(frozen=True)
class Labels:
    """A policy. Called with indices int64 [n] it returns labels int64 [n]; -1 = no class."""

    num_classes: int  # 0 if the samples are not conditioned on a class
    seed: int
    in_turn: tuple[int, ...] | None = None  # label of index i = in_turn[i modulo its length]; None = drawn by seed
    cumulative: tuple[float, ...] = ()  # label = the first with cumulative > u, u uniform in [0, 1); () = uniform
    sha256: str | None = None  # of the file with the policy

    @property
    def given(self) -> bool:
        """Return whether the policy decides the number of samples of each class, without a random draw."""
        return self.in_turn is not None

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        if not self.num_classes:
            return np.full(len(indices), -1)
        if self.in_turn is not None:
            return np.array(self.in_turn)[indices % len(self.in_turn)]
        draws = [index_rng(self.seed, int(index), Purpose.LABEL) for index in indices]
        if self.cumulative:
            return np.searchsorted(self.cumulative, [draw.random() for draw in draws], side="right")
        return np.array([draw.integers(self.num_classes) for draw in draws], np.int64)


def read_labels(policy: str, classes: tuple[str, ...], seed: int, path: Callable[[str], str]) -> Labels:
    """Return the policy that a config names.

    "balanced"; "uniform", drawn by the seed; classes that are repeated in turn, by name or number, such as "3,7"; or a
    .json file. A list in the file is repeated in turn; an object has a weight for each class, by which classes are
    drawn. `path` resolves the name of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the network does not have a class, or the weights are not a distribution.
    """
    if policy in ("balanced", "uniform"):
        return Labels(len(classes), seed, in_turn=tuple(range(len(classes))) if policy == "balanced" else None)
    if not classes:
        raise ValueError(
            f"labels={policy} needs samples that are conditioned on classes, and these are not; pass --labels balanced"
        )
    if not policy.endswith(".json"):
        return Labels(len(classes), seed, in_turn=_numbers(policy, policy.split(","), classes))
    content, sha256 = storage.read_json(uri := path(policy)), hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    if isinstance(content, list) and content:
        return Labels(len(classes), seed, in_turn=_numbers(policy, content, classes), sha256=sha256)
    if isinstance(content, dict) and content:
        weights = np.zeros(len(classes))
        weights[list(_numbers(policy, list(content), classes))] = _weights(policy, list(content.values()))
        cumulative = np.cumsum(weights / weights.sum())
        cumulative[np.flatnonzero(weights)[-1] :] = 1.0  # rounding must not leave a gap below 1
        return Labels(len(classes), seed, cumulative=tuple(cumulative.tolist()), sha256=sha256)
    raise ValueError(f"labels={policy} must contain a list of classes, or an object with their weights")


def _numbers(policy: str, requested: list[Any], classes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the labels of classes that are given by name or by number."""
    known = {str(number): number for number in range(len(classes))}
    known |= {name: number for number, name in enumerate(classes)}  # names come before numbers
    names = [str(name).strip() for name in requested]
    for name in names:
        if name not in known:
            raise ValueError(
                f"labels={policy}: the network has no class {name!r}; it has {len(classes)} classes, from "
                f"{classes[0]!r} to {classes[-1]!r}"
            )
    return tuple(known[name] for name in names)


def _weights(policy: str, values: list[Any]) -> list[float]:
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric or not np.isfinite(values).all() or min(values) < 0 or not sum(values):
        raise ValueError(f"labels={policy}: the weights must be numbers of at least 0, and not all 0")
    return values
