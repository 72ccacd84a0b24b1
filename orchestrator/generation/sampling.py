"""Sampling: what decides a sample, and how a canonical batch of them is drawn."""

import platform as machine
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from models import zoo
from models.diffusion import Diffusion
from models.guidance import WHOLE_CHAIN, GuidanceConfig, guided
from models.images import Rounding, from_uint8, to_uint8
from models.samplers import SamplerConfig, final_x, noise_timesteps, respacing_for, sample
from models.unet import autocast
from orchestrator.config import OPERATIONAL
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.labels import Labels, read_labels
from orchestrator.generation.noise import Draw, DrawNoise, draw_noise
from orchestrator.generation.samples import Samples
from orchestrator.order import Purpose
from orchestrator.weights.network import Network, load_network, weights_file

NUMERICS_VERSION = 1  # raised by hand when the same config begins to give other samples
LARGEST_BATCH = 512  # that is tried on a GPU
CPU_BATCH = 64  # images, fewer where these would have more than
CPU_PIXELS = 2**18  # pixels
NEARLY = 0.95  # a batch is as fast as the fastest from this share of its rate on


# ------------------------------------------------------------------------------------------------ networks


class Networks(NamedTuple):
    """What sampling needs."""

    weights: Network
    classifier: Network | None
    upsampler: Network | None
    labels: Labels

    @property
    def num_classes(self) -> int:
        """Classes that a sample can be of; 0 where nothing conditions it."""
        return self.labels.num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes that condition the samples, in the order of the labels."""
        return (self.classifier or self.weights).classes

    @property
    def loaded(self) -> list[Network]:
        """Return those that there are."""
        return [network for network in (self.weights, self.classifier, self.upsampler) if network]


def load_networks(config: GenerationConfig, device: torch.device | str) -> Networks:
    """Read and check them.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: they do not fit each other.
    """

    def load(path: str | None, recipe: str | None = None) -> Network | None:
        return load_network(config.path(path), device, recipe if path.endswith(".pt") else None) if path else None

    weights = config.path(weights_file(config.weights, config.path, kind=config.ema))
    model = load_network(weights, device, config.recipe if weights.endswith(".pt") else None)
    recipes = zoo.entry(config.recipe).recipes if config.recipe else ()
    classifier = load(config.classifier, recipes[0].classifier if recipes else None)
    upsampler = load(config.upsampler)
    size = model.architecture.image_size
    if classifier and classifier.architecture.image_size != size:
        raise ValueError(
            f"{config.classifier} sees {classifier.architecture.image_size} pixels, but samples have {size}"
        )
    if upsampler and upsampler.architecture.low_res_size != size:
        raise ValueError(f"{config.upsampler} is no upsampler of images of {size} pixels, which the samples have")
    for other, path in ((classifier, config.classifier), (upsampler, config.upsampler)):
        if other and other.classes and model.architecture.num_classes and other.classes != model.classes:
            raise ValueError(f"{path} and {config.weights} were trained on different classes")
    classes = (classifier or model).classes
    return Networks(model, classifier, upsampler, read_labels(config.labels, classes, config.seed, config.path))


def fingerprint(config: GenerationConfig, networks: Networks) -> dict[str, Any]:
    """All that decides the samples, but for the platform; B only where the config says it."""
    unused = {"batch_size"} if not config.batch_size else set()
    unused |= {"upsampling"} if not config.upsampler else set()
    chosen = config.model_dump(mode="json", exclude=OPERATIONAL | config.operational | unused)
    stages = {"weights": networks.weights, "classifier": networks.classifier, "upsampler": networks.upsampler}
    hashes = {name: network.sha256 if network else None for name, network in stages.items()}
    labels = {"labels": networks.labels.sha256 or config.labels}
    return {**chosen, **hashes, **labels, "numerics_version": NUMERICS_VERSION}


def platform(device: torch.device) -> dict[str, Any]:
    """The kind of device and software on which pixels are equal to the bit."""
    software = {"torch": torch.__version__, "numpy": np.__version__}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **software}
    kind = f"{machine.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": kind, "threads": torch.get_num_threads(), **software}


# ------------------------------------------------------------------------------------------------ the canonical batch


def canonical_batch(config: GenerationConfig, networks: Networks, device: torch.device) -> int:
    """B, where the config leaves it open: on a GPU the fastest, on a CPU 64 or as many as have 2^18 pixels."""
    most = config.shard_size & -config.shard_size  # B must divide it; powers of two do up to here
    if device.type == "cpu":
        size = (networks.upsampler or networks.weights).architecture.image_size
        return max(1, min(most, CPU_BATCH, 2 ** int(np.log2(CPU_PIXELS / size**2))))
    sizes = [2**k for k in range(10) if 2**k <= min(most, LARGEST_BATCH)]
    return fastest(sizes, partial(_seconds, networks, config))


def fastest(sizes: Iterable[int], seconds: Callable[[int], float]) -> int:
    """The least batch size that gives nearly as many images a second as the best of those that fit.

    Raises:
        RuntimeError: not one fits into memory.
    """
    rates: dict[int, float] = {}
    for size in sizes:
        try:
            rates[size] = size / seconds(size)
        except torch.OutOfMemoryError:
            break
    if not rates:
        raise RuntimeError("not even one image fits into the GPU's memory")
    return min(size for size, rate in rates.items() if rate >= NEARLY * max(rates.values()))


def _seconds(networks: Networks, config: GenerationConfig, size: int) -> float:
    """How long a batch of `size` takes, judged by two steps of each stage, guided ones."""

    def draw(sampler: SamplerConfig, low_res: np.ndarray | None, network: Network) -> tuple[np.ndarray, float]:
        short = sampler.model_copy(update={"num_steps": 2, "respacing": None})
        guidance = config.guidance.model_copy(update={"interval": WHOLE_CHAIN})
        indices, labels = np.arange(size), networks.labels(np.arange(size))
        classifier = None if low_res is not None else networks.classifier
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            with autocast(network.device, config.dtype):
                images = sample_batch(network, short, indices, labels, 0, classifier, guidance, low_res)
            seconds = time.perf_counter() - begin
        return images, seconds * sampler.num_steps / 2

    images, seconds = draw(config.sampler, None, networks.weights)
    if networks.upsampler is not None:
        seconds += draw(config.upsampling, images, networks.upsampler)[1]
    return seconds


# ------------------------------------------------------------------------------------------------ batches


def make_batch(networks: Networks, config: GenerationConfig, number: int, draw: DrawNoise | None = None) -> Samples:
    """The canonical batch `number`: always B whole indices, so that an index never sees another batch shape."""
    indices = _indices(config, number)
    labels = networks.labels(indices)
    with autocast(networks.weights.device, config.dtype):
        images = sample_batch(
            networks.weights, config.sampler, indices, labels, config.seed, networks.classifier, config.guidance,
            clip=config.clip, rounding=config.rounding, draw=draw,
        )  # fmt: skip
    return Samples(indices, labels, images)


def upsample_batch(
    upsampler: Network, config: GenerationConfig, batch: Samples, draw: DrawNoise | None = None
) -> Samples:
    """The second stage of a cascade (ADM section 5): a canonical batch of samples enlarged, with noise of its own."""
    with autocast(upsampler.device, config.dtype):
        images = sample_batch(
            upsampler, config.upsampling, batch.indices, batch.labels, config.seed, low_res=batch.images,
            clip=config.clip, rounding=config.rounding, draw=draw,
        )  # fmt: skip
    return Samples(batch.indices, batch.labels, images)


def noise_plan(networks: Networks, config: GenerationConfig, numbers: Iterable[int]) -> Iterator[Draw]:
    """What the canonical batches `numbers` will draw, in order; each one's second stage comes right after it."""
    for number in numbers:
        for network, sampler in ((networks.weights, config.sampler), (networks.upsampler, config.upsampling)):
            if network is not None:
                key = partial(Draw, tuple(_indices(config, number).tolist()), _shape(network))
                start, step = _purposes(network)
                yield key(start)
                yield from (key(step, t) for t in noise_timesteps(sampler, _chain(network, sampler)))


