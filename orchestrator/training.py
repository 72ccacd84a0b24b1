"""Training: one loop for the diffusion model, the noisy classifier and the upsampler.

Units are images, not steps, so that a schedule survives another batch size or worker count. Order and randomness
come from the order plan and its keys, never from a rank.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cluster.session import session
from cluster.trainer import WorkerContext, run_workers
from models.diffusion import Diffusion, DiffusionConfig
from models.images import from_uint8, shrink, to_uint8
from models.samplers import SamplerConfig
from models.unet import ClassifierConfig, UNetConfig
from orchestrator import checkpoints, storage
from orchestrator.config import JobConfig, claim
from orchestrator.dataset import Manifest, Microbatch, batches, load_manifest, read_images
from orchestrator.order import OrderConfig, OrderPlan, Purpose, keyed_rng, sample_rng
from orchestrator.pictures import grid_png
from orchestrator.progress import progress_line
from orchestrator.sampling import sample_batch
from orchestrator.tracking import tracked

CPUS_OF_WORKER = 2  # one for the training process, one for the tasks that read its data
PREVIEW_SAMPLES = 40  # images in a picture of samples

log = logging.getLogger(__name__)

Losses = Callable[[nn.Module, "Batch"], dict[str, Tensor]]


class TrainingConfig(JobConfig):
    """What training a network takes, whichever it is."""

    dataset: str  # a prepared dataset's folder
    output: str  # the run's folder
    diffusion: DiffusionConfig
    order: OrderConfig = OrderConfig()
    crop: Literal["center", "random"] = "center"  # ADM's centre crop, or its classifier's random crop
    flip: bool = True  # mirror half of the images
    images: int = Field(gt=0)  # length of the training
    batch_size: int = Field(256, gt=0)  # images in a step, over all workers
    learning_rate: float = Field(1e-4, gt=0)  # AdamW's
    weight_decay: float = Field(0.0, ge=0)  # AdamW's
    warmup_images: int = Field(0, ge=0)  # the learning rate rises linearly over these
    anneal: bool = False  # then falls linearly to zero at the end
    clip_norm: float | None = Field(None, gt=0)  # largest norm of the gradient
    max_bad_steps: int = Field(20, ge=0)  # steps in a row that may be skipped for a gradient that is not finite
    checkpoint_images: int = Field(1_000_000, gt=0)  # images from one checkpoint to the next
    log_images: int = Field(10_000, gt=0)  # images from one line of numbers to the next
    num_workers: int = Field(1, ge=0)  # training workers; 0 = in this process, without Ray
    use_gpu: bool = False  # one GPU for each worker

    @model_validator(mode="after")
    def _splits_evenly(self) -> "TrainingConfig":
        streams = self.order.num_streams
        if self.batch_size % streams:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of order.num_streams={streams}")
        if self.num_workers and streams % self.num_workers:
            raise ValueError(f"num_workers={self.num_workers} does not divide order.num_streams={streams}")
        return self


class AdmConfig(TrainingConfig):
    """Training a diffusion model."""

    model: UNetConfig
    ema_rates: tuple[float, ...] = Field((0.9999,), min_length=1)  # one average of the weights for each rate
    preview_images: int = Field(10_000_000, gt=0)  # images from one picture of samples to the next
    preview: SamplerConfig = SamplerConfig(name="ddim", num_steps=25)  # how those samples are drawn


class NoisyClassifierConfig(TrainingConfig):
    """Training the noisy classifier."""

    model: ClassifierConfig
    weight_decay: float = Field(0.05, ge=0)  # AdamW's
    crop: Literal["center", "random"] = "random"  # ADM's centre crop, or its classifier's random crop


class Batch:
    """One worker's share of a step, on its device: what the losses look at.

    x_start float32 [n, C, H, W] in [-1, 1]; labels int64 [n]; u float64 [n] uniform in [0, 1), which becomes the
    timestep; noise float32 like x_start. Each row's u and noise depend on (seed, epoch, sample) alone.
    """

    def __init__(self, microbatches: list[Microbatch], channels: int, seed: int, device: torch.device) -> None:
        images = torch.from_numpy(np.concatenate([m.images for m in microbatches]))
        keys = [(m.epoch, int(sample)) for m in microbatches for sample in m.samples]
        self.x_start = from_uint8(images.to(device), channels)
        self.labels = torch.from_numpy(np.concatenate([m.labels for m in microbatches])).to(device)
        shape = self.x_start.shape[1:]
        noise = [sample_rng(seed, *key, Purpose.NOISE).standard_normal(shape, np.float32) for key in keys]
        self.noise = torch.from_numpy(np.stack(noise)).to(device)
        self.u = np.array([sample_rng(seed, *key, Purpose.TIMESTEP).random() for key in keys])


# ------------------------------------------------------------------------------------------------ what is learnt


def adm_losses(config: AdmConfig, diffusion: Diffusion) -> Losses:
    """The diffusion model's loss terms [n] for each image, given its class and its small version where the model is."""

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        t = _uniform_timesteps(batch, diffusion)
        condition = {"y": batch.labels} if config.model.num_classes else {}
        if config.model.low_res_size:
            condition["low_res"] = shrink(batch.x_start, config.model.low_res_size)
        terms = diffusion.losses(model, batch.x_start, t, batch.noise, **condition)
        return terms | {"t": t}

    return losses


