"""The microbatches of a training step and their losses."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.diffusion import Diffusion, TimestepSampler
from models.images import area_downsample, from_uint8
from orchestrator.data.dataset import StreamShare
from orchestrator.order import Purpose, sample_rng
from orchestrator.training.config import Config, NoisyClassifierConfig

Terms = dict[str, Tensor]  # float [n] by name; "loss" is minimised, "t" int64 [n] are timesteps
Network = Callable[..., Tensor]
Losses = Callable[[Network, "Microbatch"], Terms]


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One microbatch of a worker. The noise and u of a row depend only on (seed, epoch, sample)."""

    x_start: Tensor  # float32 [n, C, H, W] in [-1, 1]
    labels: Tensor  # int64 [n]
    noise: Tensor  # float32, of the shape of x_start
    u: np.ndarray  # float64 [n] in [0, 1), from which timesteps are computed
    samples: np.ndarray  # int64 [n], index of each row in the dataset
    flips: np.ndarray  # bool [n], whether a row is mirrored
    stream: int  # canonical stream of the first row
    offset: int  # of the first row in the share of its stream

    def to(self, device: torch.device) -> "Microbatch":
        """Return the microbatch on a device; the copy from pinned memory is asynchronous."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("x_start", "labels", "noise")}
        return replace(self, **moved)


def make_microbatches(
    shares: list[StreamShare], config: Config, rows: int, pin_memory: bool = False, label_dropout: float = 0.0
) -> list[Microbatch]:
    """Split a worker's shares of a step into microbatches of `rows` rows (the last may be smaller), on the CPU.

    Each label is replaced by that of the null class, model.num_classes, with probability `label_dropout`.

    Raises:
        ValueError: an image is coloured, and the network has one channel.
    """
    channels, seed = config.model.in_channels, config.seed
    images = np.concatenate([share.images for share in shares])
    if channels == 1 and not (images[..., :1] == images).all():
        raise ValueError(
            "--model.in-channels 1 is for grey images, but some images of the dataset are coloured; "
            "pass --model.in-channels 3"
        )
    labels = np.concatenate([share.labels for share in shares])
    samples = np.concatenate([share.samples for share in shares])
    flips = np.concatenate([share.flips for share in shares])
    keys = [(share.epoch, int(sample)) for share in shares for sample in share.samples]
    if label_dropout:
        dropped = [sample_rng(seed, *key, Purpose.LABEL_DROPOUT).random() < label_dropout for key in keys]
        assert config.model.num_classes is not None, "checked before the training starts"
        labels = np.where(dropped, config.model.num_classes, labels)
    origins = [(share.stream, offset) for share in shares for offset in range(len(share.samples))]
    batches = []
    for begin in range(0, len(keys), rows):
        part = slice(begin, begin + rows)
        x_start = from_uint8(torch.from_numpy(images[part]), channels)
        shape = x_start.shape[1:]
        noises = [sample_rng(seed, *key, Purpose.NOISE).standard_normal(shape, np.float32) for key in keys[part]]
        u = np.array([sample_rng(seed, *key, Purpose.TIMESTEP).random() for key in keys[part]])
        x_start, y, noise = (
            tensor.pin_memory() if pin_memory else tensor
            for tensor in (x_start.contiguous(), torch.from_numpy(labels[part]), torch.from_numpy(np.stack(noises)))
        )
        batches.append(Microbatch(x_start, y, noise, u, samples[part], flips[part], *origins[begin]))
    return batches


def blank_microbatch(config: Config, rows: int) -> Microbatch:
    """Return a microbatch of zeros, for which a network is compiled."""
    x = torch.zeros(rows, config.model.in_channels, config.model.image_size, config.model.image_size)
    zeros = np.zeros(rows, np.int64)
    u, flips = np.zeros(rows), np.zeros(rows, bool)
    return Microbatch(x, torch.from_numpy(zeros), torch.zeros_like(x), u, zeros, flips, 0, 0)


def make_losses(config: Config, timesteps: TimestepSampler) -> Losses:
    """Return a function that computes the losses of a diffusion model or a noisy classifier."""
    make = classifier_losses if config.model.kind == "classifier" else adm_losses
    return make(config, Diffusion(config.diffusion), timesteps)


def adm_losses(config: Config, diffusion: Diffusion, timesteps: TimestepSampler) -> Losses:
    """Return the losses of a diffusion model, conditioned on class and low-resolution image if the model is.

    With a loss-aware timestep sampler, "loss" includes its weights and "unweighted_loss" does not.
    """

    def losses(model: Network, batch: Microbatch) -> Terms:
        t, weights = _draw_timesteps(batch, timesteps)
        condition = {"y": batch.labels} if config.model.num_classes else {}
        if config.model.low_res_size:
            condition["low_res"] = area_downsample(batch.x_start, config.model.low_res_size)
        terms = diffusion.losses(model, batch.x_start, t, batch.noise, **condition)
        if config.timesteps == "uniform":
            return terms | {"t": t}
        return terms | {"loss": terms["loss"] * weights, "unweighted_loss": terms["loss"], "t": t}

    return losses


def classifier_losses(config: Config, diffusion: Diffusion, timesteps: TimestepSampler) -> Losses:
    """Return the losses of a noisy classifier (ADM section 4.1): cross entropy, top-1 and top-5 accuracy.

    With `noised=False` the images stay clean and the timestep is 0, as in the published code.
    """
    assert isinstance(config, NoisyClassifierConfig) and config.model.num_classes, "a classifier has classes"
    top, noised = min(5, config.model.num_classes), config.noised

    def losses(model: Network, batch: Microbatch) -> Terms:
        t, _ = _draw_timesteps(batch, timesteps)
        x_t = diffusion.q_sample(batch.x_start, t, batch.noise) if noised else batch.x_start
        t = t if noised else torch.zeros_like(t)
        logits = model(x_t, diffusion.model_timesteps(t, x_t))
        loss = cross_entropy(logits, batch.labels, reduction="none")
        correct = logits.detach().topk(top, dim=1).indices == batch.labels[:, None]
        return {"loss": loss, "accuracy": correct[:, 0].float(), "accuracy_top5": correct.any(dim=1).float(), "t": t}

    return losses


def _draw_timesteps(batch: Microbatch, timesteps: TimestepSampler) -> tuple[Tensor, Tensor]:
    """Return timesteps int64 [n] and loss weights float32 [n] from the u of the rows, on the device of the batch."""
    t, weights = timesteps.draw(batch.u)
    device = batch.x_start.device

    def to_device(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return to_device(t), to_device(weights)
