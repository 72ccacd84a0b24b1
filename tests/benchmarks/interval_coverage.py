"""Measure the coverage of 95% intervals, in the conditions for which it is promised and in others. Run by hand:

    python -m tests.benchmarks.interval_coverage [--replications 1000] [--seed 0] [--only NAME]

Prints a row for each simulated world and metric: the share of intervals that contain the true value, and the share of
estimates that have a note. The true value of a bias-corrected distance is known; that of a metric at its n is the mean
over all replications. `docs/promises.md` has the table, and the fast tests run the worlds in its first part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tyro
from numpy.typing import NDArray

from models.manifolds import manifolds
from models.metrics import (
    Estimate,
    Gaussian,
    expand_frechet,
    frechet_distance,
    inception_score,
    kid,
    mean_estimate,
    moments,
    proportion_estimate,
    softmax,
)

Array = NDArray[np.float64]
Draw = Callable[[], dict[str, tuple[Estimate, float | None]]]  # estimate and true value (None = unknown) by metric
DIMENSION = 6


@dataclass(frozen=True)
class Row:
    """The coverage of a metric in a world."""

    world: str
    metric: str
    held: float  # share of the intervals that contain the true value
    noted: float  # share of the estimates with a note


def frechet_world(
    rng: np.random.Generator, n: int, m: int | None = None, shift: float = 0.3, tail: float = 0.0
) -> Draw:
    """Return a world with a Gaussian model and a Gaussian reference; if tail > 0, features are log-normal.

    m: rows of the reference, which is a sample of a population; None = the population. The true value is the distance
        to the population.
    """
    reference = Gaussian(np.zeros(DIMENSION), np.eye(DIMENSION))
    if tail:
        variance = np.exp(tail**2) * (np.exp(tail**2) - 1)
        reference = Gaussian(np.full(DIMENSION, np.exp(tail**2 / 2)), variance * np.eye(DIMENSION))
    truth = frechet_distance(Gaussian(reference.mean + shift, reference.covariance), reference)

    def rows(count: int) -> Array:
        z = rng.standard_normal((count, DIMENSION))
        return np.exp(tail * z) if tail else z

    def draw() -> dict[str, tuple[Estimate, float | None]]:
        expansion = expand_frechet(rows(n) + shift, reference if m is None else moments(rows(m)))
        return {"fd_infinity": (expansion.corrected, truth), "fd": (expansion.estimate, None)}

    return draw


def broken_world(rng: np.random.Generator, n: int) -> Draw:
    """Return a world in which 1% of the samples are outliers."""
    reference = Gaussian(np.zeros(DIMENSION), np.eye(DIMENSION))
    far = np.zeros(DIMENSION)
    far[0] = 20
    mean = 0.01 * far
    truth = frechet_distance(Gaussian(mean, np.eye(DIMENSION) + 0.0099 * np.outer(far, far)), reference)

    def draw() -> dict[str, tuple[Estimate, float | None]]:
        broken = rng.random(n) < 0.01
        expansion = expand_frechet(rng.standard_normal((n, DIMENSION)) + np.outer(broken, far), reference)
        return {"fd_infinity": (expansion.corrected, truth), "fd": (expansion.estimate, None)}

    return draw


def balanced_world(rng: np.random.Generator, n: int, num_classes: int = 5, balanced: bool = True) -> Draw:
    """Return a world with separate classes, with balanced or random labels, and all metrics of features."""
    centres = rng.standard_normal((num_classes, DIMENSION))
    spread = (centres - centres.mean(0)).T @ (centres - centres.mean(0)) / num_classes + np.eye(DIMENSION)
    real = centres[np.arange(300) % num_classes] + rng.standard_normal((300, DIMENSION))
    reference, model = Gaussian(centres.mean(0), spread), Gaussian(centres.mean(0) + 0.5, spread)
    truth = frechet_distance(model, reference)

    def draw() -> dict[str, tuple[Estimate, float | None]]:
        labels = np.arange(n) % num_classes if balanced else rng.integers(0, num_classes, n)
        strata = labels if balanced else None
        features = centres[labels] + 0.5 + rng.standard_normal((n, DIMENSION))
        expansion, manifold = expand_frechet(features, reference, strata), manifolds(real, features, strata=strata)
        hits = rng.random(n) < np.linspace(0.6, 1, num_classes)[labels]
        return {
            "fd_infinity": (expansion.corrected, truth),
            "fd": (expansion.estimate, None),
            "kid": (kid(real, features, strata), None),
            "accuracy": (proportion_estimate(hits, strata), 0.8),
            "precision": (manifold.precision, None),
            "recall": (manifold.recall, None),
            "density": (manifold.density, None),
            "coverage": (manifold.coverage, None),
            "clipped_density": (manifold.clipped_density, None),
            "clipped_coverage": (manifold.clipped_coverage, None),
        }

    return draw


def score_world(rng: np.random.Generator, n: int, num_classes: int) -> Draw:
    """Return a world with class probabilities that are neither certain nor uniform."""
    directions = 2 * rng.standard_normal((4, num_classes))
    return lambda: {"inception_score": (inception_score(softmax(rng.standard_normal((n, 4)) @ directions)), None)}


def mean_world(rng: np.random.Generator, n: int) -> Draw:
    """Return a world with n normal scores."""
    return lambda: {"mean": (mean_estimate(rng.standard_normal(n)), 0.0)}


def worlds(rng: np.random.Generator) -> dict[str, Draw]:
    """Return all worlds by name: first those for which coverage is promised, then those with a note."""
    many = 16 * DIMENSION
    return {
        "n = 16 D": frechet_world(rng, many),
        "n = 100 D": frechet_world(rng, 100 * DIMENSION),
        "labels in turn": balanced_world(rng, 2 * many),
        "labels at random": balanced_world(rng, 2 * many, balanced=False),
        "four scores": mean_world(rng, 4),
        "n = 16 K": score_world(rng, 16 * 20, 20),
        "perfect model": frechet_world(rng, many, shift=0.0),
        "n = 4 D": frechet_world(rng, 4 * DIMENSION),
        "reference of 8 D rows": frechet_world(rng, 100 * DIMENSION, m=8 * DIMENSION),
        "log-normal, kurtosis 110": frechet_world(rng, 50 * DIMENSION, tail=1.0, shift=1.0),
        "1% broken samples": broken_world(rng, 50 * DIMENSION),
        "n = 2 K": score_world(rng, 2 * 200, 200),
    }


IN_CONDITION = ("n = 16 D", "n = 100 D", "labels in turn", "labels at random", "four scores", "n = 16 K")


def measure(world: str, draw: Draw, replications: int) -> list[Row]:
    """Return a row for each metric of a world."""
    runs = [draw() for _ in range(replications)]
    rows = []
    for metric in runs[0]:
        estimates = [run[metric][0] for run in runs]
        known_truth = runs[0][metric][1]
        truth = float(np.mean([estimate.value for estimate in estimates])) if known_truth is None else known_truth
        ends = [(estimate.low, estimate.high) for estimate in estimates]
        hits = [low <= truth <= high for low, high in ends if low is not None and high is not None]
        covered = float(np.mean(hits)) if hits else float("nan")
        rows.append(Row(world, metric, covered, float(np.mean([bool(estimate.note) for estimate in estimates]))))
    return rows


@dataclass(frozen=True)
class Options:
    """The simulation."""

    replications: int = 1_000
    seed: int = 0
    only: str | None = None  # the name of one world


def main(options: Options) -> None:
    """Print the table."""
    print(options)
    print("| world | metric | intervals with the true value | estimates with a note |\n|---|---|---|---|")
    for number, world in enumerate(worlds(np.random.default_rng(options.seed))):
        if options.only in (None, world):
            draw = worlds(np.random.default_rng([options.seed, number]))[world]
            for row in measure(world, draw, options.replications):
                coverage = "no interval" if np.isnan(row.held) else f"{100 * row.held:.1f}%"
                print(f"| {row.world} | `{row.metric}` | {coverage} | {100 * row.noted:.0f}% |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
