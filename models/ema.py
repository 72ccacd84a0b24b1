"""Post-hoc EMA: averages of weights whose length is chosen after the training.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C. A power-function average of the weights
after update t gives the weights after update s <= t a share proportional to s^gamma. Its length is sigma_rel, the
standard deviation of that profile relative to t. Averages of other lengths can be reconstructed as linear combinations
of averages of two lengths that were stored at several times.
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
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def power_decay(gamma: float, update: int) -> float:
    """Return the EMA decay (1 - 1/t)^(gamma + 1) at update t, counted from 1."""
    return (1 - 1 / update) ** (gamma + 1)


def combination(kept: Sequence[Profile], requested: Profile) -> tuple[NDArray[np.float64], float]:
    """Return coefficients float64 [n] that reconstruct an average from the kept ones, and the relative error.

    The error is the least-squares distance of the two profiles, relative to the requested one. Below 0.1 the
    reconstruction is as good as the average itself.
    """
    gram = np.array([[_inner(a, b) for b in kept] for a in kept])
    target = np.array([_inner(a, requested) for a in kept])
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-13)[0]
    missed = _inner(requested, requested) - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(missed, 0.0) / _inner(requested, requested)))


def _inner(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    gamma_a, gamma_b = gamma_of(a.sigma_rel), gamma_of(b.sigma_rel)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / max(a.updates, b.updates)
    if a.updates < b.updates:
        return scale * (a.updates / b.updates) ** gamma_b
    return scale * (b.updates / a.updates) ** gamma_a
