"""Feature networks: functions from uint8 images to the arrays that metrics are computed from.

An extractor is any object with `name`, `dimension` and `num_classes` that maps a batch of uint8 images [B, H, W, 3] to
`Features`. The names of distances include its name, such as `fd_digits`; only the Inception network with its published
weights gives `fid`. The last bits of a convolution can depend on the batch size, so `extract` always runs full batches.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.images import from_uint8


@dataclass(frozen=True)
class Features:
    """Features of B images, float32 on the host."""

    pool: NDArray[np.float32]  # [B, D] pooled features, for Fréchet distance, KID and nearest neighbours
    spatial: NDArray[np.float32] | None = None  # [B, S] features that keep positions, for sFID
    logits: NDArray[np.float32] | None = None  # [B, K] class scores, for Inception Score and accuracy


class Extractor(Protocol):
    """The interface of feature networks, which map images uint8 [B, H, W, 3] to features."""

    @property
    def name(self) -> str: ...  # the end of the names of its metrics

    @property
    def dimension(self) -> int: ...  # D, the number of pooled features

    @property
    def num_classes(self) -> int | None: ...  # K, the number of logits; None = it has none

    def __call__(self, images: NDArray[np.uint8]) -> Features: ...


def check_images(images: NDArray[np.uint8]) -> None:
    """Raise ValueError unless `images` is a non-empty uint8 array [N, H, W, 3]."""
    if images.dtype != np.uint8:
        raise ValueError(f"images have dtype {images.dtype}; expected uint8 with values 0..255")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {images.shape}; expected [N, H, W, 3] with N, H, W > 0")


def extract(extractor: Extractor, images: NDArray[np.uint8], batch_size: int) -> Features:
    """Return the features of images uint8 [N, H, W, 3], computed in batches of `batch_size`; the last one is padded.

    Therefore row i depends on image i, its position in the batch and `batch_size`, but not on N.

    Raises:
        ValueError: dtype or shape are wrong, or a feature is not finite.
    """
    check_images(images)
    batches = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        if len(batch) < batch_size:
            batch = batch[np.arange(batch_size) % len(batch)]  # padded by repeating its images
        batches.append(extractor(batch))

    def concatenate(name: str) -> NDArray[np.float32] | None:
        arrays = [getattr(features, name) for features in batches]
        return None if arrays[0] is None else np.concatenate(arrays)[: len(images)]

    pool, spatial, logits = (concatenate(name) for name in ("pool", "spatial", "logits"))
    if pool is None or not np.isfinite(pool).all():
        raise ValueError(f"extractor {extractor.name!r} returned features with NaN or infinity")
    return Features(pool, spatial, logits)


def fold_batch_norm(
    unit: str, eps: float, weight: Tensor, gain: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one convolution that replaces a convolution without bias and its batch norm.

    Args:
        unit: the name of the convolution, for error messages.

    Raises:
        ValueError: the shapes do not fit.
    """
    if weight.ndim != 4 or any(vector.shape != weight.shape[:1] for vector in (gain, bias, mean, var)):
        raise ValueError(
            f"{unit}: the batch norm does not have one value for each output channel of a convolution of shape "
            f"{tuple(weight.shape)}"
        )
    scale = gain / torch.sqrt(var + eps)
    return weight * scale[:, None, None, None], bias - mean * scale


