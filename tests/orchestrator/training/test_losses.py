"""The losses of the noisy classifier."""

import numpy as np
import torch
from torch import Tensor

from models.diffusion import Diffusion, UniformTimesteps
from orchestrator.training.losses import Microbatch, classifier_losses
from orchestrator.training.presets import classifier_presets


def inputs_of_the_network(noised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images of a microbatch, and the images and timesteps that the classifier receives."""
    config = classifier_presets()["digits"][1].model_copy(update={"noised": noised})
    rng = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 1, 8, 8, generator=rng) for _ in range(2))
    zeros = np.zeros(4, np.int64)
    labels, u = torch.arange(4), np.array([0.1, 0.4, 0.6, 0.9])
    received: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        received.append((x, timesteps))
        return torch.zeros(4, 10)

    losses = classifier_losses(config, Diffusion(config.diffusion), UniformTimesteps(config.diffusion.num_timesteps))
    losses(network, Microbatch(x_start, labels, noise, u, zeros, zeros > 0, 0, 0))
    return x_start, *received[0]


def test_the_noisy_classifier_sees_noised_images_at_their_timesteps() -> None:
    x_start, x, timesteps = inputs_of_the_network(noised=True)
    assert (x != x_start).all() and (timesteps.diff() > 0).all()


def test_the_classifier_of_clean_images_sees_them_at_timestep_0() -> None:
    x_start, x, timesteps = inputs_of_the_network(noised=False)
    assert torch.equal(x, x_start) and (timesteps == 0).all()
