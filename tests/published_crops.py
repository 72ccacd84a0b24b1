"""ADM's crops as the published code makes them, step by step: what ours must equal to the bit."""

import math

import numpy as np
from PIL import Image


def published_shrink(image: Image.Image, shorter: int, whole: bool) -> np.ndarray:
    """Halving by BOX, then BICUBIC. Pillow resizes along the rows first: in one call (`whole`), or said in two."""

    def resize(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
        return (
            image.resize(size, filter) if whole else image.resize((size[0], image.height), filter).resize(size, filter)
        )

    while min(image.size) >= 2 * shorter:
        image = resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    return np.asarray(
        resize(image, (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    )


def published_center_crop(image: Image.Image, size: int, whole: bool) -> np.ndarray:
    pixels = published_shrink(image, size, whole)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def published_random_crop(image: Image.Image, size: int, seed: int, whole: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pixels = published_shrink(image, int(rng.integers(size, math.ceil(size / 0.8), endpoint=True)), whole)
    top = rng.integers(0, pixels.shape[0] - size, endpoint=True)
    left = rng.integers(0, pixels.shape[1] - size, endpoint=True)
    return pixels[top : top + size, left : left + size]
