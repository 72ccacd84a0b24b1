"""How much memory a network takes, found without running it.

A network on fake tensors goes through the real operations with shapes and no data, so that a 554M network is measured
in seconds on any machine.
"""

import weakref
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.unet import ClassifierConfig, NoisyClassifier, UNetConfig, make_unet

Use = Literal["training", "guiding", "sampling"]


@cache
def peak_memory(config: UNetConfig | ClassifierConfig, use: Use, batch: int, half: bool = False) -> int:
    """Bytes that one pass over `batch` images takes at its peak beside the float32 weights.

    training = forward and backward to the weights; guiding = a classifier's gradient to its input; sampling = forward.
    Activations, gradients and, with `half`, the weights' half copies, counted tensor by tensor. Left out: what
    convolutions take as workspace, and what the allocator loses to fragments.
    """
    with FakeTensorMode():
        network = NoisyClassifier(config) if isinstance(config, ClassifierConfig) else make_unet(config)
        network.requires_grad_(use == "training").train(use == "training")
        inputs = _inputs(config, batch, use)
        with LiveBytes() as live, torch.set_grad_enabled(use != "sampling"):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = network(**inputs)
            if use == "training":
                output.float().square().mean().backward()
            elif use == "guiding":
                torch.autograd.grad(output.float().sum(), inputs["x"])
        return live.peak


def _inputs(config: UNetConfig | ClassifierConfig, batch: int, use: Use) -> dict[str, Tensor]:
    def images(size: int) -> Tensor:
        return torch.zeros(batch, config.in_channels, size, size)

    inputs = {"x": images(config.image_size).requires_grad_(use == "guiding"), "timesteps": torch.zeros(batch)}
    if isinstance(config, UNetConfig) and config.num_classes is not None:
        inputs["y"] = torch.zeros(batch, dtype=torch.int64)
    if isinstance(config, UNetConfig) and config.low_res_size is not None:
        inputs["low_res"] = images(config.low_res_size)
    return inputs


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while inside that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
