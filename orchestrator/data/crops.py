"""ADM's crops, exact to the bit, several times as quick as the calls of Pillow that define them.

The published rule halves by BOX while the shorter side is at least twice the wanted one, then resizes by BICUBIC, then
crops. Pillow resizes by sums of integers, first along the rows, then along the columns, and rounds after each. The same
sums are made here of only those pixels that the crop needs, compiled for the processor at hand, for many pixels at
once. (Since version 13 Pillow takes the columns first where an image is more than twice as tall as wide; here the order
stays what the published code saw.)

Pixels are uint32 [height, width], four bytes each as in Pillow's own memory, the last of which means nothing.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit
from PIL import Image

Span = tuple[int, int]  # pixels [begin, end) of a side
_PRECISION = 22  # bits of Pillow's weights after the point
_KEPT = 1024  # tables for (side, resized side), of 10 KB or so


def center_crop(image: Image.Image, size: int, mirrored: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """ADM's training crop of an RGB image, uint8 [size, size, 3]: the shorter side to `size`, then the middle;
    mirrored on wish, written to `out` if that is given."""
    width, height = _resized(image, size)
    return _crop(image, size, (width - size) // 2, (height - size) // 2, size, mirrored, out)


def random_crop(
    image: Image.Image, size: int, rng: np.random.Generator, mirrored: bool = False, out: np.ndarray | None = None
) -> np.ndarray:
    """The crop of ADM's classifier, uint8 [size, size, 3]: the shorter side uniform in [size, ceil(size / 0.8)],
    then anywhere; mirrored on wish, written to `out` if that is given."""
    shorter = int(rng.integers(size, math.ceil(size / 0.8), endpoint=True))
    width, height = _resized(image, shorter)
    top = int(rng.integers(0, height - size, endpoint=True))
    left = int(rng.integers(0, width - size, endpoint=True))
    return _crop(image, shorter, left, top, size, mirrored, out)


def _crop(
    image: Image.Image, shorter: int, left: int, top: int, size: int, mirrored: bool, out: np.ndarray | None
) -> np.ndarray:
    """The square of `size` pixels at (left, top) of the image whose shorter side became `shorter`."""
    width, height = _resized(image, shorter)
    times = _halvings(image, shorter)
    columns = _bicubic(image.width >> times, width).of(left, size)
    rows = _bicubic(image.height >> times, height).of(top, size)
    pixels = _box_downsample(_pixels(image), times, columns.inputs, rows.inputs)

    across = np.ascontiguousarray(pixels[slice(*rows.inputs), slice(*columns.inputs)].T)
    down = np.ascontiguousarray(_weighted(across, columns).T)
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    _take_rgb(_weighted(down, rows).view(np.uint8).reshape(size, size, 4), mirrored, out)
    return out


def _pixels(image: Image.Image) -> np.ndarray:
    """The image's pixels, where they lie."""
    try:
        flat = pa.array(image).flatten().to_numpy().view(np.uint32)
    except ValueError:  # Pillow keeps one of more than 16 MB in several pieces
        flat = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    return flat.reshape(image.height, image.width)


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


# ----------------------------------------------------------------------------------------------------------- BICUBIC


class _Taps(NamedTuple):
    """What the pixels of a resized side are made of: output n of inputs first[n] + k, weights[n, k] of each."""

    first: np.ndarray  # int64 [outputs]
    length: np.ndarray  # int64 [outputs]
    weights: np.ndarray  # int32 [outputs, most taps], of 2^22

    @property
    def inputs(self) -> Span:
        return int(self.first[0]), int(self.first[-1] + self.length[-1])

    def of(self, begin: int, size: int) -> "_Taps":
        """Those of `size` outputs from `begin` on."""
        return _Taps(*(table[begin : begin + size] for table in self))


@lru_cache(_KEPT)
def _bicubic(side: int, resized: int) -> _Taps:
    """Pillow's weights: the cubic kernel with a = -1/2, as wide as the outputs are apart, normalised, then rounded."""
    scale = side / resized
    width = max(scale, 1.0)
    centers = (np.arange(resized) + 0.5) * scale
    first = np.maximum((centers - 2 * width + 0.5).astype(np.int64), 0)
    length = np.minimum((centers + 2 * width + 0.5).astype(np.int64), side) - first
    places = np.arange(length.max())
    x = np.abs((places + first[:, None] - centers[:, None] + 0.5) * (1 / width))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[places >= length[:, None]] = 0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # one after the other, as Pillow adds them up
    fixed = weights * (1 << _PRECISION)
    return _Taps(first, length, np.trunc(fixed + np.where(weights < 0, -0.5, 0.5)).astype(np.int32))


def _weighted(pixels: np.ndarray, taps: _Taps) -> np.ndarray:
    """uint32 [inputs, n] -> uint32 [outputs, n]: the weighted sums of whole rows; `pixels` begins at the taps' first
    input."""
    result = np.empty((len(taps.first), pixels.shape[1]), np.uint32)
    _add_rows(pixels.view(np.uint8), taps.first - taps.first[0], taps.length, taps.weights, result.view(np.uint8))
    return result


