"""Post-hoc EMA: averages of weights whose length is chosen after the training.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C. A power-function average after update t
is a weighted mean of the weights after all updates s <= t, where update s has a weight proportional to s^gamma. The
length of the average is sigma_rel, the standard deviation of this profile divided by t. If averages of two lengths are
stored at several times, averages of other lengths can be reconstructed as linear combinations of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 12**-0.5  # sigma_rel of the plain mean over all updates (gamma = 0)


class Profile(NamedTuple):
    """A power-function average of the weights."""

    updates: float  # number of optimizer updates so far
    sigma_rel: float  # length of the average, in (0, LONGEST]


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a profile: the largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.

    Raises:
        ValueError: sigma_rel is not in (0, LONGEST].
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel={sigma_rel} is not in (0, {LONGEST:.3f}]; the paper uses 0.05 and 0.10")
    inverse_square = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse_square, 12 - inverse_square]).real.max()))


def power_decay(gamma: float, update: int) -> float:
    """Return the EMA decay (1 - 1/t)^(gamma + 1) at update t, counted from 1."""
    return (1 - 1 / update) ** (gamma + 1)


def combination(stored: Sequence[Profile], requested: Profile) -> tuple[NDArray[np.float64], float]:
    """Return coefficients float64 [n] that reconstruct an average from n stored ones, and the relative error.

    The error is the least-squares distance of the two profiles, relative to the requested one. Below 0.1 the
    reconstruction is as good as the average itself.
    """
    gram = np.array([[_inner_product(a, b) for b in stored] for a in stored])
    target = np.array([_inner_product(a, requested) for a in stored])
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-13)[0]
    square = _inner_product(requested, requested)
    squared_error = square - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(squared_error, 0.0) / square))


def _inner_product(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    gamma_a, gamma_b = gamma_of(a.sigma_rel), gamma_of(b.sigma_rel)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / max(a.updates, b.updates)
    if a.updates < b.updates:
        return scale * (a.updates / b.updates) ** gamma_b
    return scale * (b.updates / a.updates) ** gamma_a
