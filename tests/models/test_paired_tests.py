"""Decisions between models: right at few samples too, sure as they claim, and by paired differences."""

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from models.manifolds import precision_recall
from models.metrics import Gaussian, expand_frechet, paired_difference
from models.paired_tests import (
    ErrorBudget,
    frechet_criteria,
    front,
    front_ranks,
    inception_criteria,
    paired_means,
    recall_criteria,
    standing,
    student_quantile,
    surely_worse,
)

RUNS = 200


def standard(dimension: int) -> Gaussian:
    return Gaussian(np.zeros(dimension), np.eye(dimension))


def test_student_quantiles_are_scipys() -> None:
    for p in (0.95, 0.975, 0.999, 1 - 1e-5):
        for degrees in (15, 31, 63, 1000):
            assert student_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-3)


def test_collapse_is_no_merit_at_few_samples() -> None:
    """D = 64: a perfect model against one with 0.95 of the spread, true distances 0 and 0.16, on common noise.

    The plain Fréchet distance at n = 250 calls the perfect one significantly worse in about half of all runs.
    """
    dimension, n, runs = 64, 250, 30
    target = standard(dimension)
    reference = np.random.default_rng(1).standard_normal((2_000, dimension))
    naive = ours = 0
    for run in range(runs):
        perfect = np.random.default_rng([2, run]).standard_normal((n, dimension))
        collapsed = 0.95 * perfect
        a, b = expand_frechet(perfect, target), expand_frechet(collapsed, target)
        naive += (paired_difference(a.influence + a.distance, b.influence + b.distance).low or 0) > 0
        mine, its = (frechet_criteria(x, reference, target) for x in (perfect, collapsed))
        assert len(mine) == 2, "below n = 16 D two criteria must agree"
        ours += surely_worse(mine, its, level=0.025)
    assert naive > runs / 4, "the example has lost its point"
    assert ours == 0

    perfect = np.random.default_rng(3).standard_normal((16 * dimension, dimension))
    mine, its = (frechet_criteria(x, reference, target) for x in (perfect, 0.95 * perfect))
    assert len(mine) == 1 and surely_worse(its, mine, level=1e-4) and not surely_worse(mine, its, level=0.5)


def test_where_samples_are_fewer_than_twice_the_dimension_the_kernel_distance_decides_alone() -> None:
    rng = np.random.default_rng(4)
    reference, samples = rng.standard_normal((500, 32)), rng.standard_normal((64, 32))
    far, near = (frechet_criteria(x, reference, standard(32)) for x in (samples + 0.7, samples))
    assert len(near) == 1 and surely_worse(far, near, 1e-3) and not surely_worse(near, far, 0.5)


