"""Generation: samples that are functions of (config, seed, index), written as finished shards by a pool of workers."""

import hashlib
import io
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from cluster.session import session
from cluster.workers import map_items
from models.diffusion import Diffusion
from models.guidance import GuidanceConfig, guided
from models.images import from_uint8, to_uint8
from models.samplers import SamplerConfig, last, respacing_for, sample
from orchestrator import storage
from orchestrator.checkpoints import Network, load_network
from orchestrator.config import JobConfig, claim
from orchestrator.order import Purpose, index_rng
from orchestrator.pictures import grid_png, png
from orchestrator.progress import progress_line
from orchestrator.tracking import tracked

NUMERICS_VERSION = 1  # raised by hand when the same config begins to give other samples


class GenerationConfig(JobConfig):
    """What decides the samples, and where they go."""

    weights: str  # the diffusion model: a training run's folder, a .safetensors file or a released .pt file
    classifier: str | None = None  # the noisy classifier that guides, likewise
    upsampler: str | None = None  # a second stage that enlarges the samples (ADM-U), likewise; both are kept
    output: str  # the samples' folder; enlarged ones lie in upsampled/ beneath it
    num_samples: int = Field(50_000, gt=0)  # images
    seed: int = Field(0, ge=0)  # label, x_T and every step's noise of an index follow from it
    labels: Literal["balanced", "uniform"] = "balanced"  # index modulo classes, or drawn by seed
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    upsampling: SamplerConfig = SamplerConfig()  # how the second stage is drawn, unguided as published
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of convolutions and attention, by autocast
    compile: bool = False  # torch.compile the networks: slower to start, faster on long runs
    batch_size: int = Field(64, gt=0)  # canonical batch B: index i always runs in batch floor(i/B)
    shard_batches: int = Field(8, gt=0)  # batches in a shard
    num_workers: int = Field(1, ge=0)  # sampling workers; 0 = in this process, without Ray
    num_gpus: float = Field(0.0, ge=0)  # GPUs for each worker

    @model_validator(mode="after")
    def _has_guide(self) -> "GenerationConfig":
        if self.guidance.scale and self.classifier is None:
            raise ValueError(f"guidance.scale={self.guidance.scale} needs a classifier")
        return self


class Shard(NamedTuple):
    """The indices [begin, end) of one object."""

    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.begin:06d}-{self.end:06d}.parquet"


# ------------------------------------------------------------------------------------------------ in the driver


def generate(config: GenerationConfig) -> str:
    """Make the samples that are still missing; answer their folder's URI.

    Raises:
        ValueError: weights, classifier and output folder do not fit each other.
        ItemsFailed: some shards failed; all others are written.
    """
    output, folders = config.path(config.output), _folders(config)
    networks = load_networks(config, "cpu")._asdict()
    hashes = {name: network.sha256 if network else None for name, network in networks.items()}
    for folder in folders:
        claim(folder, config, **hashes, numerics_version=NUMERICS_VERSION)
    todo = missing_shards(config)
    if not todo and all(storage.exists(storage.join(folder, "manifest.json")) for folder in folders):
        print(f"{output} is complete: {config.num_samples:,} samples")
        return output
    with (
        session(config.num_workers),
        tracked("generate", config, output) as tracker,
        progress_line(config.num_samples, "samples") as progress,
    ):
        done = config.num_samples - sum(shard.end - shard.begin for shard in todo)
        progress.update_to(done)
        for shard, _ in map_items(partial(make_generator, config), todo, config.num_workers, num_gpus=config.num_gpus):
            done += shard.end - shard.begin
            progress.update_to(done)
            tracker.metrics({"samples": done}, step=done)
        shards = [{"name": shard.name, "rows": shard.end - shard.begin} for shard in _shards(config)]
        manifest = storage.json_bytes({"num_samples": config.num_samples, "shards": shards})
        for folder in folders:
            first, _ = read_range(folder, 0, min(100, config.num_samples))
            tracker.picture(f"{folder.rsplit('/', 1)[-1]}.png", grid_png(first, columns=10))
            storage.create_bytes(storage.join(folder, "manifest.json"), manifest)
    print(f"{output}: {config.num_samples:,} samples")
    return output