class DigitsNetwork(nn.Module):
    """A small convolutional network for handwritten digits, with 32 pooled features and 10 logits.

    Images are resized to 16x16 first, so that one network is used for 8x8 and for 16x16 scans. The activation is
    smooth, so that every feature varies between images and the covariance is not singular. `train_digits_network`
    trains one.
    """

    name = "digits"
    dimension = 32
    num_classes = 10
    size = 16  # pixels, to which images are resized
    _accuracy: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.SiLU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.SiLU(),
            nn.Conv2d(48, self.dimension, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.dimension, self.num_classes)
        self.register_buffer("_accuracy", torch.tensor(torch.nan, dtype=torch.float64))

    @property
    def held_out_accuracy(self) -> float:
        """Return the accuracy on held-out digits, measured at the end of the training; NaN before."""
        return float(self._accuracy)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "DigitsNetwork":
        """Return the network with the tensors of `state`; names and shapes must match exactly."""
        network = cls()
        network.load_state_dict(state, strict=True)
        return network.eval()

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features [B, 32] and logits [B, 10] of x float [B, 3, H, W] in [-1, 1]."""
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic")
        pool = self.trunk(x).mean((2, 3))
        return pool, self.head(pool)

    @torch.inference_mode()
    def forward(self, images: NDArray[np.uint8]) -> Features:
        """Return `pool` and `logits` of images uint8 [B, H, W, 3]."""
        check_images(images)
        x = from_uint8(torch.from_numpy(np.ascontiguousarray(images)))
        pool, logits = self.embed(x.to(self.head.weight.device))
        return Features(pool.cpu().numpy(), None, logits.cpu().numpy())


def train_digits_network(
    images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int, num_epochs: int = 40
) -> DigitsNetwork:
    """Train a `DigitsNetwork` on two thirds of the images, and measure its accuracy on the others. This takes seconds.

    The split, the initial weights, the order and the shifts depend only on `seed`, not on the number of threads.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N] in 0..9.

    Raises:
        ValueError: a shape or a label is wrong.
    """
    check_images(images)
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= DigitsNetwork.num_classes:
        raise ValueError(f"labels have shape {labels.shape}; expected [{len(images)}] with values 0..9")
    rng = np.random.default_rng([seed, 0x0D1617])
    network = DigitsNetwork()
    _initialise(network, rng)
    order = rng.permutation(len(images))
    train, held_out = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    with _one_thread():
        x, y = from_uint8(torch.from_numpy(images[train])), torch.from_numpy(labels[train].astype(np.int64))
        _fit(network, x, y, num_epochs, rng)
        predicted = extract(network.eval(), images[held_out], batch_size=64).logits
    assert predicted is not None
    network._accuracy.fill_(float((predicted.argmax(1) == labels[held_out]).mean()))
    return network


def _fit(network: DigitsNetwork, x: Tensor, y: Tensor, num_epochs: int, rng: np.random.Generator) -> None:
    """Train by AdamW with a one-cycle learning rate, on randomly shifted images x [N, 3, H, W] with labels y [N]."""
    batch_size = min(64, len(x))
    steps_per_epoch = len(x) // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=num_epochs * steps_per_epoch)
    for _ in range(num_epochs):
        order = rng.permutation(len(x))
        for rows in np.split(order[: steps_per_epoch * batch_size], steps_per_epoch):
            _, logits = network.embed(_random_shift(x[rows], rng))
            loss = F.cross_entropy(logits, y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, because the number of threads changes the order in which gradients are summed."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _initialise(network: nn.Module, rng: np.random.Generator) -> None:
    """Set He-normal weights and zero biases from `rng`, independently of torch's global generator."""
    for parameter in network.parameters():
        scale = np.sqrt(2 / parameter[0].numel()) if parameter.ndim > 1 else 0.0  # biases have one dimension
        values = rng.standard_normal(tuple(parameter.shape), dtype=np.float32) * np.float32(scale)
        parameter.data.copy_(torch.from_numpy(values))


def _random_shift(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift each image of x [B, C, H, W] by up to W/8 pixels in both directions; the border becomes black (-1)."""
    max_shift = x.shape[-1] // 8
    padded = F.pad(x, (max_shift,) * 4, value=-1.0)
    corners = rng.integers(0, 2 * max_shift + 1, (len(x), 2))
    height, width = x.shape[-2:]
    return torch.stack([p[:, i : i + height, j : j + width] for p, (i, j) in zip(padded, corners, strict=True)])