def two_models(run: int, n: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of N(0, 1.1^2) and of N(0.1, 1.15^2) in each dimension, most of their noise common."""
    rng = np.random.default_rng([5, run])
    common, own = rng.standard_normal((2, n, dimension))
    mixed = np.sqrt(0.9) * common + np.sqrt(0.1) * own
    return 1.1 * common, 0.1 + 1.15 * mixed


def test_paired_intervals_of_the_frechet_distance_hold_the_truth() -> None:
    dimension, n = 8, 256
    truth = dimension * ((0.15**2 + 0.1**2) - 0.1**2)
    held = 0
    for run in range(RUNS):
        scores = [frechet_criteria(x, np.empty((0, dimension)), standard(dimension))[0]
                  for x in two_models(run, n, dimension)]  # fmt: skip
        difference = paired_difference(scores[1], scores[0])
        assert difference.low is not None and difference.high is not None
        held += difference.low <= truth <= difference.high
    assert 0.90 * RUNS <= held <= 0.98 * RUNS, f"{held} of {RUNS}"


def test_paired_intervals_of_the_kernel_distance_hold_the_truth() -> None:
    dimension, n = 8, 96  # few: the second criterion
    reference = np.random.default_rng(6).standard_normal((400, dimension))
    found = []
    for run in range(RUNS):
        scores = [frechet_criteria(x, reference, standard(dimension))[1] for x in two_models(run, n, dimension)]
        found.append(paired_difference(scores[1], scores[0]))
    truth = np.mean([estimate.value for estimate in found])  # it is unbiased, and 200 runs know it far better than one
    held = sum((e.low or 0) <= truth <= (e.high or 0) for e in found)
    assert 0.90 * RUNS <= held <= 0.98 * RUNS, f"{held} of {RUNS}"


def test_pairing_takes_most_of_the_variance_away() -> None:
    a, b = (frechet_criteria(x, np.empty((0, 8)), standard(8)) for x in two_models(0, 1024, 8))
    unpaired = (a[0].var(ddof=1) + b[0].var(ddof=1)) / 1024
    assert paired_means(b, a)[1][0] ** 2 < unpaired / 2


def test_the_best_is_stopped_no_oftener_than_the_budget_says() -> None:
    """All of ten models are equally good, so each is the best; three looks at nested samples."""
    alpha, models, looks = 0.05, 10, (64, 128, 256)
    level = ErrorBudget(alpha, len(looks), models - 1).level
    stopped = 0
    for run in range(400):
        rng = np.random.default_rng([7, run])
        scores = rng.standard_normal((models, 1, looks[-1])) + 2 * rng.standard_normal(looks[-1])
        best, rivals = scores[0], scores[1:]
        stopped += any(surely_worse(best[:, :n], rival[:, :n], level) for n in looks for rival in rivals)
    assert 0 < stopped <= alpha * 400 * 1.3, f"{stopped} of 400"


def test_a_tolerance_stops_what_is_surely_no_better() -> None:
    rng = np.random.default_rng(8)
    a = 1 + 0.1 * rng.standard_normal((1, 400))
    b = a + 0.01 * rng.standard_normal((1, 400))
    assert not surely_worse(a, b, 0.01) and surely_worse(a, b, 0.01, tolerance=0.02)
    assert standing(a, a) == 0.0


def test_scores_of_other_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="same indices by the same criteria"):
        surely_worse(np.zeros((1, 5)), np.zeros((1, 6)), 0.05)
    assert not surely_worse(np.zeros((0, 5)), np.zeros((0, 5)), 0.05), "no criterion, no decision"


def test_inception_scores_are_free_of_bias() -> None:
    """Rows that are sure of one of K classes, all alike often: the score at infinite n is K."""
    classes, rng = 10, np.random.default_rng(9)
    assert inception_criteria(np.full((classes * 16 - 1, classes), 1 / classes)).shape == (0, 159)
    found, plain = [], []
    for _ in range(60):
        labels = rng.integers(classes, size=16 * classes)
        p = np.full((len(labels), classes), 1e-9)
        p[np.arange(len(labels)), labels] = 1 - 9e-9
        found.append(-inception_criteria(p).mean())
        marginal = p.mean(0)
        plain.append(np.exp((p * np.log(p / marginal)).sum(1).mean()))
    assert abs(np.mean(plain) - classes) > 0.2 and abs(np.mean(found) - classes) < 0.05


def test_recall_scores_average_to_recall_and_their_spread_is_enough() -> None:
    rng = np.random.default_rng(10)
    reference = rng.standard_normal((400, 4))
    means, errors = [], []
    for run in range(40):
        samples = 0.8 * np.random.default_rng([11, run]).standard_normal((200, 4))
        scores = -recall_criteria(reference, samples)
        means.append(scores.mean())
        errors.append(scores.std(ddof=1) / np.sqrt(scores.size))
        if run == 0:
            assert scores.mean() == pytest.approx(precision_recall(reference, samples)[1].value, abs=1e-9)
    assert np.std(means) < np.mean(errors) < 3 * np.std(means)


def test_fronts() -> None:
    values = np.array([[1.0, 5.0], [2.0, 2.0], [5.0, 1.0], [3.0, 3.0], [6.0, 6.0], [2.0, 2.0]])
    assert front(values).tolist() == [True, True, True, False, False, True]
    assert front_ranks(values).tolist() == [0, 0, 0, 1, 2, 0]
    ranks = front_ranks(np.random.default_rng(12).standard_normal((50, 2)))
    assert set(ranks) == set(range(ranks.max() + 1)) and all(b - a in (0, 1) for a, b in pairwise(sorted(ranks)))
