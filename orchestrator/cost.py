"""The cost of a job, estimated before it runs: FLOPs, memory of each GPU, GPU-hours. `--dry-run` prints it.

A FLOP is one floating-point operation, so a multiply-add is two. The time is the FLOPs divided by the GPU's peak FLOP/s
and by the model FLOPs utilization (MFU), which is --cost.mfu or what published code reached on the same networks.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch.utils.flop_counter import FlopCounterMode

from models.costs import Evaluations, LiveBytes, count_parameters, peak_memory, sampling_flops, training_flops
from models.features import Extractor
from models.unet import Architecture


class CostConfig(BaseModel, frozen=True, extra="forbid"):
    """GPUs and prices that --dry-run assumes."""

    gpu: Literal["B200", "H200", "H100", "A100", "L40S", "A10G", "L4", "V100", "T4"] = "H100"  # kind of GPU
    mfu: float | None = Field(None, gt=0, le=1)  # fraction of the GPU's peak FLOP/s (MFU); None = as published
    usd_per_hour: float | None = Field(None, gt=0)  # price of one GPU for one hour in dollars; None = no price
    spot_discount: float = Field(0.0, ge=0, lt=1)  # discount on spot instances, as a fraction of the price


class Gpu(NamedTuple):
    """The data sheet of a GPU."""

    memory: float  # bytes
    half: float  # dense FLOP/s in half precision on tensor cores
    single: float  # FLOP/s in float32 without tensor cores


GPUS = {  # by the end of a word in the driver's name
    "B200": Gpu(180e9, 2250e12, 80e12),
    "H200": Gpu(141e9, 989e12, 67e12),
    "H100": Gpu(80e9, 989e12, 67e12),
    "A100": Gpu(80e9, 312e12, 19.5e12),
    "L40S": Gpu(48e9, 362e12, 91.6e12),
    "A10G": Gpu(24e9, 70e12, 31.2e12),
    "L4": Gpu(24e9, 121e12, 30.3e12),
    "V100": Gpu(32e9, 125e12, 15.7e12),
    "T4": Gpu(16e9, 65e12, 8.1e12),
}


def peak_flops(device: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device by its name, or None if it is unknown."""
    for name, gpu in GPUS.items():
        if re.search(rf"{name}\b", device):
            return gpu.single if dtype == "float32" else gpu.half
    return None


class Mfu(NamedTuple):
    """The fraction of a GPU's peak FLOP/s that published code reached (MFU), and the source of the number."""

    share: float
    source: str


TRAINING = Mfu(0.37, "ADM table 7: 34 to 39% on V100s")
CLASSIFIER_TRAINING = Mfu(0.11, "ADM table 10: 10 to 11% on V100s")
SAMPLING = Mfu(0.21, "arXiv 2112.10752 table 18: ADM-256, 250 steps, 0.12 images/s on an A100")
GUIDED_SAMPLING = Mfu(0.14, "arXiv 2112.10752 table 18: guided ADM-256, 250 steps, 0.07 images/s on an A100")
EXTRACTION = Mfu(0.3, "an assumption; nothing is published")


class Cost(NamedTuple):
    """The cost of a job."""

    images: int
    flops_per_image: float
    memory: dict[str, int]  # bytes on each GPU, by what they are used for
    mfu: Mfu
    note: str  # how FLOPs were counted

    @property
    def flops(self) -> float:
        """Return the FLOPs of the whole job."""
        return self.images * self.flops_per_image


def training_cost(network: Architecture, images: int, memory: dict[str, int]) -> Cost:
    """Return the cost of training on `images` images; memory: bytes on each GPU, by what they are used for."""
    mfu = CLASSIFIER_TRAINING if network.kind == "classifier" else TRAINING
    return Cost(images, training_flops(network), memory, mfu, "three forward passes an image")


def sampling_cost(
    model: Architecture,
    evaluations: Evaluations,
    images: int,
    batch: int,
    half: bool,
    guide: Architecture | None = None,
) -> Cost:
    """Return the cost of sampling `images` images, in batches of `batch` on each GPU.

    guide: the network that guidance evaluates: the classifier, the weaker model or `model` itself.
    """
    networks = [model, guide] if guide and guide is not model else [model]
    activations = [peak_memory(model, "sampling", batch, half)]
    mfu, note = SAMPLING, f"{evaluations.model} evaluations an image"
    if guide and guide.kind == "classifier":
        activations.append(peak_memory(guide, "guiding", batch, half))
        mfu, note = GUIDED_SAMPLING, f"{note}, {evaluations.guide} with the classifier's gradient"
    elif guide:
        note = f"{note}, {evaluations.guide} of the guide beside it"
    memory = {
        "weights": sum(4 * count_parameters(network) for network in networks),
        f"activations of {batch} images": max(activations),
    }
    return Cost(images, sampling_flops(evaluations, model, guide), memory, mfu, note)


