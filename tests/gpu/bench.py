"""Shared parts of the GPU checks: networks with random weights, training and sampling steps, timing, and findings."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cluster.collectives import Group
from cluster.trainer import WorkerContext
from models import zoo
from models.diffusion import Diffusion, DiffusionConfig
from models.guidance import GuidanceConfig, guided
from models.samplers import SamplerConfig, ddpm_step, respacing_for
from models.unet import Architecture, ClassifierConfig, UNetConfig, autocast
from orchestrator.arithmetic import arithmetic, platform
from orchestrator.cost import peak_flops
from orchestrator.data.dataset import StreamShare
from orchestrator.order import OrderConfig
from orchestrator.training.config import AdmConfig
from orchestrator.training.gradients import make_reduction, prepare_network
from orchestrator.training.losses import Microbatch, Terms, make_losses, make_microbatches
from orchestrator.training.state import TrainingState, take_step
from orchestrator.weights.network import Network

Verdict = Literal["ok", "BROKEN", "info", "skip"]
UNKNOWN_CARD = 1e12  # FLOP/s; shares of this peak can be printed, but mean nothing

TINY_UNET = UNetConfig(
    image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,),
    num_head_channels=16, num_classes=10, use_new_attention_order=True,
)  # fmt: skip
TINY_CLASSIFIER = ClassifierConfig(
    image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,),
    num_head_channels=16, num_classes=10,
)  # fmt: skip


@dataclass
class Bench:
    """The device on which the checks run, and their findings."""

    device: torch.device
    tiny: bool = False  # small networks and few repeats
    lines: list[dict[str, Any]] = field(default_factory=list)
    check: str = ""  # the name of the check that runs

    @property
    def on_gpu(self) -> bool:
        """Return whether this is a CUDA device."""
        return self.device.type == "cuda"

    def say(self, verdict: Verdict, message: str, **numbers: Any) -> None:
        """Record and print one finding."""
        self.lines.append({"check": self.check, "verdict": verdict, "words": message, **numbers})
        print(f"{self.check:13} | {verdict:6} | {message}", flush=True)

    def hold(self, kept: bool, message: str, **numbers: Any) -> None:
        """Record whether a promise is kept."""
        self.say("ok" if kept else "BROKEN", message, **numbers)

    def judge(self, kept: bool, message: str, **numbers: Any) -> None:
        """Record whether a speed is reached. On a CPU the finding is information only."""
        if self.on_gpu:
            self.hold(kept, message, **numbers)
        else:
            self.say("info", message, **numbers)

    @cached_property
    def peak(self) -> float:
        """Return the dense FLOP/s in half precision of the data sheet."""
        return peak_flops(platform(self.device)["device"], "float16") or UNKNOWN_CARD

    def synchronize(self) -> None:
        """Wait until the GPU has finished all queued work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
        """Return the median time of `repeats` runs after `warm` warm-up runs, or of one after one if `tiny`."""
        for _ in range(1 if self.tiny else warm):
            run()
        self.synchronize()
        durations = []
        for _ in range(1 if self.tiny else repeats):
            begin = time.perf_counter()
            run()
            self.synchronize()
            durations.append(time.perf_counter() - begin)
        return float(np.median(durations))

    def memory(self, run: Callable[[], Any]) -> int:
        """Return the most bytes that the GPU holds while `run` runs; 0 on a CPU."""
        if not self.on_gpu:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    # ------------------------------------------------------------------------------------------------ networks

    def pair(self, size: int) -> tuple[UNetConfig, ClassifierConfig]:
        """Return ADM's diffusion model and classifier for `size` pixels, or the tiny ones if `tiny`."""
        if self.tiny:
            return TINY_UNET, TINY_CLASSIFIER
        unet, classifier = zoo.entry(f"adm-{size}").network, zoo.entry(f"classifier-{size}").network
        assert isinstance(unet, UNetConfig) and isinstance(classifier, ClassifierConfig)
        return unet, classifier

    def networks(self, size: int) -> tuple[Network, Network]:
        """Return both with random weights, frozen, as a sampling worker has them."""
        networks = []
        configs: tuple[UNetConfig | ClassifierConfig, ...] = self.pair(size)
        for seed, config in enumerate(configs, 1):
            module = filled(config, seed, self.device).eval().requires_grad_(False)
            if self.on_gpu:
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            classes = tuple(map(str, range(config.num_classes or 0)))
            networks.append(Network(module, config, DiffusionConfig(schedule="cosine"), classes, ""))
        return networks[0], networks[1]

    def guided_step(self, networks: tuple[Network, Network], batch: int, steps: int = 250) -> Callable[[], Tensor]:
        """Return one guided ancestral step in the middle of a chain of `steps`, for `batch` images."""
        unet, classifier = networks
        sampler = SamplerConfig(name="ddpm", num_steps=steps)
        diffusion = Diffusion(unet.diffusion, respacing_for(sampler, unet.diffusion.num_timesteps))
        size, generator = unet.architecture.image_size, torch.Generator(self.device).manual_seed(7)
        x, noise = (torch.randn(batch, 3, size, size, device=self.device, generator=generator) for _ in range(2))
        y = torch.arange(batch, device=self.device) % len(unet.classes)
        denoise = diffusion.denoiser(unet.module, y=y)
        denoise = guided(denoise, "ddpm", classifier.module, diffusion, y, GuidanceConfig(scale=1.0))
        t = steps // 2

        @torch.no_grad()
        def step() -> Tensor:
            return ddpm_step(diffusion, denoise(x, t), x, t, noise)

        return step

    # ------------------------------------------------------------------------------------------------ training

    def training(self, model: UNetConfig, images: int, dtype: str, streams: int = 1, **changes: Any) -> AdmConfig:
        """Return the config of a training with `images` images in a step."""
        return AdmConfig(
            store="none", dataset="none", output="none", model=model, diffusion=DiffusionConfig(schedule="cosine"),
            total_images=1_000_000, batch_size=images, order=OrderConfig(num_streams=streams), dtype=dtype,
            num_workers=1, num_gpus=int(self.on_gpu), num_threads=torch.get_num_threads(), **changes,
        )  # fmt: skip

    def microbatches(self, config: AdmConfig, seed: int = 0) -> list[Microbatch]:
        """Return the microbatches of one step, of random pictures, on the host."""
        rng, streams = np.random.default_rng(seed), config.order.num_streams
        rows, size = config.batch_size // streams, config.model.image_size
        shares = [
            StreamShare(
                stream=stream, epoch=0, images=rng.integers(0, 256, (rows, size, size, 3), np.uint8),
                labels=rng.integers(0, config.model.num_classes or 1, rows), samples=np.arange(rows) + rows * stream,
                flips=np.zeros(rows, bool), undecodable=np.zeros(rows, bool),
            )
            for stream in range(streams)
        ]  # fmt: skip
        return make_microbatches(shares, config, config.microbatch_rows(1), pin_memory=self.on_gpu)

    @contextlib.contextmanager
    def trainer(self, config: AdmConfig) -> Iterator[tuple[TrainingState, Callable[[list[Microbatch]], list[Terms]]]]:
        """Yield a state with random weights on the device, and a function that takes a step of microbatches."""
        context = WorkerContext(0, 1, self.device, lambda record: None, lambda: False, streams_on_cluster=False)
        group = Group(0, 1)
        with arithmetic(config.num_threads, config.reduction == "exact", config.tf32):
            state = TrainingState(config, self.device)
            fill(state.model, 3, gain=0.5)
            losses = make_losses(config, state.timesteps)
            prepare_network(config, context, group, state, losses)
            gradients = make_reduction(config, context, group, state, losses)

            def step(batches: list[Microbatch]) -> list[Terms]:
                terms = gradients([batch.to(self.device) for batch in batches])
                take_step(config, state)
                return terms

            yield state, step


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative error in norm, computed in float64 on the CPU; inf if it is not finite."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = float((a - b).norm() / b.norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


def filled(config: Architecture, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """Return a network with random weights, none of them zero."""
    with torch.device("meta"):
        module = config.build()
    return fill(module.to_empty(device=device), seed)


def fill(module: nn.Module, seed: int, gain: float = 0.7) -> nn.Module:
    """Give a network random weights, none of them zero; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * gain / math.sqrt(fan_in) if fan_in else noise * 0.05)
        for part in module.modules():
            if isinstance(part, nn.GroupNorm):
                part.weight.add_(1.0)
    return module


@cache
def example(channels: int = 3, size: int = 16, images: int = 4) -> dict[str, Tensor]:
    """Return one input of the tiny networks: x and noise float32 [4, 3, 16, 16], t and y int64 [4], low_res."""
    generator = torch.Generator().manual_seed(5)
    x, noise = (torch.randn(images, channels, size, size, generator=generator) for _ in range(2))
    small = torch.randn(images, channels, size // 2, size // 2, generator=generator)
    return {"x": x, "noise": noise, "t": torch.tensor([3, 250, 600, 990]), "y": torch.arange(1, 5), "low_res": small}


__all__ = ["TINY_CLASSIFIER", "TINY_UNET", "Bench", "autocast", "difference", "example", "fill", "filled"]