def classifier_losses(config: NoisyClassifierConfig, diffusion: Diffusion) -> Losses:
    """Cross entropy [n] of the class of a noised image (ADM section 4.1), and whether it was right."""

    def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        t = _uniform_timesteps(batch, diffusion)
        x_t = diffusion.q_sample(batch.x_start, t, batch.noise)
        logits = model(x_t, diffusion.model_timesteps(t, x_t))
        right = (logits.argmax(dim=1) == batch.labels).float()
        return {"loss": cross_entropy(logits, batch.labels, reduction="none"), "accuracy": right, "t": t}

    return losses


def _uniform_timesteps(batch: Batch, diffusion: Diffusion) -> Tensor:
    t = torch.from_numpy((batch.u * diffusion.num_timesteps).astype(np.int64))
    return t.to(batch.x_start.device)


# ------------------------------------------------------------------------------------------------ in the driver


def train(config: AdmConfig | NoisyClassifierConfig) -> str:
    """Train until `config.images`, from wherever an earlier attempt came to; answer the run's URI.

    Raises:
        ValueError: config, dataset and output folder do not fit each other.
        RuntimeError: the training failed, or was asked to stop before its end (its place is kept).
    """
    run = config.path(config.output)
    manifest = load_manifest(config.path(config.dataset))
    _check_classes(config, manifest)
    claim(run, config)
    if storage.exists(_final_weights(run, config)):
        print(f"{run} is trained already: {config.images:,} images")
        return run
    job = "train classifier" if isinstance(config, NoisyClassifierConfig) else "train"
    with (
        session(config.num_workers * CPUS_OF_WORKER),
        tracked(job, config, run) as tracker,
        progress_line(config.images, "images") as progress,
    ):

        def on_record(record: dict[str, Any]) -> None:
            if "picture" in record:
                tracker.picture(record["picture"], record["png"])
            if "metrics" in record:
                progress.update_to(record["images"], loss=record["metrics"]["loss"])
                tracker.metrics(record["metrics"], step=record["images"])

        stopped = run_workers(partial(train_loop, config), config.num_workers, on_record, use_gpu=config.use_gpu)
    if stopped and not storage.exists(_final_weights(run, config)):
        raise RuntimeError(f"stopped before its end; the same command goes on from the last checkpoint in {run}")
    print(f"{run} is trained: {config.images:,} images, weights in {storage.join(run, 'weights')}")
    return run


