"""Metrics: closed forms, conventions, sharding, and coverage of the intervals.

The golden data of the public implementations are compared in `tests/test_reference_metrics.py`.
"""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray

from models.metrics import (
    BLOCK,
    GROUP,
    MIN_SCORED,
    Estimate,
    Gaussian,
    block_moments,
    by_class,
    class_frechet_estimate,
    cmmd,
    expand_frechet,
    frechet_distance,
    frechet_distance_of_rows,
    frechet_estimate,
    inception_score,
    inception_score_10split,
    kid,
    kid_scores,
    mean_estimate,
    mean_variance,
    merge,
    merge_in_order,
    moments,
    proportion_estimate,
    softmax,
    student_quantile,
    vendi_score,
)

Array = NDArray[np.float64]
SEED = 20


def generator(*key: int) -> np.random.Generator:
    print("seed", SEED, key)
    return np.random.default_rng([SEED, *key])


def covariance(rng: np.random.Generator, dimension: int) -> Array:
    factor = rng.standard_normal((dimension, dimension))
    return factor @ factor.T / dimension + 0.1 * np.eye(dimension)


# --- Moments ------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy() -> None:
    features = generator(1).standard_normal((1300, 7)).astype(np.float32) * 0.05 + 100
    total = moments(features)
    assert total.n == 1300
    np.testing.assert_allclose(total.mean, features.mean(0, dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(total.gaussian.covariance, np.cov(features, rowvar=False, dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_any_sharding_by_whole_blocks_gives_the_same_bits(num_shards: int) -> None:
    features = generator(2).standard_normal((5 * BLOCK + 100, 9)).astype(np.float32)
    cuts = [BLOCK * (6 * i // num_shards) for i in range(1, num_shards)]
    shards = np.split(features, cuts)
    blocks_of = {i: list(block_moments(shards[i])) for i in reversed(range(num_shards))}
    sharded = merge_in_order(b for i in range(num_shards) for b in blocks_of[i])
    unsharded = moments(features)
    assert sharded.n == unsharded.n
    assert sharded.mean.tobytes() == unsharded.mean.tobytes()
    assert sharded.m2.tobytes() == unsharded.m2.tobytes()


def test_groups_of_blocks_give_the_same_bits() -> None:
    """Statistics of more than 32 blocks are merged by groups of blocks, so that workers may compute one group each."""
    features = generator(21).standard_normal((2 * BLOCK * GROUP + 700, 3)).astype(np.float32)
    size = BLOCK * GROUP
    groups = [merge_in_order(block_moments(features[i : i + size])) for i in range(0, len(features), size)]
    merged, total = merge_in_order(groups), moments(features)
    assert len(groups) == 3 and merged.m2.tobytes() == total.m2.tobytes()
    np.testing.assert_allclose(total.gaussian.covariance, np.cov(features, rowvar=False, dtype=np.float64), rtol=1e-9)


def test_merging_uneven_shards_loses_nothing() -> None:
    features = generator(3).standard_normal((40, 5)) + 1e6
    merged = merge(moments(features[:3]), moments(features[3:]))
    np.testing.assert_allclose(merged.m2, moments(features).m2, atol=1e-8)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 4)), r"\(0, 4\)"),
        (np.zeros(4), r"\(4,\)"),
        (np.full((3, 4), np.nan), "NaN"),
    ],
)
def test_features_that_cannot_be_measured_are_refused(features: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moments(features)


def test_a_single_row_has_no_covariance_and_none_has_no_moments() -> None:
    with pytest.raises(ValueError, match="n=1"):
        frechet_distance(moments(np.ones((1, 3))), moments(np.ones((5, 3))))
    with pytest.raises(ValueError, match="no features"):
        merge_in_order([])


# --- Frechet distance ---------------------------------------------------------------------------------------


def test_equal_covariances_leave_the_squared_distance_of_the_means() -> None:
    rng = generator(4)
    shape = covariance(rng, 6)
    a, b = rng.standard_normal((2, 6))
    assert frechet_distance(Gaussian(a, shape), Gaussian(b, shape)) == pytest.approx(((a - b) ** 2).sum(), rel=1e-12)


def test_diagonal_covariances_leave_the_distance_of_standard_deviations() -> None:
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 1.0])
    distance = frechet_distance(Gaussian(np.zeros(3), np.diag(a)), Gaussian(np.zeros(3), np.diag(b)))
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_the_distance_agrees_with_the_matrix_square_root() -> None:
    rng = generator(5)
    a, b = Gaussian(rng.standard_normal(8), covariance(rng, 8)), Gaussian(rng.standard_normal(8), covariance(rng, 8))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_fewer_rows_than_dimensions_give_a_finite_distance_that_is_zero_to_itself() -> None:
    features = generator(6).standard_normal((12, 40))
    total = moments(features)
    assert 0 <= frechet_distance(total, total) < 1e-5
    assert frechet_distance(total, moments(features + 1)) == pytest.approx(40, abs=1e-5)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (12, 30), (2, 2)])