def extraction_cost(extractor: Extractor, image_size: int, images: int, batch: int) -> Cost:
    """Return the cost of extracting features of `images` images, from the FLOPs counted on one image."""
    with FlopCounterMode(display=False) as counter, LiveBytes() as live, torch.no_grad():
        extractor(np.zeros((1, image_size, image_size, 3), np.uint8))
    memory = {f"activations of {batch} images": batch * live.peak}
    return Cost(images, float(counter.get_total_flops()), memory, EXTRACTION, f"{extractor.name} counted on an image")


def assumed_mfu(config: CostConfig, published: Mfu) -> Mfu:
    """Return the MFU of the config, or by default the published one."""
    return Mfu(config.mfu, "--cost.mfu") if config.mfu else published


def gpu_seconds(cost: Cost, config: CostConfig, half: bool) -> float:
    """Return the seconds that the job takes on one GPU."""
    gpu = GPUS[config.gpu]
    peak = gpu.half if half else gpu.single
    return cost.flops / (peak * assumed_mfu(config, cost.mfu).share)


def fits(cost: Cost, config: CostConfig) -> bool:
    """Return whether the job fits into the memory of the GPU."""
    return sum(cost.memory.values()) < GPUS[config.gpu].memory


def priced(cost: Cost, config: CostConfig, num_workers: int, num_gpus: float, half: bool) -> str:
    """Return the lines of a dry run about the cost: work, memory, time, money, and the assumptions.

    num_gpus: for each worker; with 0 only the work is estimated, because the speed of CPUs is unknown. half: whether
    the job computes in half precision.
    """
    work = f"work    {cost.flops:.3g} FLOPs: {cost.images:,} images x {cost.flops_per_image / 1e12:.3g} TFLOPs"
    if not num_gpus:
        return (
            f"{work}; 2 FLOPs a multiply-add, {cost.note}\n"
            "time    not estimated for CPUs; --num-gpus 1 estimates it for GPUs"
        )
    gpu, num_workers = GPUS[config.gpu], max(num_workers, 1)
    memory = sum(cost.memory.values())
    parts = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in cost.memory.items())
    excess = "" if fits(cost, config) else ": TOO MUCH, use smaller batches or more workers"
    seconds = gpu_seconds(cost, config, half)
    mfu = assumed_mfu(config, cost.mfu)
    peak = (gpu.half if half else gpu.single) / 1e12
    return "\n".join(
        [
            work,
            f"memory  {memory / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB on each {config.gpu} ({parts}){excess}",
            f"time    {seconds / 3600:,.3g} {config.gpu}-hours = {_duration(seconds / num_workers)} on {num_workers}",
            *money(seconds / 3600, config),
            f"assumed {mfu.share:.0%} of {peak:,.4g} TFLOP/s in {'half precision' if half else 'float32'} "
            f"({mfu.source}); 2 FLOPs a multiply-add, {cost.note}; no time for data, checkpoints, communication",
        ]
    )


def money(gpu_hours: float, config: CostConfig) -> list[str]:
    """Return the line of a dry run with the price of GPU-hours, or an empty list if the config has no price."""
    if config.usd_per_hour is None:
        return []
    dollars = gpu_hours * config.usd_per_hour
    rate = f"${config.usd_per_hour:g} for a {config.gpu}-hour"
    if not config.spot_discount:
        return [f"money   ${dollars:,.2f}, by {rate}"]
    on_spot = f"${dollars * (1 - config.spot_discount):,.2f} on spot instances"
    return [f"money   ${dollars:,.2f}, {on_spot}, by {rate} less {config.spot_discount:.0%} on spot"]


def not_there_yet(uris: Sequence[str]) -> list[str]:
    """Return the line of a dry run that names missing inputs, or an empty list if there are none."""
    return [f"not there yet: {', '.join(uris)}"] if uris else []


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