def plan(config: AdmConfig | NoisyClassifierConfig) -> str:
    """What a training would read and write."""
    manifest = load_manifest(config.path(config.dataset))
    _check_classes(config, manifest)
    order = _order(config, manifest)
    bytes_per_image = config.model.image_size**2 * config.model.in_channels
    parameters = sum(tensor.numel() for tensor in _on_meta(config).parameters())
    open_bytes = order.open_bytes(max(config.num_workers, 1), bytes_per_image)
    return "\n".join(
        [
            f"reads   {config.path(config.dataset)}: {manifest.num_samples('train'):,} images",
            f"writes  {config.path(config.output)}: checkpoints every {config.checkpoint_images:,} images, weights",
            f"network {parameters:,} parameters",
            f"length  {config.images:,} images = {config.images // config.batch_size:,} steps of {config.batch_size}, "
            f"{config.images / order.images_per_epoch:.1f} epochs of {order.images_per_epoch:,}",
            f"memory  {open_bytes / 2**20:.1f} MiB of open images in each of {max(config.num_workers, 1)} workers",
        ]
    )


def _check_classes(config: AdmConfig | NoisyClassifierConfig, manifest: Manifest) -> None:
    wanted = config.model.num_classes
    if wanted and wanted != len(manifest.classes):
        raise ValueError(
            f"model.num_classes={wanted}, but {config.dataset} has {len(manifest.classes)} classes; "
            f"pass --model.num-classes {len(manifest.classes)}"
        )


def _final_weights(run: str, config: AdmConfig | NoisyClassifierConfig) -> str:
    """The last object that a training writes."""
    name = f"ema-{config.ema_rates[-1]}" if isinstance(config, AdmConfig) else "raw"
    return storage.join(run, "weights", f"images-{_length(config):012d}-{name}.safetensors")


def _length(config: TrainingConfig) -> int:
    """The length in whole steps."""
    return -(-config.images // config.batch_size) * config.batch_size


def _order(config: TrainingConfig, manifest: Manifest) -> OrderPlan:
    return OrderPlan(manifest.row_group_sizes("train"), config.batch_size, config.order)


def _on_meta(config: AdmConfig | NoisyClassifierConfig) -> nn.Module:
    with torch.device("meta"):
        return checkpoints.build(config.model)


# ------------------------------------------------------------------------------------------------ in every worker


class TrainingState:
    """Everything that training changes: weights, their averages, the optimizer, and the position."""

    def __init__(self, config: AdmConfig | NoisyClassifierConfig, device: torch.device) -> None:
        torch.manual_seed(config.order.seed)  # the same fresh weights on every worker
        self.model = checkpoints.build(config.model).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        rates = config.ema_rates if isinstance(config, AdmConfig) else ()
        self.averages = {
            rate: {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()} for rate in rates
        }
        self.position = 0  # images seen
        self.bad_steps = 0  # steps skipped since the last good one

    def update_averages(self) -> None:
        """e = r e + (1 - r) p for every rate r, in float32."""
        parameters = [tensor.detach() for tensor in self.model.parameters()]
        for rate, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), parameters, 1 - rate)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, on the CPU."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for rate, average in self.averages.items():
            found |= {f"ema-{rate}.{name}": tensor for name, tensor in average.items()}
        for name, parameter in self.model.named_parameters():
            found |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: tensor.detach().cpu() for name, tensor in found.items()}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Take over a checkpoint's state."""
        tensors = checkpoint.tensors
        self.model.load_state_dict(_under("model.", tensors))
        for rate, average in self.averages.items():
            for name, tensor in _under(f"ema-{rate}.", tensors).items():
                average[name].copy_(tensor)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"].clone().to("cpu" if key == "step" else parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.position, self.bad_steps = checkpoint.position, checkpoint.facts["bad_steps"]


