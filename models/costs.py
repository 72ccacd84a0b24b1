"""Parameters, multiply-adds and memory of a network, counted without running it.

On the meta device, or with fake tensors, a network performs the real operations on shapes without data. A network of
554M parameters is counted in seconds on any machine. A FLOP is one floating-point operation; a multiply-add is two.
"""

import weakref
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig, guided_timesteps
from models.samplers import SamplerConfig, evaluated_timesteps
from models.unet import Architecture

Use = Literal["training", "guiding", "sampling"]


def count_parameters(config: Architecture) -> int:
    """Return the number of parameters of the network, without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


@cache
def forward_multiply_adds(config: Architecture) -> int:
    """Return the multiply-adds of one forward pass over one image: convolutions, matrix products and attention."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        config.build()(**config.example_inputs(1))
    return int(counter.get_total_flops()) // 2


def training_flops(config: Architecture) -> float:
    """Return the FLOPs of a training step per image; the backward pass costs as much as two forward passes."""
    return 3 * 2.0 * forward_multiply_adds(config)


def training_state_bytes(config: Architecture, averages: int) -> int:
    """Return the bytes of weights, AdamW's two moments and `averages` averages of the weights, all float32."""
    return 4 * count_parameters(config) * (3 + averages)


class Evaluations(NamedTuple):
    """Number of network evaluations for one image."""

    model: int
    guide: int  # classifier with its gradient, model without its class, or weaker model

    @property
    def total(self) -> int:
        """Return the evaluations of both networks."""
        return self.model + self.guide


def sampling_evaluations(sampler: SamplerConfig, guidance: GuidanceConfig, diffusion: DiffusionConfig) -> Evaluations:
    """Return the evaluations of one chain; the guide is only evaluated inside the guidance interval.

    Raises:
        ValueError: the diffusion process has no such chain.
    """
    timesteps = evaluated_timesteps(sampler, diffusion)
    guided = guided_timesteps(guidance.interval, diffusion.num_timesteps)
    guide_evaluations = sum(t in guided for t in timesteps) if guidance.scale else 0
    return Evaluations(len(timesteps), guide_evaluations)


def sampling_flops(evaluations: Evaluations, model: Architecture, guide: Architecture | None) -> float:
    """Return the FLOPs of one sample; `guide` is the classifier, the weaker model or `model` itself."""
    guide_multiply_adds = guidance_multiply_adds(guide) if guide else 0
    return 2.0 * (evaluations.model * forward_multiply_adds(model) + evaluations.guide * guide_multiply_adds)


def guidance_multiply_adds(guide: Architecture) -> int:
    """Return the multiply-adds of a guide per image; a classifier needs a forward and a backward pass."""
    return (2 if guide.kind == "classifier" else 1) * forward_multiply_adds(guide)


@cache
def peak_memory(config: Architecture, use: Use, batch: int, half: bool = False) -> int:
    """Return the peak memory of one pass over `batch` images in bytes, without the float32 weights.

    This counts all tensors: activations, gradients and, with `half`, the half-precision copies of the weights. It does
    not include the workspace of convolutions or the fragmentation of the allocator.

    Args:
        use: "training" is a forward and a backward pass, "guiding" is the gradient of a classifier with respect to its
            input, and "sampling" is a forward pass.
        half: whether the pass runs under autocast to a 16-bit type.
    """
    with FakeTensorMode():
        network = config.build().requires_grad_(use == "training").train(use == "training")
        inputs = config.example_inputs(batch)
        inputs["x"].requires_grad_(use == "guiding")
        with LiveBytes() as live, torch.set_grad_enabled(use != "sampling"):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = network(**inputs)
            if use == "training":
                output.float().square().mean().backward()
            elif use == "guiding":
                torch.autograd.grad(output.float().sum(), inputs["x"])
        return live.peak


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of all live tensors that were created in it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # Views and in-place results share the storage of an input, which is already counted.
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
