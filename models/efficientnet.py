"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation and swish): features of photographs on a CPU.

The caller provides the weights as the state dict of the PyTorch port, with names such as
`_blocks.3._depthwise_conv.weight`. They were trained in TensorFlow on ImageNet, and need TensorFlow's padding.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.features import Features, check_images, fold_batch_norm

SIZE = 224  # pixels, the input size of the network
NUM_BLOCKS = 16
STRIDE_2 = {1, 3, 5, 11}  # blocks that halve height and width
EPS = 1e-3  # of batch norm

# The batch norm of each convolution in a block.
_NORMS = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}


class EfficientNetLite0:
    """Extractor with `pool` [B, 1280] and `logits` [B, 1000] for the classes of ImageNet."""

    name = "efficientnet_lite0"
    dimension = 1280
    num_classes = 1000

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Load the port's tensors.

        Raises:
            ValueError: tensors are missing; the message names the first one.
        """
        norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"} | {
            f"_blocks.{block}.{conv}": f"_blocks.{block}.{norm}"
            for block in range(NUM_BLOCKS)
            for conv, norm in _NORMS.items()
            if block or conv != "_expand_conv"  # the first block does not expand
        }
        parts = ("weight", "bias", "running_mean", "running_var")
        expected = {"_fc.weight", "_fc.bias"} | {f"{conv}.weight" for conv in norms}
        expected |= {f"{norm}.{part}" for norm in norms.values() for part in parts}
        if missing := sorted(expected - set(state)):
            raise ValueError(
                f"{len(missing)} tensors are missing from the EfficientNet-Lite0 weights, first {missing[0]!r}"
            )
        self.device = torch.device(device)
        self.units = {}
        for conv, norm in norms.items():
            names = [f"{conv}.weight", *(f"{norm}.{part}" for part in parts)]
            weight, bias = fold_batch_norm(conv, EPS, *(state[name].double() for name in names))
            weight = weight.to(self.device, torch.float32).contiguous(memory_format=torch.channels_last)
            self.units[conv] = weight, bias.to(self.device, torch.float32)
        self.fc = [state[name].to(self.device, torch.float32) for name in ("_fc.weight", "_fc.bias")]

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Return the features of images uint8 [B, H, W, 3], resized to 224x224 (bilinear, antialiased)."""
        check_images(images)
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            x = self._unit("_conv_stem", (x - 127) / 128, stride=2).clamp_(0, 6)
            for block in range(NUM_BLOCKS):
                x = self._block(f"_blocks.{block}", x, stride=2 if block in STRIDE_2 else 1)
            pool = self._unit("_conv_head", x).clamp_(0, 6).mean((2, 3))
        logits = F.linear(pool, *self.fc)
        return Features(pool.cpu().numpy(), None, logits.cpu().numpy())

    def _block(self, name: str, x: Tensor, stride: int) -> Tensor:
        """Apply an inverted residual block; the input is added if the shapes are equal."""
        y = x
        if f"{name}._expand_conv" in self.units:
            y = self._unit(f"{name}._expand_conv", x).clamp_(0, 6)
        y = self._unit(f"{name}._depthwise_conv", y, stride, groups=y.shape[1]).clamp_(0, 6)
        y = self._unit(f"{name}._project_conv", y)
        return x + y if x.shape == y.shape else y

    def _unit(self, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        """Convolve with TensorFlow's SAME padding, which pads more at the right and at the bottom."""
        weight, bias = self.units[name]
        sizes = zip(x.shape[2:], weight.shape[2:], strict=True)
        pad_height, pad_width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size, kernel in sizes)
        top, left = pad_height // 2, pad_width // 2
        x = F.pad(x, (left, pad_width - left, top, pad_height - top))
        return F.conv2d(x, weight, bias, stride, groups=groups)