def train_loop(config: AdmConfig | NoisyClassifierConfig, context: WorkerContext) -> None:
    """What every worker runs: from the last checkpoint to the end, or until the driver wants to stop."""
    run = config.path(config.output)
    manifest = load_manifest(config.path(config.dataset))
    order = _order(config, manifest)
    diffusion = Diffusion(config.diffusion)
    losses = adm_losses(config, diffusion) if isinstance(config, AdmConfig) else classifier_losses(config, diffusion)

    # Go on from the newest sound checkpoint.
    state = TrainingState(config, context.device)
    if (checkpoint := _agreed_checkpoint(run, context)) is not None:
        state.restore(checkpoint)
        log.info("resuming at %d images", state.position)
    model: nn.Module = state.model
    if context.world_size > 1:
        model = DistributedDataParallel(state.model)
    model.train()

    stream = batches(
        manifest,
        order,
        rank=context.rank,
        world_size=context.world_size,
        position=state.position,
        image_size=config.model.image_size,
        crop=config.crop,
        flip=config.flip,
        end=_length(config),
        use_ray=context.streams_on_cluster,
    )
    meter = Meter(config, context)
    while state.position < _length(config):
        # One step: this worker's images, their losses, one update.
        with meter.waiting():
            batch = Batch(next(stream), config.model.in_channels, config.order.seed, context.device)
        torch.manual_seed(_dropout_seed(config, state.position, context.rank))
        terms = losses(model, batch)
        state.optimizer.zero_grad(set_to_none=True)
        terms["loss"].mean().backward()
        gradient_norm = _step(config, state)
        state.position += config.batch_size
        meter.add(terms, gradient_norm, state)

        # Pictures and checkpoints at their marks; stopping at a step's end, all workers together.
        stopping = _agreed(context, context.stopping())
        if isinstance(config, AdmConfig) and context.rank == 0 and _passed(config.preview_images, config, state):
            context.report(_preview(config, state, manifest, context.device))
        if stopping or _passed(config.checkpoint_images, config, state) or state.position >= _length(config):
            if context.rank == 0:
                facts = {"bad_steps": state.bad_steps}
                checkpoints.save_checkpoint(run, checkpoints.Checkpoint(state.position, state.tensors(), facts))
            if stopping:
                return
    if context.rank == 0:
        _write_weights(config, run, state, manifest)


def _step(config: TrainingConfig, state: TrainingState) -> float:
    """One update of weights and averages; skipped where the gradient is not finite. Answers the gradient's norm.

    Raises:
        RuntimeError: more than `max_bad_steps` steps in a row were skipped.
    """
    limit = config.clip_norm or float("inf")
    norm = float(nn.utils.clip_grad_norm_(state.model.parameters(), limit))
    if not np.isfinite(norm):  # the gradient is reduced already, so all workers see the same
        state.bad_steps += 1
        if state.bad_steps > config.max_bad_steps:
            raise RuntimeError(
                f"the gradient was not finite in {state.bad_steps} steps in a row, at {state.position:,} images: "
                "lower learning_rate, or look at the last images"
            )
        return norm
    state.bad_steps = 0
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.position)
    state.optimizer.step()
    state.update_averages()
    return norm


def learning_rate(config: TrainingConfig, position: int) -> float:
    """The learning rate of the step that starts at `position` images: warm-up, then constant or linear to zero."""
    warm = min(1.0, (position + config.batch_size) / config.warmup_images) if config.warmup_images else 1.0
    left = 1 - position / _length(config) if config.anneal else 1.0
    return config.learning_rate * warm * left


def _dropout_seed(config: TrainingConfig, position: int, rank: int) -> int:
    """Another dropout mask for every step and worker, the same again after a resume."""
    return int(keyed_rng(Purpose.DROPOUT, config.order.seed, position, rank).integers(2**63))


