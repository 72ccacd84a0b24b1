"""Every image becomes RGB or one clear error; crops are the published ones."""

import io

import numpy as np
import pytest
from PIL import Image

from orchestrator import images


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


def test_center_crop_is_the_published_rule() -> None:
    rng = np.random.default_rng(0)
    for width, height, size in [(8, 8, 16), (100, 64, 32), (65, 131, 32), (500, 375, 64), (33, 33, 33)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = images.center_crop(image, size)
        halvings = max(int(np.log2(min(width, height) / size)), 0)
        for _ in range(halvings):
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        side = min(image.size)
        image = image.resize(
            (round(image.width * size / side), round(image.height * size / side)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        np.testing.assert_array_equal(found, np.asarray(image.crop((left, top, left + size, top + size))))


def test_random_crop_reaches_every_scale_and_place() -> None:
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    image = Image.fromarray(
        np.dstack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200), np.uint8)])
    )
    crops = np.stack([images.random_crop(image, 40, np.random.default_rng(i)) for i in range(300)]).astype(int)
    assert crops.shape == (300, 40, 40, 3)
    left, span = crops[:, 20, 0, 0], crops[:, 20, -1, 0] - crops[:, 20, 0, 0]
    assert left.min() <= 6 and (left + span).max() >= 249, "up to both edges"
    assert span.min() < 255 * 0.80 and span.max() > 255 * 0.96, "from 40 of 50 pixels to all of 40"
    np.testing.assert_array_equal(crops[7], images.random_crop(image, 40, np.random.default_rng(7)))
