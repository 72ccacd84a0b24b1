"""A toy extractor, which tests import by its dotted name.

Its features are the mean colours of the four quarters of an image.
"""

import numpy as np
from numpy.typing import NDArray

from models.features import Features


class ToyExtractor:
    name = "toy"
    dimension = 12
    num_classes = 3
    fingerprint = "quarters"

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        n, height, width, _ = images.shape
        quarters = images.reshape(n, 2, height // 2, 2, width // 2, 3).mean((2, 4), dtype=np.float64)
        pool = (quarters / 32).reshape(n, 12).astype(np.float32)
        return Features(pool, pool[:, :4].copy(), pool[:, :3].copy())


class FalseInception(ToyExtractor):
    """An extractor with a reserved name."""

    name = "inception"
