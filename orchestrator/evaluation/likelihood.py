"""The likelihood job: bits per dimension of a dataset, and the pictures of DDPM's sections 4.3 and 4.4."""

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
from models.unet import autocast
from orchestrator import storage
from orchestrator.arithmetic import prepare_device
from orchestrator.config import JobConfig, Operational, check_or_write_config, noted_files
from orchestrator.cost import CostConfig, not_there_yet, priced, sampling_cost
from orchestrator.data.dataset import Manifest, load_manifest, read_images
from orchestrator.evaluation.metrics import describe
from orchestrator.generation.cost import Trained, absent_weights, outline
from orchestrator.generation.noise import Draw, draw_noise, noise_ahead
from orchestrator.order import Purpose
from orchestrator.pictures import COLOURS, figure_png, grid_png, subplots
from orchestrator.progress import progress_line
from orchestrator.tracking import catch_up, tracked
from orchestrator.weights.network import Network, lay_out, load_network, weights_file

STRIP_LENGTH = 10  # predictions of x_0 in a row of the picture of progressive generation
SHOWN_PIXELS = 48  # approximate size of small images in pictures
INTERPOLATION_STEPS = 9  # images of an interpolation, including both ends


class LikelihoodConfig(JobConfig):
    """Model, dataset and accuracy of a likelihood estimate."""

    weights: str  # diffusion model: a training run's folder or a weights file
    dataset: str  # folder of a prepared dataset
    split: Literal["train", "validation"] = "validation"  # split whose images are used
    output: str  # folder of the estimate
    num_samples: int | None = Field(None, gt=0)  # number of images, from the start of the split; None = all
    respacing: str = ""  # timesteps of the bound in the published syntax, such as "250"; empty = all
    clip: bool = True  # clamp the predicted x_0 to [-1, 1], as published
    seed: int = Field(0, ge=0)  # decides the noise of each image
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of convolutions and attention, by autocast
    compile: Operational[bool] = False  # torch.compile the network: a slower start, but faster on long runs
    batch_size: int = Field(32, gt=0)  # images in a batch
    num_strips: int = Field(10, ge=0)  # rows of the picture of progressive generation; 0 = no picture
    interpolation_depths: tuple[int, ...] = (250, 500, 750)  # timesteps at which two images are encoded and mixed
    num_workers: Operational[int] = Field(1, ge=0)  # workers; 0 = in this process, without Ray
    num_gpus: Operational[float] = Field(0.0, ge=0)  # GPUs for each worker
    num_threads: Operational[int] = Field(1, gt=0)  # CPU threads of each worker
    cost: Operational[CostConfig] = CostConfig()


class Item(NamedTuple):
    """A work item: a file of the output folder, and the method of `_Worker` that returns its content."""

    name: str  # relative to the output folder
    method: Literal["bound", "progressive", "interpolation"]
    arguments: tuple[int, ...] = ()


# ------------------------------------------------------------------------------------------------ in the driver


def estimate(config: LikelihoodConfig) -> str:
    """Compute all missing terms and pictures, and return the URI of likelihood.json.

    Raises:
        ValueError: weights, dataset and output folder do not fit together.
        FileNotFoundError: weights or dataset do not exist.
    """
    output, manifest = config.path(config.output), load_manifest(config.path(config.dataset))
    files = {config.weights: weights_file(config.weights, config.path, noted_files(output).get(config.weights))}
    config = config.model_copy(update={"weights": files[config.weights]})
    network = load_network(config.path(config.weights))
    _check(config, network, manifest)
    finished = bool(storage.list_names(storage.join(output, "terms")))
    check_or_write_config(output, config, finished, {"files": files}, weights=network.sha256)
    report_uri = storage.join(output, "likelihood.json")
    if storage.exists(report_uri):
        print(f"{output} is complete: {storage.read_json(report_uri)['bits_per_dim']['value']:.3f} bits/dim")
        catch_up("likelihood", config, output)
        return report_uri
    items = _items(config, manifest)
    existing = set(storage.list_names(output, recursive=True))
    missing = [item for item in items if item.name not in existing]
    num_finished = len(items) - len(missing)
    with (
        session(
            config.num_workers * config.num_threads,
            num_gpus=config.num_workers * config.num_gpus,
            shared=config.shared,
        ),
        tracked("likelihood", config, output) as tracker,
        progress_line(len(items), "batches and pictures") as progress,
    ):
        progress.start(num_finished)
        results = map_items(
            partial(make_worker, config), missing, config.num_workers, config.num_threads, config.num_gpus
        )
        for done, _ in enumerate(results, start=num_finished + 1):
            progress.update_to(done)
        report = _report(output, [item.name for item in items if item.method == "bound"])
        curve = rate_distortion_png(report["rate_bits_per_dim"], report["distortion_grey_levels"])
        storage.write_bytes(storage.join(output, "rate-distortion.png"), curve)
        tracker.picture("rate-distortion.png", curve)
        for item in items:
            if item.method != "bound":
                tracker.picture(item.name, storage.read_bytes(storage.join(output, item.name)))
        tracker.metrics({"bits_per_dim": report["bits_per_dim"]["value"]})
        tracker.record("likelihood.json", report)
    storage.put_if_absent(report_uri, storage.json_bytes(report))
    low, high = report["bits_per_dim"]["interval"]
    print(f"{report['bits_per_dim']['value']:.4f} bits/dim, 95% interval {low:.4f} to {high:.4f}: {report_uri}")
    return report_uri


