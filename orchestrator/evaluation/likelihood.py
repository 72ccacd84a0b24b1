"""Likelihood: bits per dimension of a dataset over the pool, and the pictures of DDPM's sections 4.3 and 4.4."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from pydantic import Field
from torch import Tensor

from cluster.session import session
from cluster.workers import map_items
from models.costs import Evaluations
from models.diffusion import Denoise, Diffusion
from models.images import from_uint8, to_uint8
from models.likelihood import bits_per_dim, interpolate, progressive_coding, progressive_generation
from models.metrics import mean_estimate
from models.samplers import ddpm
from orchestrator import storage
from orchestrator.config import JobConfig, check_or_write_config
from orchestrator.cost import CostConfig, priced, sampling_cost
from orchestrator.data.dataset import Manifest, load_manifest, read_images
from orchestrator.evaluation.measurement import describe
from orchestrator.order import Purpose, index_rng
from orchestrator.pictures import COLOURS, figure_png, grid_png, subplots
from orchestrator.progress import progress_line
from orchestrator.tracking import tracked
from orchestrator.weights.network import Network, load_network

STRIP_LENGTH = 10  # predictions of x_0 along a chain that a strip shows
SHOWN_PIXELS = 48  # small images are enlarged to about this size in pictures
INTERPOLATION_STEPS = 9  # images between two real ones, both ends counted


class LikelihoodConfig(JobConfig):
    """Whose likelihood of what, and how finely."""

    weights: str  # the diffusion model: a training run's folder, or a file of weights
    dataset: str  # a prepared dataset's folder
    split: Literal["train", "validation"] = "validation"  # whose images
    output: str  # the estimate's folder
    num_samples: int | None = Field(None, gt=0)  # images, the first of the split; None = all of it
    respacing: str = ""  # chain of the bound, e.g. "250"; empty = every timestep, as published
    clip: bool = True  # clamp the predicted x_0 to [-1, 1], as published
    seed: int = Field(0, ge=0)  # of the noise, by image
    batch_size: int = Field(32, gt=0)  # images in a batch
    num_strips: int = Field(10, ge=0)  # rows of the picture of progressive generation
    interpolation_depths: tuple[int, ...] = (250, 500, 750)  # chain indices of the encodings that are mixed
    num_workers: int = Field(1, ge=0)  # workers; 0 = in this process, without Ray
    num_gpus: float = Field(0.0, ge=0)  # GPUs for each worker
    cost: CostConfig = CostConfig()


class Bound(NamedTuple):
    """Work: the bound of images [begin, end)."""

    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"terms/{self.begin:08d}-{self.end:08d}.safetensors"


class Picture(NamedTuple):
    """Work: a picture, progressive generation or interpolation at one depth."""

    kind: Literal["progressive", "interpolation"]
    depth: int = 0

    @property
    def name(self) -> str:
        return "progressive-generation.png" if self.kind == "progressive" else f"interpolation-{self.depth:04d}.png"


# ------------------------------------------------------------------------------------------------ in the driver


def estimate(config: LikelihoodConfig) -> str:
    """Compute what is missing; answer the URI of likelihood.json.

    Raises:
        ValueError: weights, dataset and output folder do not fit each other.
        FileNotFoundError: weights or dataset are not there.
    """
    output, manifest = config.path(config.output), load_manifest(config.path(config.dataset))
    network = load_network(config.path(config.weights))
    _check(config, network, manifest)
    check_or_write_config(output, config, weights=network.sha256)
    report_uri = storage.join(output, "likelihood.json")
    if storage.exists(report_uri):
        print(f"{output} is complete: {storage.read_json(report_uri)['bits_per_dim']['value']:.3f} bits/dim")
        return report_uri
    items = _items(config, manifest)
    there = set(storage.list_names(output, recursive=True))
    todo = [item for item in items if item.name not in there]
    with (
        session(config.num_workers, wanted_gpus=config.num_workers * config.num_gpus, shared=config.shared),
        tracked("likelihood", config, output) as tracker,
        progress_line(len(items), "batches and pictures") as progress,
    ):
        progress.update_to(len(items) - len(todo))
        work = map_items(partial(make_worker, config), todo, config.num_workers, num_gpus=config.num_gpus)
        for done, _ in enumerate(work, start=len(items) - len(todo) + 1):
            progress.update_to(done)
        report = _conclude(output, [item for item in items if isinstance(item, Bound)])
        curve = rate_distortion_png(report["rate_bits_per_dim"], report["distortion_grey_levels"])
        storage.write_bytes(storage.join(output, "rate-distortion.png"), curve)
        tracker.picture("rate-distortion.png", curve)
        for item in items:
            if isinstance(item, Picture):
                tracker.picture(item.name, storage.read_bytes(storage.join(output, item.name)))
        tracker.metrics({"bits_per_dim": report["bits_per_dim"]["value"]})
        tracker.record("likelihood.json", report)
    storage.put_if_absent(report_uri, storage.json_bytes(report))
    low, high = report["bits_per_dim"]["interval"]
    print(f"{report['bits_per_dim']['value']:.4f} bits/dim, 95% interval {low:.4f} to {high:.4f}: {report_uri}")
    return report_uri


def plan(config: LikelihoodConfig) -> str:
    """What an estimate would read, write and cost."""
    manifest = load_manifest(config.path(config.dataset))
    network = load_network(config.path(config.weights))
    _check(config, network, manifest)
    evaluations = Evaluations(model=Diffusion(network.diffusion, config.respacing).num_timesteps, classifier=0)
    count = _count(config, manifest)
    return "\n".join(
        [
            f"reads   {config.path(config.weights)}; {count:,} images of {config.path(config.dataset)}",
            f"writes  {config.path(config.output)}: terms of the bound, pictures, likelihood.json",
            priced(
                sampling_cost(network.architecture, evaluations, count, config.batch_size, half=False),
                config.cost,
                config.num_workers,
                half=False,
            ),
        ]
    )


def _check(config: LikelihoodConfig, network: Network, manifest: Manifest) -> None:
    if network.architecture.num_classes and network.classes != manifest.classes:
        raise ValueError(f"{config.weights} was trained on other classes than those of {config.dataset}")
    steps = Diffusion(network.diffusion, config.respacing).num_timesteps
    for depth in config.interpolation_depths:
        if not 0 <= depth < steps:
            raise ValueError(f"interpolation_depths has {depth}; the chain's indices are 0 to {steps - 1}")


def _count(config: LikelihoodConfig, manifest: Manifest) -> int:
    there = manifest.num_samples(config.split)
    return min(config.num_samples or there, there)


def _items(config: LikelihoodConfig, manifest: Manifest) -> list[Bound | Picture]:
    count = _count(config, manifest)
    bounds = [Bound(begin, min(begin + config.batch_size, count)) for begin in range(0, count, config.batch_size)]
    strips = [Picture("progressive")] if config.num_strips else []
    return [*bounds, *strips, *(Picture("interpolation", depth) for depth in config.interpolation_depths)]


def _conclude(output: str, bounds: list[Bound]) -> dict[str, Any]:
    """The dataset's numbers out of its batches' terms, in index order."""
    parts = [safetensors.numpy.load(storage.read_bytes(storage.join(output, bound.name))) for bound in bounds]
    terms = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {
        "bits_per_dim": describe(mean_estimate(terms["total"].astype(np.float64))),
        "prior_bits_per_dim": float(terms["prior"].mean()),
        "vb": terms["vb"].mean(axis=0).tolist(),
        "mse": terms["mse"].mean(axis=0).tolist(),
        "x_start_mse": terms["x_start_mse"].mean(axis=0).tolist(),
        "rate_bits_per_dim": terms["rate"].mean(axis=0).tolist(),
        "distortion_grey_levels": np.sqrt(np.square(terms["distortion"]).mean(axis=0)).tolist(),
    }


def rate_distortion_png(rate: list[float], distortion: list[float]) -> bytes:
    """DDPM's figure 5: distortion over rate while an image is received."""
    figure, axis = subplots(figsize=(5, 3.4))
    axis.plot(rate, distortion, color=COLOURS[0])
    axis.set(xlabel="rate, bits/dim", ylabel="distortion, grey levels (RMSE)", title="progressive coding")
    return figure_png(figure)


