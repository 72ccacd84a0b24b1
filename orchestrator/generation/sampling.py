"""Sampling: the networks of a generation, its fingerprint, and canonical batches."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from models import zoo
from models.costs import Use, count_parameters, peak_memory
from models.diffusion import Diffusion
from models.guidance import WHOLE_CHAIN, GuidanceConfig, GuidanceKind, Guided, guided_denoiser
from models.images import Rounding, from_uint8, to_uint8
from models.samplers import EDM_FIELDS, SamplerConfig, final_x, noise_timesteps, respacing_for, sample
from models.unet import autocast, compile_blocks
from orchestrator.arithmetic import is_out_of_memory, prepare_device
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.labels import Labels, read_labels
from orchestrator.generation.noise import Draw, noise_ahead
from orchestrator.generation.samples import Samples
from orchestrator.order import Purpose
from orchestrator.weights.imported import ImportedClassifier, import_classifier, is_imported
from orchestrator.weights.network import Network, lay_out, load_network, weights_file

NUMERICS_VERSION = 1  # raised by hand if a change of the code gives other samples for the same config
LARGEST_BATCH = 256  # images on a GPU
MEMORY_SHARE = 0.7  # fraction of a GPU's memory for what is counted
CPU_BATCH = 64  # most images in a batch on a CPU
CPU_PIXELS = 2**18  # most pixels in a batch on a CPU

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ networks


class Networks(NamedTuple):
    """The networks and labels of a generation."""

    weights: Network
    classifier: Network | ImportedClassifier | None
    upsampler: Network | None
    labels: Labels
    weak: Network | None = None  # the weaker model of autoguidance

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes that condition the samples, in the order of the labels."""
        return (self.classifier or self.weights).classes

    @property
    def loaded(self) -> list[Network]:
        """Return all networks that are not imported."""
        networks = (self.weights, self.classifier, self.upsampler, self.weak)
        return [network for network in networks if isinstance(network, Network)]

    def guide(self, kind: GuidanceKind) -> Network | ImportedClassifier | None:
        """Return the network that a kind of guidance evaluates beside the model."""
        guides = {"classifier": self.classifier, "classifier_free": self.weights, "auto": self.weak}
        return guides.get(kind)


def load_networks(config: GenerationConfig, device: torch.device | str) -> Networks:
    """Load the networks of a generation.

    Raises:
        FileNotFoundError: weights do not exist.
        ValueError: the networks do not fit each other or the config.
    """

    def load(path: str | None, recipe: str | None = None) -> Network | None:
        return load_network(config.path(path), device, recipe if path.endswith(".pt") else None) if path else None

    weights = config.path(weights_file(config.weights, config.path, kind=config.ema, at=config.at))
    model = load_network(weights, device, config.recipe if weights.endswith(".pt") else None)
    recipe = zoo.entry(config.recipe).recipe if config.recipe else None
    upsampler, size = load(config.upsampler), model.architecture.image_size
    classifier: Network | ImportedClassifier | None
    if config.classifier and is_imported(config.classifier):
        classifier = import_classifier(config.classifier, model.architecture.in_channels, size, device)
    else:
        classifier = load(config.classifier, recipe.classifier if recipe else None)
    if isinstance(classifier, Network) and classifier.architecture.image_size != size:
        raise ValueError(
            f"--classifier {config.classifier} is for {classifier.architecture.image_size} pixels, samples have {size}"
        )
    if upsampler and upsampler.architecture.low_res_size != size:
        raise ValueError(
            f"--upsampler {config.upsampler} is not an upsampler for images of {size} pixels, the size of the samples"
        )
    for other, path in ((classifier, config.classifier), (upsampler, config.upsampler)):
        if other and other.classes and model.architecture.num_classes and other.classes != model.classes:
            raise ValueError(f"{path} and {config.weights} were trained on different classes")
    weak = load(config.guidance.weak_weights)
    _check_guidance(config, model, weak)
    classes = (classifier or model).classes
    return Networks(model, classifier, upsampler, read_labels(config.labels, classes, config.seed, config.path), weak)


class SamplingWorker:
    """The device and the networks of a generation, in a worker of generation or search."""

    def __init__(self, config: GenerationConfig) -> None:
        self.device = prepare_device(config.num_gpus, config.num_threads, config.tf32)
        self.networks = load_networks(config, self.device)
        for network in self.networks.loaded:
            lay_out(network, self.device, config.dtype)

    def compile(self) -> None:
        """Compile the networks, which happens in the first batch."""
        for network in self.networks.loaded:
            compile_blocks(network.module)


