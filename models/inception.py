"""The Inception-v3 of 2015-12-05 that defines FID, in PyTorch, with TensorFlow 1's resize.

It differs from torchvision's network: it has 1008 classes, batch norm with eps 1e-3, average pools that exclude padding
from the divisor, and a max pool in the last block. The caller provides the weights as the state dict of the public
port, with names such as `Mixed_5b.branch1x1.conv.weight`.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.features import Features, check_images, fold_batch_norm

SIZE = 299  # pixels, the input size of the network
NUM_CLASSES = 1008
DIMENSION = 2048
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, the first ones; at 17x17 positions they are the 2,023 features of sFID
EPS = 1e-3  # of batch norm

Units = Mapping[str, tuple[Tensor, Tensor]]  # name -> weight [O, I, h, w] and bias [O] of a convolution

STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
# The branches that blocks of the same kind share.
MIXED_5 = [
    "branch1x1",
    "branch5x5_1 branch5x5_2",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "average branch_pool",
]
MIXED_6 = [
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "average branch_pool",
]
MIXED_7 = [
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
]
# A block concatenates its branches in this order. A branch is a sequence of convolutions and of pools (POOLS), and a|b
# are two parallel convolutions.
BLOCKS: dict[str, list[str]] = {
    "Mixed_5b": MIXED_5,
    "Mixed_5c": MIXED_5,
    "Mixed_5d": MIXED_5,
    "Mixed_6a": ["branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "downsample"],
    "Mixed_6b": MIXED_6,
    "Mixed_6c": MIXED_6,
    "Mixed_6d": MIXED_6,
    "Mixed_6e": MIXED_6,
    "Mixed_7a": [
        "branch3x3_1 branch3x3_2",
        "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
        "downsample",
    ],
    "Mixed_7b": [*MIXED_7, "average branch_pool"],
    "Mixed_7c": [*MIXED_7, "maximum branch_pool"],
}
STRIDE_2 = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
UNPADDED = STRIDE_2 | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}  # every other convolution keeps height and width
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "MaxPool_1": lambda x: F.max_pool2d(x, 3, 2),
    "MaxPool_2": lambda x: F.max_pool2d(x, 3, 2),
    "downsample": lambda x: F.max_pool2d(x, 3, 2),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
}


def unit_names() -> list[str]:
    """Return the names of the 94 convolutions with batch norm and ReLU in the state dict."""
    names = list(STEM)
    for block, branches in BLOCKS.items():
        names += [f"{block}.{layer}" for branch in branches for layer in branch.replace("|", " ").split()]
    return [name for name in names if name.split(".")[-1] not in POOLS]


class InceptionNetwork:
    """Extractor with `pool` [B, 2048], `spatial` [B, 2023] and `logits` [B, 1008].

    The logits exclude the bias, as the Inception Score requires. Batch norm is folded into the convolutions once, in
    float64. The caller checks whether the weights are the published ones, which give FID.
    """

    name = "inception"
    dimension = DIMENSION
    num_classes = NUM_CLASSES

    def __init__(
        self, state: Mapping[str, Tensor], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Load the port's 472 tensors.

        Raises:
            ValueError: a tensor is missing, unknown or has a wrong shape; the message names it.
        """
        parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        expected = {f"{unit}.{part}" for unit in unit_names() for part in parts} | {"fc.weight", "fc.bias"}
        if missing := sorted(expected - set(state)):
            raise ValueError(f"{len(missing)} tensors are missing from the Inception weights, first {missing[0]!r}")
        if unknown := sorted(set(state) - expected):
            raise ValueError(f"the Inception weights contain {len(unknown)} unknown tensors, first {unknown[0]!r}")
        shape = tuple(state["fc.weight"].shape)
        if shape != (NUM_CLASSES, DIMENSION):
            raise ValueError(f"fc.weight has shape {shape}; expected {(NUM_CLASSES, DIMENSION)}")
        self.device, self.dtype = torch.device(device), dtype
        folded = {
            unit: fold_batch_norm(unit, EPS, *(state[f"{unit}.{part}"].double() for part in parts))
            for unit in unit_names()
        }
        _check_shapes(folded)
        self.units = {}
        for unit, (weight, bias) in folded.items():
            weight = weight.to(self.device, dtype).contiguous(memory_format=torch.channels_last)
            self.units[unit] = weight, bias.to(self.device, dtype)
        self.fc_weight = state["fc.weight"].to(self.device, dtype)

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Return the features of images uint8 [B, H, W, 3]."""
        check_images(images)
        pixels = resize(torch.from_numpy(np.ascontiguousarray(images)).to(self.device, self.dtype))
        x = ((pixels - 128) / 128).permute(0, 3, 1, 2)
        # With TF32 or benchmarked algorithms, features would depend on the GPU and on earlier batches.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for name, output in activations(self.units, x):
                if name == "Mixed_6d":  # its first channels are branch1x1, TensorFlow's mixed_6/conv
                    spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = output.mean((2, 3))
        logits = pool @ self.fc_weight.T
        return Features(*(tensor.float().cpu().numpy() for tensor in (pool, spatial, logits)))


def activations(units: Units, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, output) of every layer of the stem and then of every block, for x [B, 3, 299, 299] in [-1, 1)."""
    for name in STEM:
        x = _apply(units, name, x)
        yield name, x
    for block, branches in BLOCKS.items():
        outputs = []
        for branch in branches:
            y = x
            for step in branch.split():
                names = [name if name in POOLS else f"{block}.{name}" for name in step.split("|")]
                parallel = [_apply(units, name, y) for name in names]
                y = torch.cat(parallel, dim=1) if len(parallel) > 1 else parallel[0]
            outputs.append(y)
        x = torch.cat(outputs, dim=1)
        yield block, x