def test_the_distance_of_rows_is_the_distance_of_their_moments(n: int, m: int) -> None:
    rng = generator(22)
    a, b = rng.standard_normal((n, 20)) + 50, 1.3 * rng.standard_normal((m, 20)) + 50.2
    scale = sum(float(np.trace(moments(x).gaussian.covariance)) for x in (a, b))
    assert frechet_distance_of_rows(a, b) == pytest.approx(frechet_distance(moments(a), moments(b)), abs=1e-6 * scale)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance_of_rows(a[:1], b)


def test_a_class_of_few_images_has_a_distance_without_an_interval() -> None:
    rng = generator(23)
    few = class_frechet_estimate(rng.standard_normal((100, 10)), rng.standard_normal((15, 10)))
    assert few.low is None and "biased upwards" in few.note and few.value > 0
    many = class_frechet_estimate(rng.standard_normal((100, 10)), rng.standard_normal((60, 10)))
    assert many.low is not None


@pytest.mark.parametrize(
    ("mean", "shape", "message"),
    [
        (np.zeros(3), np.eye(2), r"\(3,\).*\(2, 2\)"),
        (np.array([0, np.inf]), np.eye(2), "NaN or infinity"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.1, 1.0]]), "not symmetric"),
        (np.zeros(2), np.diag([1.0, -0.5]), "positive semi-definite"),
    ],
)
def test_invalid_statistics_are_refused(mean: Array, shape: Array, message: str) -> None:
    good = Gaussian(np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match=message):
        frechet_distance(good, Gaussian(mean, shape))
    with pytest.raises(ValueError, match=message):
        frechet_distance(Gaussian(mean, shape), good)


def test_statistics_of_different_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))


# --- The sampling error of the Frechet distance -------------------------------------------------------------


def test_influence_is_the_derivative_of_the_distance() -> None:
    """Compare the influence of a sample with the finite difference of the distance by the sample's weight."""
    rng = generator(7)
    reference = Gaussian(rng.standard_normal(3), covariance(rng, 3))
    features = rng.standard_normal((60, 3)) @ np.diag([1, 2, 0.5])
    own, n = moments(features), len(features)

    def tilted(row: int, eps: float) -> float:
        weight = np.full(n, (1 - eps) / n)
        weight[row] += eps
        mean = weight @ features
        centred = features - mean
        shape = centred.T @ (centred * weight[:, None]) * (n / (n - 1))
        return frechet_distance(Gaussian(mean, shape), reference)

    assert tilted(0, 0) == pytest.approx(frechet_distance(own, reference), rel=1e-12)
    influence = expand_frechet(features, reference).influence
    for row in range(5):
        derivative = (tilted(row, 1e-5) - tilted(row, -1e-5)) / 2e-5
        assert derivative == pytest.approx(influence[row], abs=0.03 * np.abs(influence).max())  # ddof = 1


def test_bias_of_a_perfect_model_is_the_known_one() -> None:
    """S = R = I: to first order in 1/n the distance exceeds 0 by (D + D (D + 1) / 4) / n."""
    dimension, n = 6, 4000
    rng = generator(8)
    reference = Gaussian(np.zeros(dimension), np.eye(dimension))
    bias = np.mean([expand_frechet(rng.standard_normal((n, dimension)), reference).bias for _ in range(20)])
    assert bias == pytest.approx((dimension + dimension * (dimension + 1) / 4) / n, rel=0.02)


