"""One image: encoded bytes -> RGB pixels -> ADM's crops, exact to the bit."""

import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

# Odd EXIF blocks and palettes: the image decodes all the same, and a user can do nothing about it.
warnings.filterwarnings("ignore", module=r"PIL\.")

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # of files that are taken for images


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB image, by the published code's rule: Pillow's conversion.

    Grey is repeated, palettes are looked up, CMYK is converted without a profile, alpha is dropped, the EXIF
    orientation is not applied.

    Raises:
        ValueError: they cannot be decoded to the end.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more pixels than Pillow takes: {error}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's training crop, uint8 [size, size, 3]: the shorter side to `size`, then the middle."""
    pixels = np.asarray(_shrink(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """The crop of ADM's classifier, uint8 [size, size, 3]: the shorter side uniform in [size, ceil(size / 0.8)],
    then anywhere."""
    pixels = np.asarray(_shrink(image, int(rng.integers(size, math.ceil(size / 0.8), endpoint=True))))
    top = rng.integers(0, pixels.shape[0] - size, endpoint=True)
    left = rng.integers(0, pixels.shape[1] - size, endpoint=True)
    return pixels[top : top + size, left : left + size]


def _shrink(image: Image.Image, shorter: int) -> Image.Image:
    """Halve by BOX while the shorter side is at least twice `shorter`, then BICUBIC until it is `shorter`."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.BICUBIC)
