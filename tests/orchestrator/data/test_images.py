"""Every image becomes RGB or one clear error."""

import io

import numpy as np
import pytest
from PIL import Image

from orchestrator.data import images


def encode(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, form)
    return file.getvalue()


def test_everything_becomes_rgb() -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    grey, alpha = colour[..., 0], np.dstack([colour, colour[..., 0]])
    np.testing.assert_array_equal(np.asarray(images.decode(encode(grey))), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(np.asarray(images.decode(encode(alpha))), colour)  # alpha is dropped
    for data in (encode(colour, mode="P"), encode(colour, "JPEG", "CMYK"), encode(colour, "WEBP"), encode(grey, "GIF")):
        assert np.asarray(images.decode(data)).shape == (12, 10, 3)


@pytest.mark.parametrize("cut", [0, 10, 60, 200])
def test_truncated_images_are_one_clear_error(cut: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "WEBP"):
        with pytest.raises(ValueError, match=r"Error: "):
            images.decode(encode(pixels, form)[:cut])
