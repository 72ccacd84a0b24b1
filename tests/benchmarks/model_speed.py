"""Compare the speed of the networks with a plain implementation of the same networks. Run by hand:

    python -m tests.benchmarks.model_speed [--pairs 20] [--device cuda] [--dtype bfloat16] [--compile] [--large]

The plain path is a straightforward float32 implementation with the same weights: explicit attention, time embeddings
that are computed at every step, and a guidance gradient for which autograd also records the U-Net. Each row alternates
both paths, and prints the median ratio with a 95% interval of the median. MFU counts 2 FLOPs a multiply-add.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from models.costs import forward_multiply_adds
from models.diffusion import Diffusion, DiffusionConfig
from models.guidance import classifier_gradient, mean_shift
from models.samplers import ddpm_step
from models.unet import ClassifierConfig, NoisyClassifier, UNet, UNetConfig
from models.zoo import entry

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "Tesla V100": 125e12}  # dense 16 bit


@dataclass(frozen=True)
class Options:
    """The measurement."""

    pairs: int = 20  # alternating pairs a row
    batch_size: int = 1  # images
    device: str = "cpu"  # torch device
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of Admiral's path; the plain one is float32
    compile: bool = False  # use torch.compile in Admiral's path
    large: bool = False  # also measure ADM-64
    num_threads: int = 1  # CPU threads


SMALL = UNetConfig(
    image_size=32, model_channels=64, num_res_blocks=2, channel_mult=(1, 2, 2), attention_resolutions=(16, 8),
    num_head_channels=32, num_classes=10,
)  # fmt: skip
SMALL_CLASSIFIER = ClassifierConfig(
    image_size=32, model_channels=64, num_res_blocks=1, channel_mult=(1, 2, 2), attention_resolutions=(16, 8),
    num_head_channels=32, num_classes=10,
)  # fmt: skip


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(0)
    print(options)
    print(f"{'network':10} {'what':18} {'plain ms':>9} {'ours ms':>9} {'plain/ours':>10} {'95% interval':>16}  MFU")
    networks = [("64ch-32px", SMALL, SMALL_CLASSIFIER)]
    if options.large:
        adm, guide = entry("adm-64").network, entry("classifier-64").network
        assert isinstance(adm, UNetConfig) and isinstance(guide, ClassifierConfig)
        networks.append(("ADM-64", adm, guide))
    for name, unet_config, classifier_config in networks:
        unet = unet_config.build().to(options.device).eval()
        classifier = classifier_config.build().to(options.device).eval()
        for operation, multiply_adds, plain, ours in _paths(options, unet, classifier, unet_config, classifier_config):
            _row(options, name, operation, multiply_adds, plain, ours)


Path = Callable[[], object]


def _paths(
    options: Options, unet: UNet, classifier: NoisyClassifier, config: UNetConfig, classifier_config: ClassifierConfig
) -> Iterator[tuple[str, int, Path, Path]]:
    """Yield (operation, multiply-adds of an image, plain path, Admiral's path)."""
    diffusion = Diffusion(DiffusionConfig(schedule="cosine"), "25")
    n, device = options.batch_size, options.device
    x = torch.randn(n, 3, config.image_size, config.image_size, device=device)
    y, noise = torch.zeros(n, dtype=torch.int64, device=device), torch.randn_like(x)
    t = torch.full((n,), 12, device=device)
    fast = torch.compile(unet) if options.compile else unet
    autocast = torch.autocast(torch.device(device).type, getattr(torch, options.dtype), options.dtype != "float32")

    def forward(model: Callable[..., Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(x, t, y)

    def backward(model: Callable[..., Tensor]) -> None:
        diffusion.losses(model, x, t, noise, y=y)["loss"].mean().backward()
        unet.zero_grad(set_to_none=True)

    def plain_guided() -> Tensor:
        inputs = x.detach().requires_grad_()
        prediction = diffusion.denoiser(unet, y=y)(inputs, t)
        log_prob = F.log_softmax(classifier(inputs, diffusion.model_timesteps(t, x)), dim=1)[torch.arange(n), y]
        shift = torch.autograd.grad(log_prob.sum(), inputs)[0]
        shifted = replace(prediction, mean=prediction.mean + prediction.variance * shift)
        return ddpm_step(diffusion, shifted, inputs, t, noise).detach()

    denoise = diffusion.denoiser(fast, y=y)
    frozen = classifier.requires_grad_(False)
    guided = mean_shift(denoise, classifier_gradient(frozen, diffusion, y, 1.0))

    @torch.inference_mode()
    def our_guided() -> Tensor:
        return ddpm_step(diffusion, guided(x, 12), x, 12, noise)

    def ours(path: Path) -> Path:
        def run() -> None:
            with autocast:
                path()

        return run

    cost, guide = forward_multiply_adds(config), forward_multiply_adds(classifier_config)
    yield "forward", cost, _with_explicit_attention(lambda: forward(unet)), ours(lambda: forward(fast))
    yield "forward+backward", 3 * cost, _with_explicit_attention(lambda: backward(unet)), ours(lambda: backward(fast))
    yield "guided step", cost + 2 * guide, _with_explicit_attention(plain_guided), ours(our_guided)


def _with_explicit_attention(path: Path) -> Path:
    """Return `path` with explicit instead of fused attention."""

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.25
        return torch.softmax((q * scale) @ (k * scale).transpose(-1, -2), dim=-1) @ v

    @contextlib.contextmanager
    def swapped() -> Iterator[None]:
        fused = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = explicit  # type: ignore[assignment]
        try:
            yield
        finally:
            F.scaled_dot_product_attention = fused

    def run() -> None:
        with swapped():
            path()

    return run


def _row(options: Options, name: str, operation: str, multiply_adds: int, plain: Path, ours: Path) -> None:
    for path in (plain, ours, plain, ours):  # warm up
        path()
    pairs = np.array([[_seconds(plain, options.device), _seconds(ours, options.device)] for _ in range(options.pairs)])
    ratios = np.sort(pairs[:, 0] / pairs[:, 1])
    # The median lies between these order statistics with 95% (binomial, normal approximation).
    reach = 0.98 * math.sqrt(len(ratios))
    low, high = int(max(0, len(ratios) / 2 - reach)), int(min(len(ratios) - 1, len(ratios) / 2 + reach))
    plain_ms, our_ms = np.median(pairs, axis=0) * 1e3
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(), 0.0) if options.device == "cuda" else 0.0
    mfu = f"{2 * multiply_adds * options.batch_size / (our_ms / 1e3) / peak:.0%}" if peak else "-"
    interval = f"{ratios[low]:.3f} to {ratios[high]:.3f}"
    print(f"{name:10} {operation:18} {plain_ms:9.1f} {our_ms:9.1f} {np.median(ratios):10.3f} {interval:>16}  {mfu}")


def _seconds(path: Path, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    path()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