def _apply(units: Units, name: str, x: Tensor) -> Tensor:
    """Apply a pool, or a convolution with ReLU."""
    if name in POOLS:
        return POOLS[name](x)
    weight, bias = units[name]
    padding = (0, 0) if name in UNPADDED else (weight.shape[2] // 2, weight.shape[3] // 2)
    return F.relu_(F.conv2d(x, weight, bias, stride=2 if name in STRIDE_2 else 1, padding=padding))


def _check_shapes(units: Units) -> None:
    """Run the network on the meta device, to find wrong shapes before the first image."""
    meta_units = {name: (weight.to("meta"), bias.to("meta")) for name, (weight, bias) in units.items()}
    outputs = [("the input", torch.empty(1, 3, SIZE, SIZE, device="meta", dtype=torch.float64))]
    try:
        outputs.extend(activations(meta_units, outputs[0][1]))
    except RuntimeError as error:
        raise ValueError(f"Inception weights do not fit together after {outputs[-1][0]}: {error}") from error
    shape = tuple(outputs[-1][1].shape)
    if shape != (1, DIMENSION, 8, 8):
        raise ValueError(f"Inception weights give an output of shape {shape}; expected {(1, DIMENSION, 8, 8)}")


def resize(images: Tensor) -> Tensor:
    """Resize float [B, H, W, 3] to [B, 299, 299, 3] like TensorFlow 1's ResizeBilinear, without rounding.

    The source position of pixel i is i * H / 299 in float32. So corners are not aligned, pixel centres are not shifted
    by a half, and downsampling is not antialiased. Images of 299x299 do not change.
    """
    for axis in (2, 1):  # the order of the axes affects the last bits
        length = images.shape[axis]
        source = torch.arange(SIZE, dtype=torch.float32) * torch.tensor(length / SIZE, dtype=torch.float32)
        low = source.long()
        fraction = (source - low).to(images).view(-1, *([1] * (3 - axis)))
        high = (low + 1).clamp(max=length - 1)
        left, right = (images.index_select(axis, index.to(images.device)) for index in (low, high))
        images = left + (right - left) * fraction
    return images