def _check_guidance(config: GenerationConfig, model: Network, weak: Network | None) -> None:
    """Raise ValueError unless the networks can guide as the config says."""
    kind, architecture = config.guidance.kind, model.architecture
    if config.guidance.scale and kind == "classifier_free" and not getattr(architecture, "null_class", False):
        raise ValueError(
            f"guidance.kind=classifier_free needs a model that was trained with --label-dropout, and {config.weights} "
            "was not: fine-tune it (--init-from, --label-dropout 0.1), or choose another kind"
        )
    if weak is not None:
        fields = ("image_size", "in_channels", "num_classes", "low_res_size")
        model_fields, weak_fields = (
            {name: getattr(network.architecture, name, None) for name in fields} | {"diffusion": network.diffusion}
            for network in (model, weak)
        )
        if differing := [name for name in model_fields if model_fields[name] != weak_fields[name]]:
            raise ValueError(
                f"guidance.weak_weights={config.guidance.weak_weights} and {config.weights} differ in "
                f"{', '.join(differing)}; a weaker model is an earlier snapshot, or a smaller one of the same diffusion"
            )


def fingerprint(config: GenerationConfig, networks: Networks) -> dict[str, Any]:
    """Return everything that decides the samples except the platform, with B only if the config sets it."""
    chosen = config.fingerprint()
    del chosen["num_samples"], chosen["guidance"]["weak_weights"]  # the weaker model counts by its hash
    if not config.batch_size:
        del chosen["batch_size"]
    if not config.upsampler:
        del chosen["upsampling"]
    _leave_out_later_defaults(chosen)
    stages = {"weights": networks.weights, "classifier": networks.classifier, "upsampler": networks.upsampler}
    stages |= {"weak_weights": networks.weak} if networks.weak else {}
    hashes = {name: network.sha256 if network else None for name, network in stages.items()}
    labels = networks.labels.sha256 or config.labels
    return {**chosen, **hashes, "labels": labels, "numerics_version": NUMERICS_VERSION}


def _leave_out_later_defaults(chosen: dict[str, Any]) -> None:
    """Remove newer fields with default values, so that folders from before these fields existed can be continued."""
    for name in {"sampler", "upsampling"} & chosen.keys():
        if chosen[name]["name"] != "edm":
            chosen[name] = {field: value for field, value in chosen[name].items() if field not in EDM_FIELDS}
    if chosen["guidance"]["kind"] == "classifier":
        del chosen["guidance"]["kind"]
    if not chosen["tf32"]:
        del chosen["tf32"]


# ------------------------------------------------------------------------------------------------ the canonical batch


def canonical_batch(config: GenerationConfig, networks: Networks, device: torch.device) -> int:
    """Return the batch size B, if the config leaves it open, from the counted memory of a GPU or by a rule for CPUs.

    It is equal on all GPUs of a kind. On a CPU it is 64, or fewer so that a batch has at most 2^18 pixels.

    Raises:
        RuntimeError: not even one image fits into the GPU's memory.
    """
    most = config.shard_size & -config.shard_size  # the largest power of two that divides it
    if device.type == "cpu":
        size = (networks.upsampler or networks.weights).architecture.image_size
        return max(1, min(most, CPU_BATCH, 2 ** int(np.log2(CPU_PIXELS / size**2))))
    size = counted_batch(config, networks, torch.cuda.get_device_properties(device).total_memory, most)
    return verified_batch(size, partial(_two_steps, networks, config))


def counted_batch(config: GenerationConfig, networks: Networks, memory: float, most: int) -> int:
    """Return the largest power of two up to `most` and 256 for which sampling needs at most 70% of `memory` bytes.

    The rest is for workspaces of convolutions and fragmentation, which are not counted.
    """
    uses: list[tuple[Network | None, Use]] = [(networks.weights, "sampling"), (networks.upsampler, "sampling")]
    guide = networks.guide(config.guidance.kind)
    if config.guidance.scale and isinstance(guide, Network):  # an imported classifier is tried, but not counted
        uses.append((guide, "guiding" if config.guidance.kind == "classifier" else "sampling"))
    kept = sum(4 * count_parameters(network.architecture) for network in networks.loaded)
    half, size = config.dtype != "float32", min(most, LARGEST_BATCH)
    while size > 1:
        peaks = [peak_memory(network.architecture, use, size, half) for network, use in uses if network]
        if kept + max(peaks) <= MEMORY_SHARE * memory:
            break
        size //= 2
    return size


