"""Every image becomes RGB or one clear error; crops are the published ones."""

import io

import numpy as np
import pytest
from PIL import Image

from orchestrator.data import images
from tests.published_crops import published_center_crop, published_random_crop


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


@pytest.mark.parametrize("cases", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_crops_are_the_published_ones_to_the_bit(cases: int) -> None:
    """Any shape, odd and even, shrunk, enlarged or kept. Since Pillow 13 one call is something else for tall images."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"{seed=}")
    rng = np.random.default_rng(seed)
    for case in range(cases):
        size = int(rng.choice([1, 3, 8, 32, 33, 64, 256]))
        width, height = np.exp(rng.uniform(np.log(max(1, size / 3)), np.log(900), 2)).astype(int).tolist()
        width, height = min(width, 8 * height), min(height, 8 * width)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        whole = 4 * height < 7 * width  # whatever the halvings round to
        what = f"{width} x {height} to {size}"
        np.testing.assert_array_equal(
            images.center_crop(image, size), published_center_crop(image, size, whole), err_msg=what
        )
        np.testing.assert_array_equal(
            images.random_crop(image, size, np.random.default_rng(case), mirrored=True),
            published_random_crop(image, size, case, whole)[:, ::-1],
            err_msg=what,
        )


def test_every_side_is_halved_as_pillow_does() -> None:
    """Odd sides are the trap: which of the middle pixels are averaged in threes is a matter of rounding."""
    rng = np.random.default_rng(0)
    for side in [*range(2, 600), *rng.integers(600, 20_000, 100).tolist()]:
        for shape, axis in [((3, side), 0), ((side, 3), 1)]:
            image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
            halved = (side // 2, 3) if axis == 0 else (3, side // 2)
            found = np.asarray(images._halve_side(image, axis, (0, side // 2), (0, 3)))
            expected = np.asarray(image.resize(halved, Image.Resampling.BOX))
            np.testing.assert_array_equal(found, expected, err_msg=f"{side=} {axis=}")


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
