"""Sampling: what decides a sample, and how a canonical batch of them is drawn."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
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
from models.unet import autocast
from orchestrator.config import OPERATIONAL
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.labels import Labels, read_labels
from orchestrator.generation.noise import Draw, DrawNoise, draw_noise
from orchestrator.generation.samples import Samples
from orchestrator.order import Purpose
from orchestrator.weights.imported import ImportedClassifier, import_classifier, is_imported
from orchestrator.weights.network import Network, load_network, weights_file

NUMERICS_VERSION = 1  # raised by hand when the same config begins to give other samples
LARGEST_BATCH = 256  # images on a GPU
MEMORY_SHARE = 0.7  # of a GPU's memory that what is counted may take
OUT_OF_MEMORY = re.compile("(?i)out of memory|STATUS_ALLOC_FAILED|unable to find an engine")  # CUDA, cuBLAS, cuDNN
CPU_BATCH = 64  # images, fewer where these would have more than
CPU_PIXELS = 2**18  # pixels

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ networks


class Networks(NamedTuple):
    """What sampling needs."""

    weights: Network
    classifier: Network | ImportedClassifier | None
    upsampler: Network | None
    labels: Labels
    weak: Network | None = None  # of autoguidance

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
        """Return those of our own that there are."""
        found = (self.weights, self.classifier, self.upsampler, self.weak)
        return [network for network in found if isinstance(network, Network)]

    def guide(self, kind: GuidanceKind) -> Network | ImportedClassifier | None:
        """Return the network whose evaluations a kind of guidance adds."""
        guides = {"classifier": self.classifier, "classifier_free": self.weights, "auto": self.weak}
        return guides.get(kind)


def load_networks(config: GenerationConfig, device: torch.device | str) -> Networks:
    """Read and check them.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: they do not fit each other.
    """

    def load(path: str | None, recipe: str | None = None) -> Network | None:
        return load_network(config.path(path), device, recipe if path.endswith(".pt") else None) if path else None

    weights = config.path(weights_file(config.weights, config.path, kind=config.ema, at=config.at))
    model = load_network(weights, device, config.recipe if weights.endswith(".pt") else None)
    recipes = zoo.entry(config.recipe).recipes if config.recipe else ()
    upsampler, size = load(config.upsampler), model.architecture.image_size
    classifier: Network | ImportedClassifier | None
    if config.classifier and is_imported(config.classifier):
        classifier = import_classifier(config.classifier, model.architecture.in_channels, size, device)
    else:
        classifier = load(config.classifier, recipes[0].classifier if recipes else None)
    if isinstance(classifier, Network) and classifier.architecture.image_size != size:
        raise ValueError(
            f"{config.classifier} sees {classifier.architecture.image_size} pixels, but samples have {size}"
        )
    if upsampler and upsampler.architecture.low_res_size != size:
        raise ValueError(f"{config.upsampler} is no upsampler of images of {size} pixels, which the samples have")
    for other, path in ((classifier, config.classifier), (upsampler, config.upsampler)):
        if other and other.classes and model.architecture.num_classes and other.classes != model.classes:
            raise ValueError(f"{path} and {config.weights} were trained on different classes")
    weak = load(config.guidance.weak_weights)
    _check_guidance(config, model, weak)
    classes = (classifier or model).classes
    return Networks(model, classifier, upsampler, read_labels(config.labels, classes, config.seed, config.path), weak)


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
        mine, its = (
            {name: getattr(network.architecture, name, None) for name in fields} | {"diffusion": network.diffusion}
            for network in (model, weak)
        )
        if differing := [name for name in mine if mine[name] != its[name]]:
            raise ValueError(
                f"guidance.weak_weights={config.guidance.weak_weights} and {config.weights} differ in "
                f"{', '.join(differing)}; a weaker model is an earlier snapshot, or a smaller one of the same diffusion"
            )


def fingerprint(config: GenerationConfig, networks: Networks) -> dict[str, Any]:
    """All that decides the samples, but for the platform; B only where the config says it."""
    unused = {"batch_size"} if not config.batch_size else set()
    unused |= {"upsampling"} if not config.upsampler else set()
    chosen = config.model_dump(mode="json", exclude=OPERATIONAL | config.operational | unused)
    del chosen["guidance"]["weak_weights"]  # counts by its hash
    _leave_out_later_defaults(chosen)
    stages = {"weights": networks.weights, "classifier": networks.classifier, "upsampler": networks.upsampler}
    stages |= {"weak_weights": networks.weak} if networks.weak else {}
    hashes = {name: network.sha256 if network else None for name, network in stages.items()}
    labels = {"labels": networks.labels.sha256 or config.labels}
    return {**chosen, **hashes, **labels, "numerics_version": NUMERICS_VERSION}


def _leave_out_later_defaults(chosen: dict[str, Any]) -> None:
    """Forget settings that came later and change nothing, so that folders begun before them go on."""
    for name in {"sampler", "upsampling"} & chosen.keys():
        if chosen[name]["name"] != "edm":
            chosen[name] = {field: value for field, value in chosen[name].items() if field not in EDM_FIELDS}
    if chosen["guidance"]["kind"] == "classifier":
        del chosen["guidance"]["kind"]
    if not chosen["tf32"]:
        del chosen["tf32"]


# ------------------------------------------------------------------------------------------------ the canonical batch


def canonical_batch(config: GenerationConfig, networks: Networks, device: torch.device) -> int:
    """Return B, where the config leaves it open: what counted memory allows, hence the same on every card of a kind.

    On a CPU it is 64, or as many images as have 2^18 pixels.

    Raises:
        RuntimeError: not even one image fits into the GPU's memory.
    """
    most = config.shard_size & -config.shard_size  # B must divide it; powers of two do up to here
    if device.type == "cpu":
        size = (networks.upsampler or networks.weights).architecture.image_size
        return max(1, min(most, CPU_BATCH, 2 ** int(np.log2(CPU_PIXELS / size**2))))
    size = counted_batch(config, networks, torch.cuda.get_device_properties(device).total_memory, most)
    return verified_batch(size, partial(_two_steps, networks, config))


def counted_batch(config: GenerationConfig, networks: Networks, memory: float, most: int) -> int:
    """Return the largest power of two, up to `most` and 256, with which sampling takes at most 70% of `memory` bytes.

    What is counted leaves out workspaces of convolutions and fragments: hence the rest. From some ten images on,
    larger batches are hardly faster.
    """
    uses: list[tuple[Network | None, Use]] = [(networks.weights, "sampling"), (networks.upsampler, "sampling")]
    guide = networks.guide(config.guidance.kind)
    if config.guidance.scale and isinstance(guide, Network):  # what is imported is not counted, but tried
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
    """Return `size`, or the first half, quarter ... of it that `draw` finds memory for.

    Raises:
        RuntimeError: it finds none for a single image; or it fails for another reason.
    """
    while True:
        try:
            draw(size)
            return size
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
        if size == 1:
            raise RuntimeError("not even one image fits into the GPU's memory")
        log.warning("a batch of %d images was counted to fit into the GPU's memory, and does not: taking half", size)
        size //= 2


def _two_steps(networks: Networks, config: GenerationConfig, size: int) -> None:
    """Draw two steps of each stage, guided ones, of a batch of `size` images."""
    indices, low_res = np.arange(size), None
    for network, sampler in ((networks.weights, config.sampler), (networks.upsampler, config.upsampling)):
        if network is not None:
            short = sampler.model_copy(update={"num_steps": 2, "respacing": None})
            guidance = config.guidance.model_copy(update={"interval": WHOLE_CHAIN})
            guide = networks.guide(guidance.kind) if low_res is None else None
            labels = networks.labels(indices)
            with autocast(network.device, config.dtype):
                low_res = sample_batch(network, short, indices, labels, 0, guide, guidance, low_res)


# ------------------------------------------------------------------------------------------------ batches


def make_batch(networks: Networks, config: GenerationConfig, number: int, draw: DrawNoise | None = None) -> Samples:
    """The canonical batch `number`: always B whole indices, so that an index never sees another batch shape."""
    indices = _indices(config, number)
    labels = networks.labels(indices)
    with autocast(networks.weights.device, config.dtype):
        images = sample_batch(
            networks.weights, config.sampler, indices, labels, config.seed,
            networks.guide(config.guidance.kind), config.guidance,
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
    guide: Network | ImportedClassifier | None = None,
    guidance: GuidanceConfig | None = None,
    low_res: np.ndarray | None = None,
    clip: bool = True,
    rounding: Rounding = "truncate",
    draw: DrawNoise | None = None,
) -> np.ndarray:
    """Sample the images of `indices` int64 [n] towards `labels` int64 [n]; uint8 [n, H, W, 3].

    x_T and step noise of an image depend on (seed, index, original timestep) only. Labels count where the network is
    conditional, or guided by a classifier; `guide` is what `Networks.guide` says of the kind of guidance. `low_res`
    uint8 [n, h, w, 3] is what an upsampler enlarges. `clip` clamps the predicted x_0; `draw` is where noise of this
    seed comes from, if it is drawn ahead.

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
    chosen = guidance if guide and guidance else GuidanceConfig()
    chain_of = Guided(
        network.module, y, bool(architecture.num_classes), small, clip, null_label=architecture.num_classes,
        guide=guide.towards(y) if guide else None,
    )  # fmt: skip
    denoise = guided_denoiser(chain_of, diffusion, sampler.name, chosen)
    x_T = draw(key(start)).to(device, non_blocking=True)
    chain = sample(sampler, denoise, diffusion, x_T, lambda t: draw(key(step, t)).to(device, non_blocking=True))
    x = final_x(chain)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"samples {indices[0]} to {indices[-1]} hold values that are not finite")
    return to_uint8(x, rounding).cpu().numpy()
