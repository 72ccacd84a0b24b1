"""Crops are bit-equal to those of the published code."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.crops import center_crop, random_crop

# The first half of the SHA-256 of guided-diffusion's center_crop_arr and random_crop_arr (image_datasets.py, with
# `rng.integers` for its draws) on random images, by Pillow 12.3, which resizes along the rows first for every shape.
GOLDEN = [
    ((375, 500), 64, "a2187952b6eef41c", "1dfe3228ea4c2863"),
    ((500, 333), 32, "7d585d52a4269a36", "85fa1c148085c033"),
    ((64, 64), 64, "ad104576726e1dde", "d688a7792439e5ce"),
    ((40, 97), 64, "f7827d6d5e25fb1c", "50c652bca294b5b8"),
    ((97, 31), 32, "ff862b21f6e110bb", "7822b81c487f0f65"),
    ((700, 90), 64, "026a6fea3e34f211", "f3314af4b7eefd5c"),
    ((1023, 129), 32, "333dbdb2126995b0", "4e57188c2e2e3b13"),
    ((90, 700), 64, "fcfd7a7d5a33d4cd", "ad2b71c2160ae42b"),
    ((255, 256), 64, "95e7a1ea56c01e02", "1622b8bbb383b57e"),
    ((1333, 2000), 64, "5d6513d35fb955b0", "e1bacd9173838602"),
]


@pytest.mark.parametrize(("shape", "size", "center", "random"), GOLDEN)
def test_crops_are_the_published_ones_to_the_bit(shape: tuple[int, int], size: int, center: str, random: str) -> None:
    image = Image.fromarray(np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8))
    crops = center_crop(image, size), random_crop(image, size, np.random.default_rng(7))
    assert [hashlib.sha256(crop.tobytes()).hexdigest()[:16] for crop in crops] == [center, random]


def test_random_crop_reaches_every_scale_and_place() -> None:
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    image = Image.fromarray(
        np.dstack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200), np.uint8)])
    )
    crops = np.stack([random_crop(image, 40, np.random.default_rng(i)) for i in range(300)]).astype(int)
    assert crops.shape == (300, 40, 40, 3)
    left, span = crops[:, 20, 0, 0], crops[:, 20, -1, 0] - crops[:, 20, 0, 0]
    assert left.min() <= 6 and (left + span).max() >= 249, "up to both edges"
    assert span.min() < 255 * 0.80 and span.max() > 255 * 0.96, "from 40 of 50 pixels to all of 40"
