"""One image: encoded bytes -> RGB pixels -> ADM's crops, exact to the bit."""

import io
import math
import struct
import warnings
import zlib
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

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
        image = Image.open(io.BytesIO(data))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more pixels than Pillow takes: {error}") from error


def center_crop(image: Image.Image, size: int, mirrored: bool = False) -> np.ndarray:
    """ADM's training crop, uint8 [size, size, 3]: the shorter side to `size`, then the middle; mirrored on wish."""
    width, height = _resized(image, size)
    return _pixels(_window(image, size, (width - size) // 2, (height - size) // 2, size), mirrored)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator, mirrored: bool = False) -> np.ndarray:
    """The crop of ADM's classifier, uint8 [size, size, 3]: the shorter side uniform in [size, ceil(size / 0.8)],
    then anywhere; mirrored on wish."""
    shorter = int(rng.integers(size, math.ceil(size / 0.8), endpoint=True))
    width, height = _resized(image, shorter)
    top = int(rng.integers(0, height - size, endpoint=True))
    left = int(rng.integers(0, width - size, endpoint=True))
    return _pixels(_window(image, shorter, left, top, size), mirrored)


def _pixels(image: Image.Image, mirrored: bool) -> np.ndarray:
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


# ------------------------------------------------------------------------------------------------ one crop, quickly
#
# The published rule halves by BOX while the shorter side is at least twice the wanted one, then resizes by BICUBIC,
# then crops. The same pixels, to the bit, come sooner where only those are made that the crop will need, and where
# pairs of pixels are averaged by `reduce`, which takes a third of the time of `resize`. Every step goes along the rows
# and then along the columns, and rounds between, as Pillow does: since version 13 it does so the other way about for
# images more than twice as tall as wide, where we stay with what the published code saw.

Span = tuple[int, int]  # pixels [begin, end) of a side
_SMALL = 1 << 15  # pixels below which a plain `resize` is as quick


class _Run(NamedTuple):
    """Pixels [begin, end) of a halved side, each the mean of its own `width` pixels from `source` on."""

    begin: int
    end: int
    source: int
    width: int


def _halvings(image: Image.Image, shorter: int) -> int:
    """How often the image is halved before its shorter side becomes `shorter`."""
    times = 0
    while min(image.size) >> times >= 2 * shorter:
        times += 1
    return times


def _resized(image: Image.Image, shorter: int) -> tuple[int, int]:
    """Width and height of the image whose shorter side became `shorter`."""
    times = _halvings(image, shorter)
    width, height = image.width >> times, image.height >> times
    scale = shorter / min(width, height)
    return round(width * scale), round(height * scale)


def _window(image: Image.Image, shorter: int, left: int, top: int, size: int) -> Image.Image:
    """The square of `size` pixels at (left, top) of the image whose shorter side became `shorter`."""
    width, height = _resized(image, shorter)
    times = _halvings(image, shorter)
    columns = _bicubic_inputs(image.width >> times, width, left, size)
    rows = _bicubic_inputs(image.height >> times, height, top, size)
    image = _halved(image, times, columns, rows)

    # A strip of the rows that count, back in its place before the columns are resized.
    strip = image if rows == (0, image.height) else image.crop((0, rows[0], image.width, rows[1]))
    strip = strip.resize((width, strip.height), Image.Resampling.BICUBIC).crop((left, 0, left + size, strip.height))
    if strip.height < image.height:
        canvas = Image.new("RGB", (size, image.height))
        canvas.paste(strip, (0, rows[0]))
        strip = canvas
    return strip.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


def _bicubic_inputs(side: int, resized: int, first: int, size: int) -> Span:
    """The pixels of a side that BICUBIC looks at for `size` of its `resized` pixels from `first` on."""
    scale = side / resized
    reach = 2 * max(scale, 1) + 1
    return max(0, int(first * scale - reach)), min(side, math.ceil((first + size) * scale + reach))


def _halved(image: Image.Image, times: int, columns: Span, rows: Span) -> Image.Image:
    """The image halved so often; right within these columns and rows of the result, and there only."""
    if times == 0:
        return image
    width, height = image.width >> times - 1, image.height >> times - 1
    wide, high = _halving_inputs(width, columns), _halving_inputs(height, rows)
    image = _halved(image, times - 1, wide, high)
    if width * height < _SMALL:
        image = image.resize((width // 2, height), Image.Resampling.BOX)
        return image.resize((width // 2, height // 2), Image.Resampling.BOX)
    return _halve_side(_halve_side(image, 0, columns, high), 1, rows, columns)


def _halve_side(image: Image.Image, axis: int, along: Span, across: Span) -> Image.Image:
    """The image with its width (axis 0) or height (1) halved: pixels `along` the axis, for those `across` it."""

    def box(side: Span) -> tuple[int, int, int, int]:
        return (side[0], across[0], side[1], across[1]) if axis == 0 else (across[0], side[0], across[1], side[1])

    halved = [image.width, image.height]
    halved[axis] //= 2
    canvas = Image.new("RGB", (halved[0], halved[1]))
    for run in _runs(image.size[axis]):
        begin, end = max(run.begin, along[0]), min(run.end, along[1])
        if begin >= end:
            continue
        source = run.source + (begin - run.begin) * run.width
        inputs, place = box((source, source + (end - begin) * run.width)), box((begin, end))
        if run.width == 2:
            piece = image.reduce((2, 1) if axis == 0 else (1, 2), inputs)
        else:
            piece = image.resize((place[2] - place[0], place[3] - place[1]), Image.Resampling.BOX, inputs)
        canvas.paste(piece, place)
    return canvas


@lru_cache(maxsize=8192)
def _runs(side: int) -> tuple[_Run, ...]:
    """Which pixels BOX averages when it halves a side.

    Pairs, but about the middle of an odd side, where rounding decides on threes: Pillow's own means of the pixels'
    places tell, x and a half for a pair, x for the three about it.
    """
    places = Image.fromarray(np.arange(side, dtype=np.float32)[None])
    means = np.asarray(places.resize((side // 2, 1), Image.Resampling.BOX))[0]
    widths = 3 - np.rint(2 * means).astype(int) % 2
    sources = np.rint(means - (widths - 1) / 2).astype(int)
    follows = (np.diff(sources) == widths[:-1]) & (np.diff(widths) == 0)
    starts = [0, *(np.flatnonzero(~follows) + 1).tolist(), side // 2]
    return tuple(_Run(begin, end, int(sources[begin]), int(widths[begin])) for begin, end in pairwise(starts))


def _halving_inputs(side: int, outputs: Span) -> Span:
    """The pixels of a side that its halved side's pixels `outputs` are made of."""
    first = next(run for run in _runs(side) if run.end > outputs[0])
    last = next(run for run in _runs(side) if run.end >= outputs[1])
    return (
        first.source + (outputs[0] - first.begin) * first.width,
        last.source + (outputs[1] - last.begin) * last.width,
    )