# ------------------------------------------------------------------------------------------------ in every worker


def make_worker(config: LikelihoodConfig) -> Callable[[Bound | Picture], None]:
    """A worker: the network loaded once, then batches of the bound, and pictures."""
    device = torch.device("cuda" if config.num_gpus and torch.cuda.is_available() else "cpu")
    network = load_network(config.path(config.weights), device)
    manifest = load_manifest(config.path(config.dataset))
    diffusion = Diffusion(network.diffusion, config.respacing)
    output, architecture = config.path(config.output), network.architecture
    shape = (architecture.in_channels, architecture.image_size, architecture.image_size)
    scale = max(1, SHOWN_PIXELS // architecture.image_size)

    def images(begin: int, end: int) -> tuple[Tensor, Tensor]:
        pixels, labels = read_images(manifest, config.split, begin, end, architecture.image_size)
        return from_uint8(torch.from_numpy(pixels).to(device), shape[0]), torch.from_numpy(labels).to(device)

    def noise(indices: range, timestep: int, purpose: Purpose = Purpose.LIKELIHOOD) -> Tensor:
        rows = [index_rng(config.seed, i, purpose, timestep).standard_normal(shape, np.float32) for i in indices]
        return torch.from_numpy(np.stack(rows)).to(device)

    def denoiser(labels: Tensor) -> Denoise:
        return diffusion.denoiser(network.module, y=labels if architecture.num_classes else None, clip=config.clip)

    def bound(item: Bound) -> bytes:
        x_start, labels = images(item.begin, item.end)
        bits = bits_per_dim(denoiser(labels), diffusion, x_start, partial(noise, range(item.begin, item.end)))
        rate, distortion = progressive_coding(bits)
        terms = {**vars(bits), "rate": rate, "distortion": distortion}
        return safetensors.numpy.save({name: tensor.cpu().numpy() for name, tensor in terms.items()})

    def progressive(item: Picture) -> bytes:
        _, labels = images(0, config.num_strips)
        indices = range(config.num_strips)
        x_T = noise(indices, 0, Purpose.START)
        steps = ddpm(denoiser(labels), diffusion, x_T, lambda t: noise(indices, t, Purpose.STEP))
        strips = progressive_generation(steps, every=-(-diffusion.num_timesteps // STRIP_LENGTH))
        return grid_png(to_uint8(strips.flatten(0, 1)).cpu().numpy(), columns=strips.shape[1], scale=scale)

    def interpolation(item: Picture) -> bytes:
        pixels, labels = images(0, 2)
        ends = (pixels[:1], pixels[1:])
        noises = (noise(range(1), 0, Purpose.START), noise(range(1, 2), 0, Purpose.START))
        row = [ends[0]]
        for lam in np.linspace(0, 1, INTERPOLATION_STEPS):
            denoise = denoiser(labels[:1] if lam < 0.5 else labels[1:])
            on_the_way = partial(noise, range(1), purpose=Purpose.STEP)
            row.append(interpolate(denoise, diffusion, ends, noises, float(lam), item.depth, on_the_way))
        return grid_png(to_uint8(torch.cat([*row, ends[1]])).cpu().numpy(), columns=len(row) + 1, scale=scale)

    @torch.inference_mode()
    def work(item: Bound | Picture) -> None:
        if isinstance(item, Bound):
            data = bound(item)
        else:
            data = progressive(item) if item.kind == "progressive" else interpolation(item)
        storage.put_if_absent(storage.join(output, item.name), data)

    return work
