"""Scores for comparisons of trials are corrected for bias, also for few samples, and favour no model."""

import numpy as np
import pytest

from models.manifolds import precision_recall
from models.metrics import Gaussian, expand_frechet, frechet_distance, mean_variance, moments
from models.paired_tests import differences, interval, surely_positive
from models.scores import (
    expand_leading_frechet,
    frechet_scores,
    inception_scores,
    recall_scores,
)

RUNS = 200


def standard(dimension: int) -> Gaussian:
    return Gaussian(np.zeros(dimension), np.eye(dimension))


def test_leading_directions_are_those_of_the_reference() -> None:
    """Rotated features give the same scores, and changes outside of the leading directions do not change them."""
    rng = np.random.default_rng(1)
    variances, samples = np.geomspace(4, 0.01, 20), rng.standard_normal((40, 20))
    rotation = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    target = Gaussian(np.zeros(20), np.diag(variances))
    expansion = expand_leading_frechet(samples, target)
    assert expansion.dimension == 10
    rotated = Gaussian(np.zeros(20), rotation @ np.diag(variances) @ rotation.T)
    assert frechet_scores(samples @ rotation.T, rotated) == pytest.approx(expansion.scores)
    assert frechet_scores(samples + np.eye(20)[15], target) == pytest.approx(expansion.scores)
    by_hand = frechet_distance(moments(samples[:, :10]), Gaussian(np.zeros(10), np.diag(variances[:10])))
    assert expansion.distance == pytest.approx(by_hand)


def test_scores_over_all_directions_are_those_of_the_plain_distance() -> None:
    samples = np.random.default_rng(2).standard_normal((130, 32))
    assert frechet_scores(samples, standard(32)).tolist() == expand_frechet(samples, standard(32)).scores.tolist()


def test_a_singular_reference_and_many_dimensions_are_allowed() -> None:
    """D = 512, n = 200, a reference of rank 300 with a mean of 1e3 in float32."""
    rng = np.random.default_rng(3)
    real = (rng.standard_normal((301, 512)) + 1e3).astype(np.float32)
    samples = (rng.standard_normal((200, 512)) + 1e3).astype(np.float32)
    near, far = (frechet_scores(x, moments(real)).mean() for x in (samples, samples + np.float32(0.5)))
    assert np.isfinite(near) and near < far


def test_collapse_scores_badly_at_few_samples() -> None:
    """D = 64, n = 250: a perfect model against one with 0.95 of the spread, true distances 0 and 0.16, common noise.

    The plain Fréchet distance calls the perfect one significantly worse in about half of all runs.
    """
    dimension, n, runs = 64, 250, 30
    num_plain = num_corrected = 0
    for run in range(runs):
        perfect = np.random.default_rng([2, run]).standard_normal((n, dimension))
        a, b = (expand_frechet(x, standard(dimension)) for x in (perfect, 0.95 * perfect))
        plain = differences(
            a.influence + a.distance,
            b.influence + b.distance,
        )
        num_plain += (interval(plain, n).low or 0) > 0
        perfect_scores, narrow_scores = (frechet_scores(x, standard(dimension)) for x in (perfect, 0.95 * perfect))
        num_corrected += surely_positive(differences(perfect_scores, narrow_scores), None, 0.1, n, np.inf)
    assert num_plain > runs / 4, "the plain distance does not misjudge this example any more"
    assert num_corrected == 0