def plan(config: GenerationConfig) -> str:
    """What a generation would read and write."""
    todo = missing_shards(config)
    per_image = evaluations(config.sampler, config.guidance)
    if config.upsampler:
        per_image += evaluations(config.upsampling, GuidanceConfig())
    inputs = [config.path(path) for path in (config.weights, config.classifier, config.upsampler) if path]
    return "\n".join(
        [
            f"reads   {', '.join(inputs)}",
            f"writes  {config.path(config.output)}: {len(todo)} of {len(_shards(config))} shards are missing",
            f"work    {config.num_samples:,} images x {per_image} network evaluations",
        ]
    )


def evaluations(sampler: SamplerConfig, guidance: GuidanceConfig) -> int:
    """Network evaluations that one image takes, those of the classifier counted too."""
    network = 2 * sampler.num_steps - 1 if sampler.name == "heun" else sampler.num_steps
    return network * 2 if guidance.scale else network


def _shards(config: GenerationConfig) -> list[Shard]:
    size = config.batch_size * config.shard_batches
    return [Shard(begin, min(begin + size, config.num_samples)) for begin in range(0, config.num_samples, size)]


def missing_shards(config: GenerationConfig) -> list[Shard]:
    """The shards that are not there yet: a shard is whole or absent, so its name is enough."""
    there = [set(storage.list_names(storage.join(folder, "shards"))) for folder in _folders(config)]
    return [shard for shard in _shards(config) if not all(shard.name in names for names in there)]


def _folders(config: GenerationConfig) -> list[str]:
    """The folder of the samples and, in a cascade, of the enlarged ones."""
    output = config.path(config.output)
    return [output, storage.join(output, "upsampled")] if config.upsampler else [output]


# ------------------------------------------------------------------------------------------------ in every worker


class Networks(NamedTuple):
    """What sampling needs."""

    weights: Network
    classifier: Network | None
    upsampler: Network | None

    @property
    def num_classes(self) -> int:
        """Classes that a sample can be of; 0 where nothing conditions it."""
        return len(self.classifier.classes if self.classifier else self.weights.classes)


def load_networks(config: GenerationConfig, device: torch.device | str) -> Networks:
    """Read and check them.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: they do not fit each other.
    """
    model = load_network(config.path(config.weights), device)
    classifier = load_network(config.path(config.classifier), device) if config.classifier else None
    upsampler = load_network(config.path(config.upsampler), device) if config.upsampler else None
    size = model.architecture.image_size
    if classifier and classifier.architecture.image_size != size:
        raise ValueError(
            f"{config.classifier} sees {classifier.architecture.image_size} pixels, but samples have {size}"
        )
    if upsampler and getattr(upsampler.architecture, "low_res_size", None) != size:
        raise ValueError(f"{config.upsampler} is no upsampler of images of {size} pixels, which the samples have")
    for other, path in ((classifier, config.classifier), (upsampler, config.upsampler)):
        if other and other.classes and model.architecture.num_classes and other.classes != model.classes:
            raise ValueError(f"{path} and {config.weights} were trained on different classes")
    return Networks(model, classifier, upsampler)