def verified_batch(size: int, draw: Callable[[int], object]) -> int:
    """Halve `size` until `draw(size)` does not run out of memory, and return it.

    Raises:
        RuntimeError: not even one image fits into the GPU's memory, or `draw` fails for another reason.
    """
    while True:
        try:
            draw(size)
            return size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if size == 1:
            raise RuntimeError("not even one image fits into the GPU's memory")
        log.warning(
            "a batch of %d images does not fit into the GPU's memory although its estimate does; trying half of it",
            size,
        )
        size //= 2


def _two_steps(networks: Networks, config: GenerationConfig, size: int) -> None:
    """Draw two guided steps of each stage for a batch of `size` images."""
    short = {
        "sampler": config.sampler.model_copy(update={"num_steps": 2, "respacing": None}),
        "upsampling": config.upsampling.model_copy(update={"num_steps": 2, "respacing": None}),
        "guidance": config.guidance.model_copy(update={"interval": WHOLE_CHAIN}),
    }
    make_batch(networks, config.model_copy(update={**short, "batch_size": size}), 0)


# ------------------------------------------------------------------------------------------------ batches


def make_batch(networks: Networks, config: GenerationConfig, number: int) -> tuple[Samples, ...]:
    """Return the samples of the canonical batch `number` in each stage: one, or two in a cascade (ADM section 5).

    A batch always has B indices, so that an index is always drawn in the same batch shape.
    """
    indices = np.arange(number * config.batch_size, (number + 1) * config.batch_size)
    labels = networks.labels(indices)
    draw = partial(
        sample_batch, indices=indices, labels=labels, seed=config.seed, clip=config.clip, rounding=config.rounding
    )
    with autocast(networks.weights.device, config.dtype):
        guide = networks.guide(config.guidance.kind)
        images = draw(networks.weights, config.sampler, guide=guide, guidance=config.guidance)
        stages = [Samples(indices, labels, images)]
        if networks.upsampler:
            stages.append(Samples(indices, labels, draw(networks.upsampler, config.upsampling, low_res=images)))
    return tuple(stages)


@torch.no_grad()
def sample_batch(
    network: Network,
    sampler: SamplerConfig,
    indices: np.ndarray,
    labels: np.ndarray,
    seed: int,
    guide: Network | ImportedClassifier | None = None,
    guidance: GuidanceConfig | None = None,
    low_res: np.ndarray | None = None,
    clip: bool = True,
    rounding: Rounding = "truncate",
) -> np.ndarray:
    """Draw the samples of `indices` int64 [n] with `labels` int64 [n]; return them as uint8 [n, H, W, 3].

    x_T and the step noise of a sample depend only on (seed, index, original timestep). Threads draw the noise of later
    steps ahead.

    labels: used if the network is class-conditional or guided by a classifier. guide: the network that `Networks.guide`
    returns for the kind of guidance. low_res: uint8 [n, h, w, 3], the images that an upsampler enlarges. clip: clamp
    the predicted x_0 to [-1, 1].

    Raises:
        FloatingPointError: samples are not finite.
    """
    architecture, device = network.architecture, network.device
    diffusion = Diffusion(network.diffusion, respacing_for(sampler, network.diffusion.num_timesteps))
    y = torch.from_numpy(labels).to(device)
    small = None if low_res is None else from_uint8(torch.from_numpy(low_res).to(device), architecture.in_channels)
    chain = Guided(
        network.module, y, bool(architecture.num_classes), small, clip, null_label=architecture.num_classes,
        guide=guide.towards(y) if guide else None,
    )  # fmt: skip
    denoise = guided_denoiser(chain, diffusion, sampler.name, guidance if guide and guidance else GuidanceConfig())
    start, step = (
        (Purpose.UPSAMPLE_START, Purpose.UPSAMPLE_STEP) if architecture.low_res_size else (Purpose.START, Purpose.STEP)
    )
    key = partial(
        Draw, tuple(indices.tolist()), (architecture.in_channels, architecture.image_size, architecture.image_size)
    )
    plan = [key(start), *(key(step, t) for t in noise_timesteps(sampler, diffusion))]
    with noise_ahead(seed, plan, pin=device.type == "cuda") as noise:
        x_T = noise(key(start)).to(device, non_blocking=True)
        steps = sample(sampler, denoise, diffusion, x_T, lambda t: noise(key(step, t)).to(device, non_blocking=True))
        x = final_x(steps)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"samples {indices[0]} to {indices[-1]} are not finite")
    return to_uint8(x, rounding).cpu().numpy()
