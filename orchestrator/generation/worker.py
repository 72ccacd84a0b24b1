"""Sampling workers: device, networks and batches; shared by generation, search, likelihood and evaluation."""

import torch

from models.unet import compile_blocks, halve_weights
from orchestrator.arithmetic import choose_device, set_arithmetic
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.samples import Samples
from orchestrator.generation.sampling import load_networks, make_batch
from orchestrator.weights.network import Network


def prepare_device(num_gpus: float, num_threads: int | None = None, tf32: bool = False) -> torch.device:
    """Choose a worker's device, set PyTorch to deterministic arithmetic, and return the device.

    Raises:
        ValueError: the config has num_gpus, but the worker sees no GPU.
    """
    device = choose_device(num_gpus)
    if device.type == "cuda":
        set_arithmetic(num_threads, deterministic=True, tf32=tf32)
    elif num_threads is not None:
        torch.set_num_threads(num_threads)
    return device


def lay_out(network: Network, device: torch.device, dtype: str = "float32") -> Network:
    """Convert a network for fast sampling: channels_last on a GPU, and weights in `dtype`; return it."""
    if device.type == "cuda":  # on CPUs it makes GroupNorm slower
        network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype != "float32":
        halve_weights(network.module, getattr(torch, dtype))
    return network


class SamplingWorker:
    """The device and the networks of a generation."""

    def __init__(self, config: GenerationConfig) -> None:
        self.device = prepare_device(config.num_gpus, config.num_threads, config.tf32)
        self.networks = load_networks(config, self.device)
        for network in self.networks.loaded:
            lay_out(network, self.device, config.dtype)

    def compile(self) -> None:
        """Compile the networks, which happens in the first batch."""
        for network in self.networks.loaded:
            compile_blocks(network.module)

    def batch(self, config: GenerationConfig, number: int) -> tuple[Samples, ...]:
        """Return the samples of a canonical batch in each stage: one, or two in a cascade.

        config: with the batch size B; it may differ from the worker's config in fields that load no networks.
        """
        return make_batch(self.networks, config, number)
