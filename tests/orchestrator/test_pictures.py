"""Test that captions of pictures are shown completely."""

import io

import numpy as np
from PIL import Image

from orchestrator.pictures import captioned_grid_png


def test_a_long_caption_takes_more_lines_instead_of_being_cut() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    short, long = (captioned_grid_png(images, ["cat", name], columns=2) for name in ("dog", "Old English sheepdog"))
    heights = [np.asarray(Image.open(io.BytesIO(png))).shape[0] for png in (short, long)]
    assert heights[1] >= heights[0] + 14
    cell = np.asarray(Image.open(io.BytesIO(long)).convert("L"))[66:, 68:]
    assert cell[14:].min() < 100, "the second line has letters"
