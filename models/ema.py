"""Averages of weights over a training whose length is chosen afterwards: post-hoc EMA.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C. A power-function average of the weights
after update t weighs those of update s <= t in proportion to s^gamma; its length is stated as sigma_rel, the standard
deviation of that profile relative to t. Averages of two lengths, kept at several moments, span those of other lengths
at other moments well enough that these can be put together from them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 12**-0.5  # sigma_rel of the plain mean over all updates (gamma = 0)


class Profile(NamedTuple):
    """Which average of the weights is meant: when, and how long."""

    updates: float  # of the optimizer, when it was taken
    sigma_rel: float  # its length, in (0, LONGEST]


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile: the largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.

    Raises:
        ValueError: there is no such profile.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel={sigma_rel} is not in (0, {LONGEST:.3f}]; the paper uses 0.05 and 0.10")
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def power_decay(gamma: float, update: int) -> float:
    """What the average keeps of itself at the update-th update (from 1): (1 - 1/t)^(gamma + 1)."""
    return (1 - 1 / update) ** (gamma + 1)


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients float64 [n] by which kept averages make the wanted one, and how far off its profile is.

    The second is the distance of the profiles in the least-squares sense, relative to the wanted one: below 0.1 the
    reconstruction is as good as the average itself.
    """
    gram = np.array([[_inner(a, b) for b in kept] for a in kept])
    target = np.array([_inner(a, wanted) for a in kept])
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-13)[0]
    missed = _inner(wanted, wanted) - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(missed, 0.0) / _inner(wanted, wanted)))


def _inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles."""
    gamma_a, gamma_b = gamma_of(a.sigma_rel), gamma_of(b.sigma_rel)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / max(a.updates, b.updates)
    if a.updates < b.updates:
        return scale * (a.updates / b.updates) ** gamma_b
    return scale * (b.updates / a.updates) ** gamma_a
