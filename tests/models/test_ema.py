"""Power-function averages: closed forms, and reconstructed averages agree with directly tracked ones."""

import numpy as np
import pytest

from models.ema import LONGEST, Profile, combination, gamma_of, power_decay


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (LONGEST, 0.0)])
def test_lengths_and_exponents_are_the_papers(sigma_rel: float, gamma: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.2, LONGEST])
def test_the_recursion_weighs_updates_by_a_power_whose_spread_is_sigma_rel(sigma_rel: float) -> None:
    count, gamma = 4000, gamma_of(sigma_rel)
    weights = np.zeros(count)
    for update in range(1, count + 1):
        decay = power_decay(gamma, update)
        weights *= decay
        weights[update - 1] += 1 - decay
    times = (np.arange(count) + 0.5) / count
    edges = np.arange(count + 1) / count
    assert weights == pytest.approx(np.diff(edges ** (gamma + 1)), rel=1e-9, abs=1e-300)
    mean = weights @ times
    assert np.sqrt(weights @ (times - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_impossible_lengths_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"is not in \(0, 0\.289\]"):
        gamma_of(sigma_rel)


def tracked(path: np.ndarray, sigma_rel: float) -> np.ndarray:
    """Return the average after every update of a path of weights [updates, D]."""
    average, gamma, averages = np.zeros(path.shape[1]), gamma_of(sigma_rel), []
    for update, weights in enumerate(path, 1):
        average = weights + power_decay(gamma, update) * (average - weights)
        averages.append(average)
    return np.stack(averages)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.075, 0.1, 0.15])
@pytest.mark.parametrize("at", [1600, 1100])
def test_a_third_average_is_reconstructed_from_two(sigma_rel: float, at: int) -> None:
    rng = np.random.default_rng(1)
    path = np.cumsum(rng.standard_normal((1600, 50)), axis=0) + 3  # weights that wander, far from zero
    sources = {length: tracked(path, length) for length in (0.05, 0.10)}
    profiles = [Profile(updates, length) for updates in range(100, at + 1, 100) for length in sources]
    averages = np.stack([sources[profile.sigma_rel][int(profile.updates) - 1] for profile in profiles])
    coefficients, estimated_error = combination(profiles, Profile(at, sigma_rel))
    expected = tracked(path, sigma_rel)[at - 1]
    error = np.linalg.norm(coefficients @ averages - expected)
    if sigma_rel in sources:
        assert error < 1e-6 * np.linalg.norm(expected) and estimated_error < 1e-5
    else:
        assert error < 0.1 * np.linalg.norm(path[at - 1] - expected)
        assert estimated_error < 0.1
    assert coefficients.sum() == pytest.approx(1, abs=2e-3)


def test_the_error_of_an_average_that_replaces_a_much_longer_one_is_large() -> None:
    _, estimated_error = combination([Profile(1000, 0.05)], Profile(1000, 0.2))
    assert estimated_error > 0.3