def plan(config: LikelihoodConfig, trained: Trained | None = None) -> tuple[LikelihoodConfig, str]:
    """Return the config, and what an estimate would read, write and cost.

    Args:
        trained: results of planned trainings, for weights that do not exist yet.

    Raises:
        ValueError: `estimate` would raise it too, before it starts.
    """
    dataset, absent = config.path(config.dataset), absent_weights(config, [config.weights])
    count, half = config.num_samples, config.dtype != "float32"
    if storage.exists(storage.join(dataset, "manifest.json")):
        manifest = load_manifest(dataset)
        count = _count(config, manifest)
        if not absent:
            _check(config, load_network(config.path(config.weights)), manifest)
    else:
        absent.append(dataset)
    lines = [
        f"reads   {config.path(config.weights)}; {f'{count:,}' if count else 'all'} images of {dataset}",
        f"writes  {config.path(config.output)}: terms of the bound, pictures, likelihood.json",
    ]
    try:
        network = outline(config, config.weights, None, trained)
        evaluations = Evaluations(model=Diffusion(network.diffusion, config.respacing).num_timesteps, guide=0)
        cost = sampling_cost(network.architecture, evaluations, count or 1, config.batch_size, half)
        caveat = [] if count else ["for one image, because the number of images is not known yet:"]
        lines += [*caveat, priced(cost, config.cost, config.num_workers, config.num_gpus, half)]
    except FileNotFoundError:
        lines.append("cost    unknown until the weights exist")
    return config, "\n".join([*lines, *not_there_yet(absent)])


def _check(config: LikelihoodConfig, network: Network, manifest: Manifest) -> None:
    """Raise ValueError if the weights do not fit the dataset, it has too few images, or a depth is not in the chain."""
    manifest.check(config.split, network.architecture.image_size, "center", bool(network.architecture.num_classes))
    if (count := _count(config, manifest)) < 2:
        raise ValueError(
            f"--split {config.split}: the estimate would use {count} of its images, but an interval needs at least 2; "
            "pass a larger --num-samples, or another --split"
        )
    if network.architecture.num_classes and network.classes != manifest.classes:
        raise ValueError(
            f"--weights {config.weights} and --dataset {config.dataset} have different classes; use the dataset on "
            "which the weights were trained"
        )
    num_timesteps = Diffusion(network.diffusion, config.respacing).num_timesteps
    for depth in config.interpolation_depths:
        if not 0 <= depth < num_timesteps:
            raise ValueError(
                f"interpolation_depths contains {depth}; expected chain indices from 0 to {num_timesteps - 1}"
            )


def _count(config: LikelihoodConfig, manifest: Manifest) -> int:
    available = manifest.num_samples(config.split)
    return min(config.num_samples or available, available)


def _items(config: LikelihoodConfig, manifest: Manifest) -> list[Item]:
    """Return the terms of the bound of each batch, in index order, and the pictures."""
    count, items = _count(config, manifest), list[Item]()
    for begin in range(0, count, config.batch_size):
        end = min(begin + config.batch_size, count)
        items.append(Item(f"terms/{begin:08d}-{end:08d}.safetensors", "bound", (begin, end)))
    if config.num_strips:
        items.append(Item("progressive-generation.png", "progressive"))
    for depth in config.interpolation_depths:
        items.append(Item(f"interpolation-{depth:04d}.png", "interpolation", (depth,)))
    return items


def _report(output: str, names: list[str]) -> dict[str, Any]:
    """Return the content of likelihood.json, computed from the terms of all batches in index order."""
    parts = [safetensors.numpy.load(storage.read_bytes(storage.join(output, name))) for name in names]
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
    """Draw DDPM's figure 5, the distortion as a function of the rate."""
    figure, axis = subplots(figsize=(5, 3.4))
    axis.plot(rate, distortion, color=COLOURS[0])
    axis.set(xlabel="rate, bits/dim", ylabel="distortion, grey levels (RMSE)", title="progressive coding")
    return figure_png(figure)