@njit(nogil=True)
def _add_rows(
    pixels: np.ndarray, first: np.ndarray, length: np.ndarray, weights: np.ndarray, result: np.ndarray
) -> None:
    total = np.empty(pixels.shape[1], np.int32)
    for n in range(len(first)):
        total[:] = 1 << (_PRECISION - 1)
        for k in range(length[n]):
            row, weight = pixels[first[n] + k], weights[n, k]
            for i in range(len(total)):
                total[i] += np.int32(row[i]) * weight
        for i in range(len(total)):
            result[n, i] = min(max(total[i] >> _PRECISION, 0), 255)


@njit(nogil=True)
def _take_rgb(pixels: np.ndarray, mirrored: bool, rgb: np.ndarray) -> None:
    height, width, _ = rgb.shape
    for y in range(height):
        for x in range(width):
            source = pixels[y, width - 1 - x] if mirrored else pixels[y, x]
            rgb[y, x, 0], rgb[y, x, 1], rgb[y, x, 2] = source[0], source[1], source[2]


# --------------------------------------------------------------------------------------------------------------- BOX


def _box_downsample(pixels: np.ndarray, times: int, columns: Span, rows: Span) -> np.ndarray:
    """The pixels halved so often; right within these columns and rows of the result, and there only."""
    if times == 0:
        return pixels
    height, width = pixels.shape[0] >> times - 1, pixels.shape[1] >> times - 1
    across, down = _runs(width), _runs(height)
    pixels = _box_downsample(pixels, times - 1, _halving_inputs(across, columns), _halving_inputs(down, rows))
    result = np.empty((height // 2, width // 2), np.uint32)
    _halve(pixels, across, down, columns, rows, result)
    return result


@lru_cache(_KEPT)
def _runs(side: int) -> np.ndarray:
    """Which pixels BOX averages when it halves a side, int64 [runs, 4]: begin, end, source, width. Pixels [begin, end)
    of the halved side are each the mean of their own `width` pixels from `source` on.

    Pairs, but about the middle of an odd side, where rounding decides on threes: Pillow's own means of the pixels'
    places tell, x and a half for a pair, x for the three about it.
    """
    places = Image.fromarray(np.arange(side, dtype=np.float32)[None])
    means = np.asarray(places.resize((side // 2, 1), Image.Resampling.BOX))[0]
    widths = 3 - np.rint(2 * means).astype(int) % 2
    sources = np.rint(means - (widths - 1) / 2).astype(int)
    follows = (np.diff(sources) == widths[:-1]) & (np.diff(widths) == 0)
    starts = [0, *(np.flatnonzero(~follows) + 1).tolist(), side // 2]
    return np.array([(begin, end, sources[begin], widths[begin]) for begin, end in pairwise(starts)], np.int64)


def _halving_inputs(runs: np.ndarray, outputs: Span) -> Span:
    """The pixels of a side that its halved side's pixels `outputs` are made of."""
    first = next(run for run in runs.tolist() if run[1] > outputs[0])
    last = next(run for run in runs.tolist() if run[1] >= outputs[1])
    return first[2] + (outputs[0] - first[0]) * first[3], last[2] + (outputs[1] - last[0]) * last[3]


@njit(nogil=True)
def _halve(
    pixels: np.ndarray, across: np.ndarray, down: np.ndarray, columns: Span, rows: Span, result: np.ndarray
) -> None:
    """Two or three rows at a time: each halved along itself first."""
    lines = np.empty((3, result.shape[1]), np.uint32)
    for begin, end, source, width in down:
        for y in range(max(begin, rows[0]), min(end, rows[1])):
            for k in range(width):
                _halve_row(pixels[source + (y - begin) * width + k], across, columns, lines[k])
            if width == 2:
                for x in range(columns[0], columns[1]):
                    result[y, x] = _mean_of_two(lines[0, x], lines[1, x])
            else:
                for x in range(columns[0], columns[1]):
                    result[y, x] = _mean_of_three(lines[0, x], lines[1, x], lines[2, x])


@njit(nogil=True)
def _halve_row(row: np.ndarray, across: np.ndarray, columns: Span, halved: np.ndarray) -> None:
    for begin, end, source, width in across:
        first, last = max(begin, columns[0]), min(end, columns[1])
        if first >= last:
            continue
        inputs, outputs = row[source + width * (first - begin) :], halved[first:last]
        if width == 2:
            for x in range(len(outputs)):
                outputs[x] = _mean_of_two(inputs[2 * x], inputs[2 * x + 1])
        else:
            for x in range(len(outputs)):
                outputs[x] = _mean_of_three(inputs[3 * x], inputs[3 * x + 1], inputs[3 * x + 2])


@njit(nogil=True)
def _mean_of_two(a: np.uint32, b: np.uint32) -> np.uint32:
    """Of four bytes at once, halves up."""
    return (a | b) - (((a ^ b) >> np.uint32(1)) & np.uint32(0x7F7F7F7F))


@njit(nogil=True)
def _mean_of_three(a: np.uint32, b: np.uint32, c: np.uint32) -> np.uint32:
    """Of four bytes, with Pillow's weights of a third."""
    mean = np.uint32(0)
    for shift in (np.uint32(0), np.uint32(8), np.uint32(16), np.uint32(24)):
        byte = np.uint32(255)
        total = ((a >> shift) & byte) + ((b >> shift) & byte) + ((c >> shift) & byte)
        third = (total * np.uint32(1398101) + np.uint32(1 << 21)) >> np.uint32(22)
        mean |= third << shift
    return mean
