"""Between pictures, uint8 [n, H, W, 3], and what networks see, float32 [n, C, H, W] in [-1, 1]."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def from_uint8(images: Tensor, channels: int = 3) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, channels, H, W] = images / 127.5 - 1.

    With channels=1 the pictures are grey, so that one of their equal channels says all.
    """
    return images[..., :channels].permute(0, 3, 1, 2).float() / 127.5 - 1


Rounding = Literal["truncate", "nearest"]


def to_uint8(x: Tensor, rounding: Rounding = "truncate") -> Tensor:
    """float [n, C, H, W] -> uint8 [n, H, W, 3]: (x + 1) * 127.5, clamped and truncated as in the published code.

    A single channel is shown as grey.
    """
    scaled = ((x + 1) * 127.5).clamp(0, 255)
    pixels = (scaled.round() if rounding == "nearest" else scaled).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def area_downsample(x: Tensor, size: int) -> Tensor:
    """[n, C, H, W] -> [n, C, size, size] by means over areas: what the published upsamplers were trained to undo."""
    return interpolate(x, (size, size), mode="area")
