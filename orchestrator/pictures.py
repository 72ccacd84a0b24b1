"""Pictures as PNG bytes."""

import io

import numpy as np
from PIL import Image, ImageDraw


def grid_png(images: np.ndarray, columns: int, scale: int = 1, gap: int = 1) -> bytes:
    """A grid of uint8 [N, H, W, 3] images in reading order, each pixel `scale` wide, `gap` white pixels between."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {images.shape}; wanted uint8 [N, H, W, 3]")
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return png(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def captioned_grid_png(images: np.ndarray, captions: list[str], columns: int) -> bytes:
    """A grid of uint8 [N, H, W, 3] images, each with its caption beneath, cut to its width."""
    count, height, width, _ = images.shape
    line = 14  # pixels
    cells = np.full((count, height + line, width, 3), 255, np.uint8)
    for cell, image, caption in zip(cells, images, captions, strict=True):
        cell[:height] = image
        text = Image.new("RGB", (width, line), "white")
        ImageDraw.Draw(text).text((1, 1), caption, fill="black")
        cell[height:] = np.asarray(text)
    return grid_png(cells, columns, gap=2)


def png(image: np.ndarray) -> bytes:
    """One uint8 [H, W, 3] image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