def _agreed(context: WorkerContext, wish: bool) -> bool:
    """Whether any worker wishes so; all get the same answer."""
    if context.world_size == 1:
        return wish
    flag = torch.tensor(float(wish), device=context.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _agreed_checkpoint(run: str, context: WorkerContext) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from. Rank 0 chooses for all: a dying writer may commit another one meanwhile."""
    found = checkpoints.latest_checkpoint(run) if context.rank == 0 else None
    if context.world_size == 1:
        return found
    position = torch.tensor(found.position if found else -1, device=context.device)
    torch.distributed.broadcast(position, src=0)
    if context.rank == 0 or position < 0:
        return found
    return checkpoints.read_checkpoint(run, int(position))


def _passed(every: int, config: TrainingConfig, state: TrainingState) -> bool:
    """Whether the step just done went over a multiple of `every` images."""
    return state.position // every > (state.position - config.batch_size) // every


def _write_weights(
    config: AdmConfig | NoisyClassifierConfig, run: str, state: TrainingState, manifest: Manifest
) -> None:
    """Every average of the weights (or, where there is none, the weights) as a file that carries its architecture."""
    snapshots = {f"ema-{rate}": average for rate, average in state.averages.items()}
    for name, weights in (snapshots or {"raw": state.model.state_dict()}).items():
        uri = storage.join(run, "weights", f"images-{state.position:012d}-{name}.safetensors")
        checkpoints.save_weights(uri, weights, config.model, config.diffusion, manifest.classes)


def _preview(config: AdmConfig, state: TrainingState, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """A picture of samples by the last average, on noise and labels that are the same every time."""
    module = checkpoints.build(config.model).to(device).eval()
    module.load_state_dict(state.averages[config.ema_rates[-1]])
    network = checkpoints.Network(module, config.model, config.diffusion, manifest.classes, sha256="")
    indices = np.arange(PREVIEW_SAMPLES)
    labels, small = indices % max(1, len(manifest.classes)), None
    if config.model.low_res_size:  # an upsampler is shown on real images, made small
        pixels, labels = read_images(manifest, "train", 0, PREVIEW_SAMPLES, config.model.image_size)
        small = to_uint8(shrink(from_uint8(torch.from_numpy(pixels)), config.model.low_res_size)).numpy()
    images = sample_batch(network, config.preview, indices, labels, config.order.seed, low_res=small)
    return {"picture": f"samples/images-{state.position:012d}.png", "png": grid_png(images, columns=10)}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Meter:
    """Running means of one worker's numbers, reported by rank 0 every `log_images` images."""

    def __init__(self, config: TrainingConfig, context: WorkerContext) -> None:
        self._config, self._context = config, context
        self._sums: dict[str, Tensor] = {}
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._wait_from = 0.0

    def waiting(self) -> "Meter":
        """A context that counts its time as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._wait_from = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._wait_from

    def add(self, terms: dict[str, Tensor], gradient_norm: float, state: TrainingState) -> None:
        """Take in one step's loss terms [n], and report where a mark is passed."""
        t = terms.pop("t")
        quartile = (4 * t) // self._config.diffusion.num_timesteps
        for name, values in terms.items():
            values = values.detach()
            self._add(name, values.mean())
            for q in range(4):
                inside = quartile == q
                self._add(f"{name}_q{q}", (values * inside).sum() / inside.sum().clamp(min=1), inside.any())
        self._add("gradient_norm", torch.tensor(gradient_norm))
        self._steps += 1
        if self._context.rank == 0 and _passed(self._config.log_images, self._config, state):
            self._report(state)

    def _add(self, name: str, value: Tensor, counts: Tensor | None = None) -> None:
        weight = torch.ones(()) if counts is None else counts.float()
        pair = torch.stack([value.double().cpu() * weight.cpu(), weight.double().cpu()])
        self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

    def _report(self, state: TrainingState) -> None:
        elapsed = time.perf_counter() - self._since
        means = {name: float(total / count) for name, (total, count) in self._sums.items() if count > 0}
        squares = [tensor.detach().square().sum() for tensor in state.model.parameters()]
        metrics = means | {
            "images_per_second": self._steps * self._config.batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
            "learning_rate": learning_rate(self._config, state.position - self._config.batch_size),
            "parameter_norm": float(torch.stack(squares).sum().sqrt()),
        }
        self._context.report({"images": state.position, "metrics": metrics})
        self._sums, self._steps, self._waited, self._since = {}, 0, 0.0, time.perf_counter()