def make_generator(config: GenerationConfig) -> Callable[[Shard], None]:
    """A worker: networks loaded once, then shards."""
    device = torch.device("cuda" if config.num_gpus and torch.cuda.is_available() else "cpu")
    networks = load_networks(config, device)
    for network in filter(None, networks):
        if device.type == "cuda":  # on CPUs it makes GroupNorm slower
            network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.compile:
            network.module.compile()

    def make_shard(shard: Shard) -> None:
        numbers = range(shard.begin // config.batch_size, -(-shard.end // config.batch_size))
        stages = [[make_batch(networks, config, number, config.sampler, config.guidance) for number in numbers]]
        if networks.upsampler is not None:
            stages.append([upsample_batch(networks.upsampler, config, batch) for batch in stages[0]])
        for folder, batches in zip(_folders(config), stages, strict=True):
            whole = Samples(*map(np.concatenate, zip(*batches, strict=True)))
            kept = Samples(*(column[: shard.end - shard.begin] for column in whole))
            storage.create_bytes(storage.join(folder, "shards", shard.name), _encode_shard(kept))

    return make_shard


class Samples(NamedTuple):
    """Consecutive samples: index int64 [n], label int64 [n] (-1 = none), images uint8 [n, H, W, 3]."""

    indices: np.ndarray
    labels: np.ndarray
    images: np.ndarray


def make_batch(
    networks: Networks,
    config: GenerationConfig,
    number: int,
    sampler: SamplerConfig,
    guidance: GuidanceConfig,
) -> Samples:
    """The canonical batch `number`: always B whole indices, so that an index never sees another batch shape."""
    indices = np.arange(number * config.batch_size, (number + 1) * config.batch_size)
    classes = networks.num_classes
    if not classes:
        labels = np.full(len(indices), -1)
    elif config.labels == "balanced":
        labels = indices % classes
    else:
        labels = np.array([index_rng(config.seed, int(index), Purpose.LABEL).integers(classes) for index in indices])
    with autocast(networks.weights, config.dtype):
        images = sample_batch(networks.weights, sampler, indices, labels, config.seed, networks.classifier, guidance)
    return Samples(indices, labels, images)


def upsample_batch(upsampler: Network, config: GenerationConfig, batch: Samples) -> Samples:
    """The second stage of a cascade (ADM section 5): a canonical batch of samples enlarged, with noise of its own."""
    with autocast(upsampler, config.dtype):
        images = sample_batch(
            upsampler, config.upsampling, batch.indices, batch.labels, config.seed, low_res=batch.images
        )
    return Samples(batch.indices, batch.labels, images)


def autocast(network: Network, dtype: str) -> torch.autocast:
    """A region in which the network's convolutions and attention run in `dtype`; the chain itself stays float32."""
    device = next(network.module.parameters()).device
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


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
) -> np.ndarray:
    """Sample the images of `indices` int64 [n] towards `labels` int64 [n]; uint8 [n, H, W, 3].

    x_T and step noise of an image depend on (seed, index, original timestep) only. Labels count where the network is
    conditional, or guided by `classifier`; `low_res` uint8 [n, h, w, 3] is what an upsampler enlarges.
    """
    architecture = network.architecture
    device = next(network.module.parameters()).device
    shape = (architecture.in_channels, architecture.image_size, architecture.image_size)

    def draw(purpose: Purpose, timestep: int = 0) -> Tensor:
        rows = [index_rng(seed, int(i), purpose, timestep).standard_normal(shape, np.float32) for i in indices]
        return torch.from_numpy(np.stack(rows)).to(device)

    diffusion = Diffusion(network.diffusion, respacing_for(sampler, network.diffusion.num_timesteps))
    y = torch.from_numpy(labels).to(device)
    small = None if low_res is None else from_uint8(torch.from_numpy(low_res).to(device), architecture.in_channels)
    denoise = diffusion.denoiser(network.module, y=y if architecture.num_classes else None, low_res=small)
    if classifier is not None and guidance is not None:
        denoise = guided(denoise, sampler.name, classifier.module, diffusion, y, guidance)
    start, step = (Purpose.START, Purpose.STEP) if small is None else (Purpose.UPSAMPLE_START, Purpose.UPSAMPLE_STEP)
    x = last(sample(sampler, denoise, diffusion, draw(start), partial(draw, step)))
    return to_uint8(x).cpu().numpy()


# ------------------------------------------------------------------------------------------------ on disk


def _encode_shard(samples: Samples) -> bytes:
    """A Parquet file with index, label and the image as PNG."""
    table = pa.table(
        {
            "index": pa.array(samples.indices, pa.int64()),
            "label": pa.array(samples.labels, pa.int64()),
            "image": pa.array([png(image) for image in samples.images], pa.binary()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")  # PNG does not compress again
    return buffer.getvalue()


def _decode_shard(data: bytes) -> Samples:
    table = pq.read_table(io.BytesIO(data))
    images = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in table["image"].to_pylist()]
    return Samples(table["index"].to_numpy(), table["label"].to_numpy(), np.stack(images))


def count_samples(folder: str) -> int:
    """How many samples a finished folder holds.

    Raises:
        FileNotFoundError: none were generated there, or not to their end.
    """
    uri = storage.join(folder, "manifest.json")
    if not storage.exists(uri):
        raise FileNotFoundError(f"{folder} holds no finished samples: generate them first")
    return storage.read_json(uri)["num_samples"]


def read_range(folder: str, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, H, W, 3] and labels int64 [n] of the indices [begin, end) of a samples folder."""
    shards = storage.join(folder, "shards")
    parts = [
        _decode_shard(storage.read_bytes(storage.join(shards, name)))
        for name in storage.list_names(shards)
        if int(name.split("-")[0]) < end and int(name.split("-")[1].split(".")[0]) > begin
    ]
    indices = np.concatenate([part.indices for part in parts])
    wanted = (indices >= begin) & (indices < end)
    return np.concatenate([p.images for p in parts])[wanted], np.concatenate([p.labels for p in parts])[wanted]


def pixel_hashes(images: np.ndarray) -> list[str]:
    """SHA-256 of the raw pixels of each of uint8 [n, H, W, 3] images."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
