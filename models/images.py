"""Conversions between images as pixels, uint8 [n, H, W, 3], and as network inputs, float32 [n, C, H, W] in [-1, 1]."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def from_uint8(images: Tensor, channels: int = 3) -> Tensor:
    """Return images / 127.5 - 1: uint8 [n, H, W, 3] -> float32 [n, channels, H, W].

    With channels=1 the images must be grey, because only their first channel is kept.
    """
    return images[..., :channels].permute(0, 3, 1, 2).float() / 127.5 - 1


Rounding = Literal["truncate", "nearest"]


def to_uint8(x: Tensor, rounding: Rounding = "truncate") -> Tensor:
    """Return (x + 1) * 127.5 as pixels: float [n, C, H, W] -> uint8 [n, H, W, 3].

    Values are clamped to 0..255 and truncated by default, as in the published code. A single channel becomes grey.
    """
    scaled = ((x + 1) * 127.5).clamp(0, 255)
    pixels = (scaled.round() if rounding == "nearest" else scaled).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def area_downsample(x: Tensor, size: int) -> Tensor:
    """Resize x [n, C, H, W] to [n, C, size, size] by means over areas, as in the training of published upsamplers."""
    return interpolate(x, (size, size), mode="area")
