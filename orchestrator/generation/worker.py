"""A sampling worker: its device, its networks ready on it, and canonical batches, their noise drawn ahead.

Generation, search and likelihood set their workers up here, and evaluation chooses its device here.
"""

import os
from collections.abc import Iterable, Iterator

import torch

from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.noise import NoiseAhead
from orchestrator.generation.samples import Samples
from orchestrator.generation.sampling import Networks, load_networks, make_batch, noise_plan, upsample_batch
from orchestrator.weights.network import Network


def prepare_device(num_gpus: float, num_threads: int | None = None) -> torch.device:
    """Return a worker's device, with settings by which equal work gives equal bits.

    Raises:
        ValueError: the worker is to have a GPU and sees none.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if not num_gpus:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products need
    if not torch.cuda.is_available():
        raise ValueError(f"num_gpus={num_gpus:g}, but this worker sees no GPU")
    torch.use_deterministic_algorithms(True, warn_only=True)
    return torch.device("cuda")


def lay_out(network: Network, device: torch.device) -> Network:
    """Return the network with the memory layout that is fastest on the device."""
    if device.type == "cuda":  # on CPUs it makes GroupNorm slower
        network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class SamplingWorker:
    """The networks of a generation, loaded on this worker's device."""

    def __init__(self, config: GenerationConfig) -> None:
        self.device = prepare_device(config.num_gpus, config.num_threads)
        self.networks: Networks = load_networks(config, self.device)
        for network in self.networks.loaded:
            lay_out(network, self.device)

    def compile(self) -> None:
        """Compile the networks; their first batch takes longer by that."""
        for network in self.networks.loaded:
            network.module.compile()

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
