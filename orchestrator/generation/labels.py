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
    """A policy that gives samples labels. Called with indices int64 [n], it returns labels int64 [n]; -1 = no class."""

    num_classes: int  # 0 if the samples are not conditioned on a class
    seed: int
    cycle: tuple[int, ...] | None = None  # labels that are repeated in turn: label i is cycle[i % len(cycle)]
    # If `cycle` is None, labels are drawn: the first c with cumulative[c] > u, u uniform in [0, 1); () = uniform.
    cumulative: tuple[float, ...] = ()
    sha256: str | None = None  # of the file with the policy

    @property
    def given(self) -> bool:
        """Return whether the policy decides the number of samples of each class, without a random draw."""
        return self.cycle is not None

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        if not self.num_classes:
            return np.full(len(indices), -1)
        if self.cycle is not None:
            return np.array(self.cycle)[indices % len(self.cycle)]
        rngs = [index_rng(self.seed, int(index), Purpose.LABEL) for index in indices]
        if self.cumulative:
            return np.searchsorted(self.cumulative, [rng.random() for rng in rngs], side="right")
        return np.array([rng.integers(self.num_classes) for rng in rngs], np.int64)


def read_labels(policy: str, classes: tuple[str, ...], seed: int, path: Callable[[str], str]) -> Labels:
    """Return the policy of a config's field `labels`.

    The policies are "balanced" (all classes in turn), "uniform" (drawn by the seed), a list of classes by name or
    number, such as "3,7" (repeated in turn), and a .json file. A list in the file is repeated in turn. An object in the
    file has weights of classes, with which they are drawn.

    classes: the names of the classes that condition the samples; empty if there are none.
    path: returns the URI of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the network does not have a class, or the weights are not a distribution.
    """
    if policy == "balanced":
        return Labels(len(classes), seed, cycle=tuple(range(len(classes))))
    if policy == "uniform":
        return Labels(len(classes), seed)
    if not classes:
        raise ValueError(
            f"--labels {policy} needs samples that are conditioned on classes, but these are not; pass --labels "
            "balanced"
        )
    if not policy.endswith(".json"):
        return Labels(len(classes), seed, cycle=_class_numbers(policy, policy.split(","), classes))
    uri = path(policy)
    content = storage.read_json(uri)
    sha256 = hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    if isinstance(content, list) and content:
        return Labels(len(classes), seed, cycle=_class_numbers(policy, content, classes), sha256=sha256)
    if isinstance(content, dict) and content:
        weights = np.zeros(len(classes))
        weights[list(_class_numbers(policy, list(content), classes))] = _check_weights(policy, list(content.values()))
        cumulative = np.cumsum(weights / weights.sum())
        cumulative[np.flatnonzero(weights)[-1] :] = 1.0  # rounding must not leave a gap below 1
        return Labels(len(classes), seed, cumulative=tuple(cumulative.tolist()), sha256=sha256)
    raise ValueError(f"--labels {policy} must contain a list of classes, or an object with their weights")


def _class_numbers(policy: str, requested: list[Any], classes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the numbers of classes that are given by name or by number."""
    numbers = {str(number): number for number in range(len(classes))}
    numbers |= {name: number for number, name in enumerate(classes)}  # a name takes precedence over a number
    names = [str(name).strip() for name in requested]
    for name in names:
        if name not in numbers:
            raise ValueError(
                f"--labels {policy}: the network has no class {name!r}; it has {len(classes)} classes, from "
                f"{classes[0]!r} to {classes[-1]!r}"
            )
    return tuple(numbers[name] for name in names)


def _check_weights(policy: str, values: list[Any]) -> list[float]:
    """Return the weights of classes if they are valid; raise ValueError if not."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric or not np.isfinite(values).all() or min(values) < 0 or not sum(values):
        raise ValueError(f"--labels {policy}: the weights must be numbers of at least 0, and not all 0")
    return values