def test_fd_infinity_is_the_limit_of_the_distances_of_subsets() -> None:
    """Compare with Chong & Forsyth (2020), who fit a line in 1/n through distances of subsets: FD_inf is its limit."""
    rng = generator(24)
    reference = Gaussian(np.zeros(8), covariance(rng, 8))
    factor = np.linalg.cholesky(reference.covariance)
    features = 0.9 * rng.standard_normal((8000, 8)) @ factor.T + 0.1
    sizes = np.array([500, 800, 1600, 4000])
    subsets_by_size = [np.split(features, 8000 // size) for size in sizes]
    means = [np.mean([frechet_distance(moments(part), reference) for part in subsets]) for subsets in subsets_by_size]
    fitted = np.polyfit(1 / sizes, means, 1)[1]
    expansion = expand_frechet(features, reference)
    assert expansion.corrected.value == pytest.approx(fitted, abs=2e-4)
    assert expansion.distance - expansion.corrected.value == pytest.approx(expansion.bias) and expansion.bias > 1e-3


def test_a_constant_feature_changes_nothing() -> None:
    rng = generator(9)
    varying = rng.standard_normal((200, 3))
    reference = moments(rng.standard_normal((300, 3)) * 1.1)
    padded = Gaussian(np.append(reference.mean, 0), np.pad(reference.gaussian.covariance, (0, 1)))
    plain, with_constant = expand_frechet(varying, reference), expand_frechet(np.pad(varying, ((0, 0), (0, 1))), padded)
    assert with_constant.distance == pytest.approx(plain.distance, abs=1e-7)
    np.testing.assert_allclose(with_constant.influence, plain.influence, atol=1e-6)


def test_small_n_is_noted_and_very_small_n_refused() -> None:
    features, reference = generator(10).standard_normal((20, 10)), Gaussian(np.zeros(10), np.eye(10))
    estimate = frechet_estimate(features, reference)
    assert estimate.value > 0 and estimate.low is None and estimate.high is None and "n=20" in estimate.note
    with pytest.raises(ValueError, match="n=20"):
        expand_frechet(features, reference)
    few = expand_frechet(generator(11).standard_normal((100, 10)), reference)
    assert "16 D" in few.estimate.note and few.estimate.low is not None
    assert few.corrected.low is None and "16 D" in few.corrected.note


def coverage(draw: Callable[[], Estimate], truth: float | None, num_runs: int = 200) -> float:
    """Return the share of runs whose interval contains `truth`, or the mean of all runs if it is None."""
    runs = [draw() for _ in range(num_runs)]
    target = float(np.mean([run.value for run in runs])) if truth is None else truth
    ends = [(run.low, run.high) for run in runs]
    return float(np.mean([low is not None and high is not None and low <= target <= high for low, high in ends]))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.95, 0.05), (0.8, 0.2)])
def test_intervals_of_the_frechet_distance_hold(scale: float, shift: float) -> None:
    rng = generator(13)
    dimension, n = 6, 200
    reference = Gaussian(np.zeros(dimension), covariance(rng, dimension))
    factor = np.linalg.cholesky(reference.covariance)
    truth = dimension * shift**2 + (1 - scale) ** 2 * float(np.trace(reference.covariance))

    def draw() -> Array:
        return rng.standard_normal((n, dimension)) @ factor.T * scale + shift

    plain = coverage(lambda: frechet_estimate(draw(), reference), None)
    corrected = coverage(lambda: expand_frechet(draw(), reference).corrected, truth)
    print("scale", scale, "shift", shift, "coverage: plain", plain, "corrected", corrected)
    assert 0.90 <= plain <= 0.98 and 0.90 <= corrected <= (0.98 if truth else 1.0)  # an interval ends at 0


def test_with_stratified_labels_only_the_spread_within_classes_counts() -> None:
    """Classes are far apart and drawn in turn. Without strata, intervals are too wide and the correction too large."""
    rng = generator(25)
    dimension, num_classes, n = 3, 4, 200
    labels = np.arange(n) % num_classes
    centres = 3 * rng.standard_normal((num_classes, dimension))
    between = (centres - centres.mean(0)).T @ (centres - centres.mean(0)) / num_classes
    truth = Gaussian(centres.mean(0), between + np.eye(dimension))
    reference = Gaussian(truth.mean + 0.5, 1.5 * truth.covariance)
    distance, covered = frechet_distance(truth, reference), np.zeros((2, 2))
    distances, bias = np.zeros(300), np.zeros(2)
    for run in range(300):
        features = centres[labels] + rng.standard_normal((n, dimension))
        for i, strata in enumerate((None, labels)):
            expansion = expand_frechet(features, reference, strata)
            low, high = expansion.corrected.low, expansion.corrected.high
            mean = mean_estimate(features[:, 0], strata=strata)
            assert low is not None and high is not None and mean.low is not None and mean.high is not None
            covered[i] += low <= distance <= high, mean.low <= truth.mean[0] <= mean.high
            distances[run], bias[i] = expansion.distance, bias[i] + expansion.bias / 300
    excess, error, covered = distances.mean() - distance, distances.std() / np.sqrt(300), covered / 300
    print("excess", excess, "+-", error, "bias: independent, stratified", bias, "held", covered.tolist())
    assert abs(bias[1] - excess) < 3 * error < bias[0] - excess
    assert (covered[0] > 0.98).all() and (covered[1] >= 0.90).all() and (covered[1] <= 0.98).all()


