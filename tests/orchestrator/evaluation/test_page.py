"""The page of an evaluation shows the right images."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.evaluation.inputs import ImageSet
from orchestrator.evaluation.page import _grid, template


def test_picked_images_are_those_of_the_given_indices() -> None:
    read: list[tuple[int, int]] = []

    def images(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        read.append((begin, end))
        rows = np.arange(begin, end, dtype=np.int64)
        return np.broadcast_to((rows % 251).astype(np.uint8)[:, None, None, None], (end - begin, 4, 4, 3)), rows

    image_set = ImageSet("x", "npz", 2000, "x", images)
    picked, labels = image_set.pick(np.array([1500, 3, 700, 5]))
    assert labels.tolist() == [1500, 3, 700, 5]
    assert picked[:, 0, 0, 0].tolist() == [1500 % 251, 3, 700 % 251, 5]
    assert sorted(read) == [(3, 6), (700, 701), (1500, 1501)]


@pytest.mark.parametrize("size", [8, 64, 200])
def test_grids_have_a_similar_width_for_all_image_sizes(size: int) -> None:
    image = Image.open(io.BytesIO(_grid(np.full((20, size, size, 3), 90, np.uint8))))
    assert 300 <= image.width <= 700


def test_no_page_shows_a_secret_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("{% macro bold(x) %}<b>{{ x }}</b>{% endmacro %}{{ bold(path) }} <{{ path }}>")
    page = template(tmp_path / "page.html").render(path="s3://KEYID:topsecret@bucket/a & b")
    assert page == "<b>s3://***@bucket/a &amp; b</b> <s3://***@bucket/a &amp; b>"
