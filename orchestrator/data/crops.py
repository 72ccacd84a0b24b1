"""The crops of ADM's training images: guided-diffusion's center_crop_arr and random_crop_arr, equal to the bit."""

import math

import numpy as np
from PIL import Image


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an RGB image whose shorter side is resized to `size`: uint8 [size, size, 3]."""
    resized = _resize(image, size)
    return _square(resized, (resized.width - size) // 2, (resized.height - size) // 2, size)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of a randomly resized RGB image: uint8 [size, size, 3].

    The length of the resized shorter side is uniform in [size, ceil(size / 0.8)], and the position of the square is
    uniform. ADM's classifiers were trained on these crops.
    """
    resized = _resize(image, int(rng.integers(size, math.ceil(size / 0.8), endpoint=True)))
    top = int(rng.integers(0, resized.height - size, endpoint=True))
    left = int(rng.integers(0, resized.width - size, endpoint=True))
    return _square(resized, left, top, size)


def _square(image: Image.Image, left: int, top: int, size: int) -> np.ndarray:
    return np.array(image.crop((left, top, left + size, top + size)))


def _resize(image: Image.Image, shorter: int) -> Image.Image:
    """Resize the image so that its shorter side has `shorter` pixels.

    Halve it with a BOX filter while its shorter side is at least twice `shorter`, then resize it with BICUBIC.
    """
    while min(image.size) >= 2 * shorter:
        image = _rows_first(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = shorter / min(image.size)
    return _rows_first(image, round(image.width * scale), round(image.height * scale), Image.Resampling.BICUBIC)


def _rows_first(image: Image.Image, width: int, height: int, filter: Image.Resampling) -> Image.Image:
    """Resize the image along its rows, then along its columns, in two calls of Pillow.

    Pillow rounds to 8 bits in between, so that the order matters. Before version 13, a single call always used this
    order. Since then, it resizes images that are more than twice as tall as wide along their columns first.
    """
    return image.resize((width, image.height), filter).resize((width, height), filter)