def test_stratified_variances_are_the_sum_over_classes() -> None:
    rng = generator(26)
    labels = rng.integers(0, 5, 300)
    scores = rng.standard_normal(300) * (1 + labels) + labels
    expected = sum((labels == k).mean() ** 2 * scores[labels == k].var(ddof=1) / (labels == k).sum() for k in range(5))
    variance, degrees = mean_variance(scores, labels)
    assert float(variance) == pytest.approx(expected, rel=1e-12) and degrees == 295
    with_single = np.append(labels[:-1], 99)  # a class of one sample: as if drawn independently
    assert mean_variance(scores, with_single) == (pytest.approx(scores.var(ddof=1) / 300), 299)
    stratified = proportion_estimate(scores > 0, labels)
    independent = proportion_estimate(scores > 0)
    assert stratified.value == independent.value and stratified.low is not None and independent.low is not None
    assert independent.low < stratified.low < stratified.value
    probabilities = softmax(4 * np.eye(5)[labels] + rng.standard_normal((300, 5)))
    narrow, wide = inception_score(probabilities, strata=labels), inception_score(probabilities)
    assert narrow.value == wide.value and narrow.low is not None and wide.low is not None and narrow.low > wide.low
    assert narrow.bias is not None and wide.bias is not None and wide.bias < narrow.bias < 0


def test_quantiles_are_those_of_student_s_distribution() -> None:
    for degrees, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (1000, 1.962)):
        assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-3)


def test_heavy_tails_small_references_and_distances_below_zero_are_noted() -> None:
    rng = generator(28)
    reference = moments(rng.standard_normal((60, 4)))
    few = expand_frechet(rng.standard_normal((2000, 4)) + 1, reference)
    assert "only 60 rows" in few.estimate.note and few.estimate.n_reference == 60
    assert few.reference_bias == pytest.approx((4 + 4 * 5 / 4) / 60, rel=0.3)
    exact = Gaussian(np.zeros(4), np.eye(4))
    assert "rows" not in expand_frechet(rng.standard_normal((2000, 4)) + 1, exact).estimate.note
    broken = rng.standard_normal((2000, 4))
    broken[:5] += 30
    assert "heavy tails" in expand_frechet(broken, exact).estimate.note
    features = rng.standard_normal((2000, 4))
    self_estimate = expand_frechet(features, moments(features)).corrected
    assert self_estimate.value == self_estimate.low == 0 and "the estimate is -" in self_estimate.note


def test_the_bias_of_a_small_reference_is_the_score_of_a_perfect_model() -> None:
    rng = generator(29)
    results = [
        expand_frechet(rng.standard_normal((3000, 5)), moments(rng.standard_normal((200, 5)))) for _ in range(20)
    ]
    excess = np.mean([result.distance - result.bias for result in results])
    assert np.mean([result.reference_bias for result in results]) == pytest.approx(excess, rel=0.15)


def test_intervals_of_other_metrics_hold() -> None:
    rng = generator(15)
    reference, directions = rng.standard_normal((150, 4)), rng.standard_normal((4, 10))

    def probabilities(n: int) -> NDArray[np.floating]:
        return softmax(rng.standard_normal((n, 4)) @ directions)

    draws: dict[str, tuple[Callable[[], Estimate], float | None]] = {
        "kernel distance": (lambda: kid(reference, 0.8 * rng.standard_normal((200, 4)) + 0.3), None),
        "CMMD": (lambda: cmmd(reference, rng.standard_normal((100, 4)) + 0.5), None),
        "Inception Score": (lambda: inception_score(probabilities(600), 200), None),
        "Inception Score of 10 splits": (lambda: inception_score_10split(probabilities(600)), None),
        "Inception Score at its least n": (lambda: inception_score(probabilities(MIN_SCORED)), None),
        "a rare proportion": (lambda: proportion_estimate(rng.random(100) < 0.03), 0.03),
        "a skewed mean": (lambda: mean_estimate(rng.exponential(size=100)), 1.0),
    }
    coverages = {name: coverage(draw, truth) for name, (draw, truth) in draws.items()}
    print(coverages)
    assert all(0.90 <= share <= 0.98 for share in coverages.values())
    assert inception_score(probabilities(20)).note == "no interval: n=20 is below 100"


def test_proportions_at_the_ends_keep_their_value_inside() -> None:
    for p in (0, 1):
        estimate = proportion_estimate(np.full(50, p, np.bool_))
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low <= estimate.value == p <= estimate.high
        assert estimate.high - estimate.low > 0.05


# --- Inception Score and kernel distance --------------------------------------------------------------------