def _indices(config: GenerationConfig, number: int) -> np.ndarray:
    return np.arange(number * config.batch_size, (number + 1) * config.batch_size)


def _shape(network: Network) -> tuple[int, int, int]:
    architecture = network.architecture
    return architecture.in_channels, architecture.image_size, architecture.image_size


def _purposes(network: Network) -> tuple[Purpose, Purpose]:
    if network.architecture.low_res_size:
        return Purpose.UPSAMPLE_START, Purpose.UPSAMPLE_STEP
    return Purpose.START, Purpose.STEP


def _chain(network: Network, sampler: SamplerConfig) -> Diffusion:
    return Diffusion(network.diffusion, respacing_for(sampler, network.diffusion.num_timesteps))


@torch.no_grad()
def sample_batch(
    network: Network,
    sampler: SamplerConfig,
    indices: np.ndarray,
    labels: np.ndarray,
    seed: int,
    classifier: Network | None = None,
    guidance: GuidanceConfig | None = None,
    low_res: np.ndarray | None = None,
    clip: bool = True,
    rounding: Rounding = "truncate",
    draw: DrawNoise | None = None,
) -> np.ndarray:
    """Sample the images of `indices` int64 [n] towards `labels` int64 [n]; uint8 [n, H, W, 3].

    x_T and step noise of an image depend on (seed, index, original timestep) only. Labels count where the network is
    conditional, or guided by `classifier`; `low_res` uint8 [n, h, w, 3] is what an upsampler enlarges. `clip` clamps
    the predicted x_0; `draw` is where noise of this seed comes from, if it is drawn ahead.

    Raises:
        FloatingPointError: a chain left the finite numbers.
    """
    architecture, diffusion = network.architecture, _chain(network, sampler)
    device = network.device
    key = partial(Draw, tuple(indices.tolist()), _shape(network))
    start, step = _purposes(network)
    draw = draw or partial(draw_noise, seed)
    y = torch.from_numpy(labels).to(device)
    small = None if low_res is None else from_uint8(torch.from_numpy(low_res).to(device), architecture.in_channels)
    denoise = diffusion.denoiser(network.module, y=y if architecture.num_classes else None, low_res=small, clip=clip)
    if classifier is not None and guidance is not None:
        denoise = guided(denoise, sampler.name, classifier.module, diffusion, y, guidance)
    x_T = draw(key(start)).to(device, non_blocking=True)
    chain = sample(sampler, denoise, diffusion, x_T, lambda t: draw(key(step, t)).to(device, non_blocking=True))
    x = final_x(chain)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"samples {indices[0]} to {indices[-1]} hold values that are not finite")
    return to_uint8(x, rounding).cpu().numpy()
