"""Grids of images and plots as PNG bytes."""

import io
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("#1b6ca8", "#d1603d", "#3f7d4e", "#8a4f9e")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def grid_png(images: np.ndarray, columns: int, scale: int = 1, gap: int = 1) -> bytes:
    """Return a PNG of uint8 [N, H, W, 3] images in rows, `gap` white pixels apart and then enlarged `scale` times."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}; expected uint8 [N, H, W, 3]")
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return png(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def captioned_grid_png(images: np.ndarray, captions: list[str], columns: int) -> bytes:
    """Return a PNG of uint8 [N, H, W, 3] images in rows, each with its caption below, which is wrapped into lines."""
    count, height, width, _ = images.shape
    line_height, characters = 14, max(1, width // 6)  # pixels of a line, and characters that fit on it
    wrapped = [textwrap.wrap(caption, characters) for caption in captions]
    text_height = line_height * max(map(len, wrapped), default=1)
    cells = np.full((count, height + text_height, width, 3), 255, np.uint8)
    for cell, image, lines in zip(cells, images, wrapped, strict=True):
        cell[:height] = image
        text = Image.new("RGB", (width, text_height), "white")
        ImageDraw.Draw(text).multiline_text((1, 1), "\n".join(lines), fill="black", spacing=3)
        cell[height:] = np.asarray(text)
    return grid_png(cells, columns, gap=2)


def png(image: np.ndarray) -> bytes:
    """Return one uint8 [H, W, 3] image as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def subplots(*shape: int, **options: Any) -> tuple[Any, Any]:
    """Return pyplot's figure and axes in Admiral's style. No display is needed."""
    import matplotlib  # imported here because workers do not need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(*shape, **options)


def figure_png(figure: Any) -> bytes:
    """Return the figure as PNG bytes, and close it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return buffer.getvalue()


def strips_figure(rows: list[tuple[str, np.ndarray]], title: str) -> bytes:
    """Return a PNG with one row of uint8 [n, H, W, 3] images for each label."""
    figure, axes = subplots(len(rows), figsize=(8.6, 0.52 * len(rows) + 0.3), squeeze=False)
    for axis, (label, images) in zip(axes.flat, rows, strict=True):
        grid = grid_png(images, columns=len(images), scale=2)
        axis.imshow(np.asarray(Image.open(io.BytesIO(grid))), interpolation="nearest")
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=9)
    return figure_png(figure)


def distances_figure(distances: dict[str, list[float]]) -> bytes:
    """Return a PNG with histograms of the distances to the nearest training image.

    distances: of the "samples" and of "held_out" real images.
    """
    figure, axis = subplots(figsize=(8.6, 2.6))
    bins = np.linspace(0, max(map(max, distances.values())), 50).tolist()
    labels = {"samples": "samples", "held_out": "held-out real images"}
    for colour, (name, values) in zip(COLOURS, distances.items(), strict=False):
        axis.hist(values, bins=bins, density=True, alpha=0.55, color=colour, label=labels[name])
    axis.set(xlabel="root mean square distance to the nearest training image, grey levels of 255", yticks=[])
    axis.legend(frameon=False)
    return figure_png(figure)
