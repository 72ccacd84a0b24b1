"""Sample from networks: load them, fingerprint what determines the samples, and draw canonical batches."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from models import zoo
from models.costs import Use, count_parameters, peak_memory
from models.diffusion import Diffusion
from models.guidance import WHOLE_CHAIN, GuidanceConfig, GuidanceKind, Guided, guided_denoiser, guided_timesteps
from models.images import Rounding, from_uint8, to_uint8
from models.samplers import (
    EDM_FIELDS,
    SamplerConfig,
    evaluated_timesteps,
    final_x,
    noise_timesteps,
    respacing_for,
    sample,
)
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
LARGEST_BATCH = 256  # most images in a batch on a GPU
MEMORY_SHARE = 0.7  # fraction of a GPU's memory that the counted tensors may use
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
        """Return the names of the classes that condition the samples, in the order of the labels; () without any."""
        if self.classifier or self.weights.architecture.num_classes:
            return (self.classifier or self.weights).classes
        return ()  # the weights name the classes of their dataset too

    @property
    def loaded(self) -> list[Network]:
        """Return all networks that are not imported."""
        networks = (self.weights, self.classifier, self.upsampler, self.weak)
        return [network for network in networks if isinstance(network, Network)]

    def guide(self, kind: GuidanceKind) -> Network | ImportedClassifier | None:
        """Return the network that a kind of guidance evaluates beside the model, or None."""
        guides = {"classifier": self.classifier, "classifier_free": self.weights, "auto": self.weak}
        return guides.get(kind)


def load_networks(config: GenerationConfig, device: torch.device | str) -> Networks:
    """Load the networks of a generation.

    Raises:
        FileNotFoundError: weights do not exist.
        ValueError: the networks do not fit each other or the config.
    """

    def load(path: str, recipe: str | None = None) -> Network:
        return load_network(config.path(path), device, recipe if path.endswith(".pt") else None)

    model = load(weights_file(config.weights, config.path, kind=config.ema, at=config.at), config.recipe)
    recipe = zoo.entry(config.recipe).recipe if config.recipe else None
    upsampler = load(config.upsampler) if config.upsampler else None
    image_size = model.architecture.image_size
    classifier: Network | ImportedClassifier | None = None
    if config.classifier and is_imported(config.classifier):
        classifier = import_classifier(config.classifier, model.architecture.in_channels, image_size, device)
    elif config.classifier:
        classifier = load(config.classifier, recipe.classifier if recipe else None)
    weak = load(config.guidance.weak_weights) if config.guidance.weak_weights else None
    networks = Networks(model, classifier, upsampler, Labels(0, config.seed), weak)
    _check_guidance(config, model, weak)
    _check_fit(config, networks)
    return networks._replace(labels=read_labels(config.labels, networks.classes, config.seed, config.path))


def _check_fit(config: GenerationConfig, networks: Networks) -> None:
    """Raise ValueError unless the networks are for the same images and classes."""
    model, weights = networks.weights.architecture, f"--weights {config.weights}"
    labels_from = f"--classifier {config.classifier}" if networks.classifier else weights
    for option, network, size in (
        (weights, networks.weights, "image_size"),
        (f"--classifier {config.classifier}", networks.classifier, "image_size"),
        (f"--upsampler {config.upsampler}", networks.upsampler, "low_res_size"),
        (f"--guidance.weak-weights {config.guidance.weak_weights}", networks.weak, "image_size"),
    ):
        if isinstance(network, Network):
            own = network.architecture
            if (getattr(own, size, None), own.in_channels) != (model.image_size, model.in_channels):
                raise ValueError(
                    f"{option} is not for images of {model.image_size} pixels with {model.in_channels} channels, as "
                    f"{weights} generates them; pass a network that was trained on such images"
                )
        if network is None or (isinstance(network, Network) and not network.architecture.num_classes):
            continue
        if not networks.classes:
            raise ValueError(f"{option} needs labels, but {weights} has no classes; pass networks without classes")
        if network.classes != networks.classes:
            raise ValueError(
                f"{option} and {labels_from} were trained on different classes; pass networks that were trained on one "
                "dataset"
            )


class SamplingWorker:
    """The device of a worker, and the networks of a generation on it."""

    def __init__(self, config: GenerationConfig) -> None:
        self.device = prepare_device(config.num_gpus, config.num_threads, config.tf32)
        self.networks = load_networks(config, self.device)
        for network in self.networks.loaded:
            lay_out(network, self.device, config.dtype)

    def compile(self) -> None:
        """Compile the networks with torch.compile, which does its work in the first batch."""
        for network in self.networks.loaded:
            compile_blocks(network.module)


def _check_guidance(config: GenerationConfig, model: Network, weak: Network | None) -> None:
    """Raise ValueError unless the networks can guide as the config says."""
    kind, architecture = config.guidance.kind, model.architecture
    guided = guided_timesteps(config.guidance.interval, model.diffusion.num_timesteps)
    if config.guidance.scale and set(guided).isdisjoint(evaluated_timesteps(config.sampler, model.diffusion)):
        low, high = config.guidance.interval
        raise ValueError(
            f"--guidance.interval {low},{high} contains none of the {config.sampler.num_steps} steps, so it has no "
            "effect; pass a wider interval"
        )
    if config.guidance.scale and kind == "classifier_free" and not getattr(architecture, "null_class", False):
        raise ValueError(
            "--guidance.kind classifier_free needs a model that was trained with --label-dropout, but --weights "
            f"{config.weights} was not: fine-tune it with --init-from and --label-dropout 0.1, or pass another "
            "--guidance.kind"
        )
    if weak is not None:
        fields = ("image_size", "num_classes", "low_res_size")
        weak_fields = {name: getattr(weak.architecture, name, None) for name in fields}
        differing = [name for name in fields if getattr(architecture, name, None) != weak_fields[name]]
        differing += ["diffusion"] if model.diffusion != weak.diffusion else []
        if differing:
            raise ValueError(
                f"--guidance.weak-weights {config.guidance.weak_weights} and --weights {config.weights} differ in "
                f"{', '.join(differing)}; pass an earlier snapshot of the model, or a smaller model with the same "
                "diffusion process"
            )


def fingerprint(config: GenerationConfig, networks: Networks) -> dict[str, Any]:
    """Return everything that determines the samples except the platform, with B only if the config sets it.

    Networks and a file of labels are represented by their SHA-256.
    """
    fields = config.fingerprint()
    del fields["num_samples"], fields["guidance"]["weak_weights"]  # the hash of the weaker model is added below
    if not config.batch_size:
        del fields["batch_size"]
    if not config.upsampler:
        del fields["upsampling"]
    _drop_newer_defaults(fields)
    loaded = {"weights": networks.weights, "classifier": networks.classifier, "upsampler": networks.upsampler}
    loaded |= {"weak_weights": networks.weak} if networks.weak else {}
    hashes = {name: network.sha256 if network else None for name, network in loaded.items()}
    labels = networks.labels.sha256 or config.labels
    return {**fields, **hashes, "labels": labels, "numerics_version": NUMERICS_VERSION}


def _drop_newer_defaults(fields: dict[str, Any]) -> None:
    """Remove newer fields with default values, so that folders from before these fields existed can be continued."""
    for name in {"sampler", "upsampling"} & fields.keys():
        if fields[name]["name"] != "edm":
            fields[name] = {field: value for field, value in fields[name].items() if field not in EDM_FIELDS}
    if fields["guidance"]["kind"] == "classifier":
        del fields["guidance"]["kind"]
    if not fields["tf32"]:
        del fields["tf32"]


# ------------------------------------------------------------------------------------------------ the canonical batch


def canonical_batch(config: GenerationConfig, networks: Networks, device: torch.device) -> int:
    """Return a batch size B for a config that leaves it open: a power of two that divides `shard_size`.

    On a GPU it follows from the counted memory, so it is equal on all GPUs of a kind. On a CPU it is at most CPU_BATCH,
    and a batch has at most CPU_PIXELS pixels.

    Raises:
        RuntimeError: not even one image fits into the GPU's memory.
    """
    most = config.shard_size & -config.shard_size  # the largest power of two that divides shard_size
    if device.type == "cpu":
        size = (networks.upsampler or networks.weights).architecture.image_size
        return max(1, min(most, CPU_BATCH, 2 ** int(np.log2(CPU_PIXELS / size**2))))
    size = counted_batch(config, networks, torch.cuda.get_device_properties(device).total_memory, most)
    return verified_batch(size, partial(_two_steps, networks, config))


def counted_batch(config: GenerationConfig, networks: Networks, memory: float, most: int) -> int:
    """Return the largest B for which sampling needs at most MEMORY_SHARE of `memory` bytes, or 1 if there is none.

    B is a power of two up to `most`, which is one as well, and up to LARGEST_BATCH. The rest of the memory is for
    workspaces of convolutions and fragmentation, which are not counted.
    """
    uses: list[tuple[Network | None, Use]] = [(networks.weights, "sampling"), (networks.upsampler, "sampling")]
    guide = networks.guide(config.guidance.kind)
    # The memory of an imported classifier cannot be counted; `verified_batch` includes it.
    if config.guidance.scale and isinstance(guide, Network):
        uses.append((guide, "guiding" if config.guidance.kind == "classifier" else "sampling"))
    weight_bytes = sum(4 * count_parameters(network.architecture) for network in networks.loaded)
    half, size = config.dtype != "float32", min(most, LARGEST_BATCH)
    while size > 1:
        peaks = [peak_memory(network.architecture, use, size, half) for network, use in uses if network]
        if weight_bytes + max(peaks) <= MEMORY_SHARE * memory:
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
            raise RuntimeError(
                "not even one image fits into the GPU's memory; pass --dtype bfloat16, or use a GPU with more memory"
            )
        log.warning(
            "a batch of %d images does not fit into the GPU's memory although its estimate does; the job continues "
            "with half as many",
            size,
        )
        size //= 2


def _two_steps(networks: Networks, config: GenerationConfig, size: int) -> None:
    """Draw two guided steps of each stage for a batch of `size` images."""
    two_steps = {"num_steps": 2, "respacing": None}
    changes = {
        "sampler": config.sampler.model_copy(update=two_steps),
        "upsampling": config.upsampling.model_copy(update=two_steps),
        "guidance": config.guidance.model_copy(update={"interval": WHOLE_CHAIN}),
        "batch_size": size,
    }
    make_batch(networks, config.model_copy(update=changes), 0)


# ------------------------------------------------------------------------------------------------ batches


def make_batch(networks: Networks, config: GenerationConfig, number: int) -> tuple[Samples, ...]:
    """Return the samples of the canonical batch `number` in each stage: one, or two in a cascade (ADM section 5).

    Batch k has the indices [k B, (k + 1) B), even if the generation has fewer samples. So an index is always drawn in
    the same batch, and another batch size would change the last bits.
    """
    indices = np.arange(number * config.batch_size, (number + 1) * config.batch_size)
    labels = networks.labels(indices)
    draw_stage = partial(
        sample_batch, indices=indices, labels=labels, seed=config.seed, clip=config.clip, rounding=config.rounding
    )
    with autocast(networks.weights.device, config.dtype):
        guide = networks.guide(config.guidance.kind)
        images = draw_stage(networks.weights, config.sampler, guide=guide, guidance=config.guidance)
        stages = [Samples(indices, labels, images)]
        if networks.upsampler:
            enlarged = draw_stage(networks.upsampler, config.upsampling, low_res=images)
            stages.append(Samples(indices, labels, enlarged))
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

    labels: used if the network is class-conditional or guided by a classifier.
    guide: the network that `Networks.guide` returns for the kind of guidance.
    low_res: the images that an upsampler enlarges, uint8 [n, h, w, 3].
    clip: clamp the predicted x_0 to [-1, 1].

    Raises:
        FloatingPointError: samples are not finite.
    """
    architecture, device = network.architecture, network.device
    diffusion = Diffusion(network.diffusion, respacing_for(sampler, network.diffusion.num_timesteps))
    y = torch.from_numpy(labels).to(device)
    low_res_x = None if low_res is None else from_uint8(torch.from_numpy(low_res).to(device), architecture.in_channels)
    chain = Guided(
        network.module, y, bool(architecture.num_classes), low_res_x, clip, null_label=architecture.num_classes,
        guide=guide.towards(y) if guide else None,
    )  # fmt: skip
    denoise = guided_denoiser(chain, diffusion, sampler.name, guidance if guide and guidance else GuidanceConfig())
    # The stages of a cascade use independent noise.
    start, step = Purpose.START, Purpose.STEP
    if architecture.low_res_size:
        start, step = Purpose.UPSAMPLE_START, Purpose.UPSAMPLE_STEP
    shape = (architecture.in_channels, architecture.image_size, architecture.image_size)
    key = partial(Draw, tuple(indices.tolist()), shape)
    plan = [key(start), *(key(step, t) for t in noise_timesteps(sampler, diffusion))]
    with noise_ahead(seed, plan, pin=device.type == "cuda") as noise:
        x_T = noise(key(start)).to(device, non_blocking=True)
        steps = sample(sampler, denoise, diffusion, x_T, lambda t: noise(key(step, t)).to(device, non_blocking=True))
        x = final_x(steps)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"samples {indices[0]} to {indices[-1]} are not finite")
    return to_uint8(x, rounding).cpu().numpy()
