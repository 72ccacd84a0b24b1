"""Crops are the published ones, to the bit."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from orchestrator.data import crops
from orchestrator.data.crops import center_crop, random_crop
from tests.published_crops import published_center_crop, published_random_crop


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
        whole = height <= width  # never more than twice as tall as wide, whatever the halvings round to
        what = f"{width} x {height} to {size}"
        np.testing.assert_array_equal(center_crop(image, size), published_center_crop(image, size, whole), err_msg=what)
        np.testing.assert_array_equal(
            random_crop(image, size, np.random.default_rng(case), mirrored=True),
            published_random_crop(image, size, case, whole)[:, ::-1],
            err_msg=what,
        )


def test_every_side_is_halved_as_pillow_does() -> None:
    """Odd sides are the trap: which of the middle pixels are averaged in threes is a matter of rounding."""
    rng = np.random.default_rng(0)
    for side in [*range(2, 600), *rng.integers(600, 20_000, 100).tolist()]:
        image = Image.fromarray(rng.integers(0, 256, (7, side, 3), dtype=np.uint8))
        for turned in (image, image.transpose(Image.Transpose.TRANSPOSE)):
            width, height = turned.width // 2, turned.height // 2
            halved = crops._box_downsample(crops._pixels(turned), 1, (0, width), (0, height))
            found = halved.view(np.uint8).reshape(height, width, 4)[..., :3]
            along_rows = turned.resize((width, turned.height), Image.Resampling.BOX)
            expected = np.asarray(along_rows.resize((width, height), Image.Resampling.BOX))
            np.testing.assert_array_equal(found, expected, err_msg=f"{turned.size}")


def test_an_image_in_several_pieces_of_memory() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"contiguous|multiple"):
        pa.array(image)
    np.testing.assert_array_equal(center_crop(image, 64), published_center_crop(image, 64, whole=True))


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
    np.testing.assert_array_equal(crops[7], random_crop(image, 40, np.random.default_rng(7)))
