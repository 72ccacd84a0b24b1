"""A sampling worker: its device, its networks ready on it, and canonical batches, their noise drawn ahead.

Generation, search and likelihood set their workers up here, and evaluation chooses its device here.
"""

from collections.abc import Iterable, Iterator

import torch

from models.unet import compile_blocks, halve_weights
from orchestrator.arithmetic import choose_device, set_arithmetic
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.noise import NoiseAhead
from orchestrator.generation.samples import Samples
from orchestrator.generation.sampling import Networks, load_networks, make_batch, noise_plan, upsample_batch
from orchestrator.weights.network import Network


def prepare_device(num_gpus: float, num_threads: int | None = None, tf32: bool = False) -> torch.device:
    """Return a worker's device, with settings by which equal work gives equal bits.

    Raises:
        ValueError: the worker is to have a GPU and sees none.
    """
    device = choose_device(num_gpus)
    if device.type == "cuda":
        set_arithmetic(num_threads, deterministic=True, tf32=tf32)
    elif num_threads is not None:
        torch.set_num_threads(num_threads)
    return device


def lay_out(network: Network, device: torch.device, dtype: str = "float32") -> Network:
    """Return the network as it samples fastest on the device: in its memory layout, with frozen weights of `dtype`."""
    if device.type == "cuda":  # on CPUs it makes GroupNorm slower
        network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype != "float32":
        halve_weights(network.module, getattr(torch, dtype))
    return network


class SamplingWorker:
    """The networks of a generation, loaded on this worker's device."""

    def __init__(self, config: GenerationConfig) -> None:
        self.device = prepare_device(config.num_gpus, config.num_threads, config.tf32)
        self.networks: Networks = load_networks(config, self.device)
        for network in self.networks.loaded:
            lay_out(network, self.device, config.dtype)

    def compile(self) -> None:
        """Compile the networks; their first batch takes longer by that."""
        for network in self.networks.loaded:
            compile_blocks(network.module)

    def batches(self, config: GenerationConfig, numbers: Iterable[int]) -> Iterator[tuple[Samples, ...]]:
        """Sample the canonical batches `numbers`: of each the Samples of every stage, two in a cascade.

        `config` has its batch size B, and may differ from the worker's in what loads no network.
        """
        numbers = list(numbers)
        plan = noise_plan(self.networks, config, numbers)
        with NoiseAhead(config.seed, plan, pin=self.device.type == "cuda") as draw:
            for number in numbers:
                batch = make_batch(self.networks, config, number, draw)
                upsampler = self.networks.upsampler
                yield (batch,) if upsampler is None else (batch, upsample_batch(upsampler, config, batch, draw))