def classes(run: int, n: int, separation: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of ten classes in 16 dimensions, float64 [n, 16], and their labels, which are 0 to 9 in turn."""
    labels = np.arange(n) % 10
    means = np.random.default_rng(4).standard_normal((10, 16)) * np.sqrt(0.6)
    noise = np.random.default_rng([5, run]).standard_normal((n, 16)) * np.sqrt(0.4)
    return separation * (means - means.mean(axis=0))[labels] + spread * noise, labels


def test_given_classes_are_no_part_of_the_bias() -> None:
    """Over-guided models have more of their variance between classes, so that too much correction would favour them."""
    n, runs = 128, 60
    reference = moments(classes(0, 30_000, 1.0, 1.0)[0]).gaussian
    truth = frechet_distance(moments(classes(1, 30_000, 1.1, 0.9)[0]), reference)
    stratified, plain = [], []
    for run in range(2, 2 + runs):
        sets = [classes(run, n, *model) for model in ((1.0, 1.0), (1.1, 0.9))]
        stratified.append([frechet_scores(x, reference, labels).mean() for x, labels in sets])
        plain.append([frechet_scores(x, reference).mean() for x, _ in sets])
    assert np.diff(np.mean(stratified, axis=0)) == pytest.approx(truth, rel=0.2)
    assert np.diff(np.mean(plain, axis=0)) < 0.6 * truth, "scores without strata do not misjudge this example any more"


def test_labels_in_one_class_change_nothing_but_the_last_digits() -> None:
    samples = np.random.default_rng(6).standard_normal((200, 8))
    single_class = expand_frechet(samples, standard(8), np.zeros(200, np.int64))
    assert single_class.bias == pytest.approx(expand_frechet(samples, standard(8)).bias, rel=0.02)


def two_models(run: int, n: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return samples of N(0, 1.1^2) and of N(0.1, 1.15^2) in each dimension, which share most of their noise."""
    rng = np.random.default_rng([5, run])
    common, own = rng.standard_normal((2, n, dimension))
    mixed = np.sqrt(0.9) * common + np.sqrt(0.1) * own
    return 1.1 * common, 0.1 + 1.15 * mixed


def test_paired_intervals_of_the_frechet_distance_hold_the_truth() -> None:
    dimension, n = 8, 256
    truth = dimension * ((0.15**2 + 0.1**2) - 0.1**2)
    covered = 0
    for run in range(RUNS):
        a, b = (frechet_scores(x, standard(dimension)) for x in two_models(run, n, dimension))
        estimate = interval(differences(b, a), n)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    assert 0.90 * RUNS <= covered <= 0.98 * RUNS, f"{covered} of {RUNS}"


def test_pairing_takes_most_of_the_variance_away() -> None:
    a, b = (frechet_scores(x, standard(8)) for x in two_models(0, 1024, 8))
    assert mean_variance(differences(b, a))[0] < (a.var(ddof=1) + b.var(ddof=1)) / 1024 / 2


def test_inception_scores_are_free_of_bias() -> None:
    """Each row is sure of one of K equally frequent classes, so the score at infinite n is K."""
    number, rng = 10, np.random.default_rng(9)
    assert inception_scores(np.full((number * 16 - 1, number), 1 / number)).shape == (0,)
    corrected, plain = [], []
    for _ in range(60):
        labels = rng.integers(number, size=16 * number)
        p = np.full((len(labels), number), 1e-9)
        p[np.arange(len(labels)), labels] = 1 - 9e-9
        corrected.append(-inception_scores(p).mean())
        marginal = p.mean(0)
        plain.append(np.exp((p * np.log(p / marginal)).sum(1).mean()))
    assert abs(np.mean(plain) - number) > 0.2 and abs(np.mean(corrected) - number) < 0.05


def test_recall_scores_average_to_recall_and_their_spread_is_enough() -> None:
    rng = np.random.default_rng(10)
    reference = rng.standard_normal((400, 4))
    means, errors = [], []
    for run in range(40):
        samples = 0.8 * np.random.default_rng([11, run]).standard_normal((200, 4))
        scores = -recall_scores(reference, samples)
        means.append(scores.mean())
        errors.append(scores.std(ddof=1) / np.sqrt(scores.size))
        if run == 0:
            assert scores.mean() == pytest.approx(precision_recall(reference, samples)[1].value, abs=1e-9)
    assert np.std(means) < np.mean(errors) < 3 * np.std(means)