# ------------------------------------------------------------------------------------------------ in every worker


class _Worker:
    """The state of a worker: network, images, labels and noise."""

    def __init__(self, config: LikelihoodConfig) -> None:
        self.config, self.device = config, prepare_device(config.num_gpus, config.num_threads)
        self.network = lay_out(load_network(config.path(config.weights), self.device), self.device)
        if config.compile:
            self.network.module.compile()
        self.manifest = load_manifest(config.path(config.dataset))
        self.diffusion = Diffusion(self.network.diffusion, config.respacing)
        architecture = self.network.architecture
        self.size = architecture.image_size
        self.shape = (architecture.in_channels, self.size, self.size)

    def images(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return images float32 [n, C, H, W] in [-1, 1] and labels int64 [n] of a range of the split."""
        pixels, labels = read_images(self.manifest, self.config.split, begin, end, self.size)
        x = from_uint8(torch.from_numpy(pixels).to(self.device), self.shape[0])
        return x, torch.from_numpy(labels).to(self.device)

    def noise(self, indices: range, timestep: int, purpose: Purpose) -> Tensor:
        """Return the noise of these images at an original timestep, float32 [n, C, H, W]."""
        return draw_noise(self.config.seed, Draw(tuple(indices), self.shape, purpose, timestep)).to(self.device)

    def denoiser(self, labels: Tensor) -> Denoise:
        """Return the denoiser for labels [n], which unconditional networks ignore."""
        y = labels if self.network.architecture.num_classes else None
        return self.diffusion.denoiser(self.network.module, y=y, clip=self.config.clip)

    def bound(self, begin: int, end: int) -> bytes:
        """Compute the terms of the bound of a range of images; the noise of later steps is drawn in the background."""
        x_start, labels = self.images(begin, end)
        draw_at = partial(Draw, tuple(range(begin, end)), self.shape, Purpose.LIKELIHOOD)
        planned = (draw_at(int(t)) for t in self.diffusion.timestep_map[::-1])
        with noise_ahead(self.config.seed, planned, pin=self.device.type == "cuda") as draw:

            def noise(t: int) -> Tensor:
                return draw(draw_at(t)).to(self.device, non_blocking=True)

            bits = bits_per_dim(self.denoiser(labels), self.diffusion, x_start, noise)
        rate, distortion = progressive_coding(bits)
        terms = {**vars(bits), "rate": rate, "distortion": distortion}
        return safetensors.numpy.save({name: tensor.cpu().numpy() for name, tensor in terms.items()})

    def progressive(self) -> bytes:
        """Draw progressive generation: one row of predictions of x_0 for each chain."""
        indices = range(min(self.config.num_strips, self.manifest.num_samples(self.config.split)))
        _, labels = self.images(0, len(indices))
        x_T = self.noise(indices, 0, Purpose.START)
        step_noise = partial(self.noise, indices, purpose=Purpose.STEP)
        steps = ddpm(self.denoiser(labels), self.diffusion, x_T, step_noise)
        strips = progressive_generation(steps, every=-(-self.diffusion.num_timesteps // STRIP_LENGTH))
        return self._grid(strips.flatten(0, 1), columns=strips.shape[1])

    def interpolation(self, depth: int) -> bytes:
        """Draw an interpolation between the first two images, which are at the ends, encoded at index `depth`."""
        x, labels = self.images(0, 2)
        ends = (x[:1], x[1:])
        noises = (self.noise(range(1), 0, Purpose.START), self.noise(range(1, 2), 0, Purpose.START))
        step_noise = partial(self.noise, range(1), purpose=Purpose.STEP)  # the same for all images of the row
        row = [ends[0]]
        for lam in np.linspace(0, 1, INTERPOLATION_STEPS):
            denoise = self.denoiser(labels[:1] if lam < 0.5 else labels[1:])
            row.append(interpolate(denoise, self.diffusion, ends, noises, float(lam), depth, step_noise))
        return self._grid(torch.cat([*row, ends[1]]), columns=len(row) + 1)

    def _grid(self, images: Tensor, columns: int) -> bytes:
        return grid_png(to_uint8(images).cpu().numpy(), columns=columns, scale=max(1, SHOWN_PIXELS // self.size))


def make_worker(config: LikelihoodConfig) -> Callable[[Item], None]:
    """Load the network, and return the function that processes a work item."""
    worker, output = _Worker(config), config.path(config.output)

    @torch.inference_mode()
    def work(item: Item) -> None:
        with autocast(worker.device, config.dtype):
            data = getattr(worker, item.method)(*item.arguments)
        storage.put_if_absent(storage.join(output, item.name), data)

    return work