def test_inception_score_of_even_and_of_collapsed_classes() -> None:
    onehot = np.eye(8)[np.arange(64) % 8]
    assert inception_score(onehot).value == pytest.approx(8, rel=1e-12)
    assert inception_score(np.full((50, 8), 1 / 8)).value == pytest.approx(1, rel=1e-12)
    assert inception_score(onehot[np.zeros(64, int)]).value == pytest.approx(1, rel=1e-12)


def test_a_short_last_split_weighs_as_much_as_the_others() -> None:
    probabilities = softmax(generator(18).standard_normal((250, 5)) * 3)
    parts = [inception_score(probabilities[s]).value for s in (slice(0, 100), slice(100, 200), slice(200, 250))]
    assert inception_score(probabilities, 100).value == pytest.approx(np.mean(parts), rel=1e-12)


def test_sorting_by_class_lowers_the_score_unless_shuffled() -> None:
    probabilities = softmax(np.repeat(np.eye(10) * 5, 50, axis=0))
    in_order, shuffled = (inception_score_10split(probabilities, 10, seed).value for seed in (None, 2020))
    assert in_order < 1.01 < 4 < shuffled


def test_logits_are_not_taken_for_probabilities() -> None:
    with pytest.raises(ValueError, match="softmax"):
        inception_score(generator(19).standard_normal((20, 5)))
    with pytest.raises(ValueError, match="num_splits=10"):
        inception_score_10split(np.ones((5, 1)))


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-12), (1e4, 1e-8)])
def test_kernel_distance_is_the_mean_over_all_pairs_also_far_from_the_origin(offset: float, tolerance: float) -> None:
    rng = generator(20)
    x, y = rng.standard_normal((9, 4)) + offset, rng.standard_normal((7, 4)) + offset

    def kernel(a: Array, b: Array) -> np.longdouble:
        return np.longdouble((a.astype(np.longdouble) @ b.astype(np.longdouble) / 4 + 1) ** 3)

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = float(sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y]))
    estimate = kid(y, x)
    assert estimate.value == pytest.approx(expected, rel=tolerance)
    assert kid_scores(y, x).mean() == pytest.approx(expected, rel=tolerance)
    assert ("far from the origin" in estimate.note) == (offset > 0)


def test_kernel_distance_refuses_a_single_sample() -> None:
    with pytest.raises(ValueError, match="1 samples"):
        kid(np.zeros((5, 2)), np.zeros((1, 2)))


def test_cmmd_is_the_mean_over_all_pairs_and_its_bias_comes_from_pairs_of_equal_rows() -> None:
    rng = generator(32)
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (rng.standard_normal((9, 4)), rng.random((7, 4))))

    def kernel(a: Array, b: Array) -> Array:
        return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 200)

    expected = 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    off_diagonal = [kernel(a, a)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y)]
    unbiased = 1000 * (sum(off_diagonal) - 2 * kernel(x, y).mean())
    estimate = cmmd(3 * y, 2 * x)  # only directions count
    assert estimate.value == pytest.approx(expected, rel=1e-9)
    assert estimate.bias == pytest.approx(expected - unbiased, rel=1e-9)
    assert estimate.n_reference == 7


def test_vendi_counts_distinct_samples() -> None:
    assert vendi_score(np.repeat(np.eye(5), 4, axis=0)) == pytest.approx(5, rel=1e-9)
    assert vendi_score(np.ones((20, 5))) == pytest.approx(1, rel=1e-9)
    assert vendi_score(np.repeat(np.eye(50)[:3], 2, axis=0)) == pytest.approx(3, rel=1e-9)  # more dimensions than rows


def test_by_class_pairs_the_classes_that_both_sets_hold() -> None:
    reference, samples = np.array([[0.0], [1.0], [1.0]]), np.array([[5.0], [7.0], [9.0]])
    result = by_class(
        lambda r, s: float(s.mean() - r.mean()), reference, np.array([3, 4, 4]), samples, np.array([4, 4, 8])
    )
    assert result == {4: 5.0}
    with pytest.raises(ValueError, match="labels"):
        by_class(lambda r, s: 0, reference, np.array([1]), samples, np.array([4, 4, 8]))


def test_a_last_split_of_a_single_sample_leaves_the_inception_score_its_interval() -> None:
    p = softmax(np.random.default_rng(3).standard_normal((101, 5)))
    odd, even = inception_score(p, split_size=50), inception_score(p[:100], split_size=50)
    assert odd.low is not None and odd.high is not None and odd.bias is not None and odd.low < odd.value < odd.high
    assert even.bias is not None and odd.bias == pytest.approx(even.bias * 2 / 3)
