"""Test the microbatches of a step, and the losses of the noisy classifier."""

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion, UniformTimesteps
from orchestrator.data.dataset import StreamShare
from orchestrator.training.losses import Microbatch, classifier_losses, make_microbatches
from orchestrator.training.presets import adm_presets, classifier_presets

DIGITS = adm_presets()["digits"][1]


def share_of(images: np.ndarray, samples: np.ndarray, epoch: int = 0) -> StreamShare:
    none = np.zeros(len(samples), bool)
    return StreamShare(
        stream=0, epoch=epoch, images=images, labels=samples % 10, samples=samples, flips=none, undecodable=none
    )


def test_a_network_of_one_channel_refuses_coloured_images() -> None:
    images = np.full((2, 8, 8, 3), 7, np.uint8)
    share = share_of(images, np.arange(2))
    assert make_microbatches([share], DIGITS, rows=2)[0].x_start.shape == (2, 1, 8, 8)
    images[1, 3, 3, 2] = 8
    with pytest.raises(ValueError, match=r"--model\.in-channels 1 is for grey images"):
        make_microbatches([share], DIGITS, rows=2)


def test_labels_are_dropped_by_seed_epoch_and_sample() -> None:
    """The same samples lose their labels for every distribution to workers and microbatches."""
    count = 4_000

    def labels(rows: slice, microbatch: int, epoch: int = 0, seed: int = 3) -> np.ndarray:
        samples = np.arange(count)[rows]
        share = share_of(np.zeros((len(samples), 2, 2, 3), np.uint8), samples, epoch)
        config = DIGITS.model_copy(update={"seed": seed})
        microbatches = make_microbatches([share], config, microbatch, label_dropout=0.1)
        return np.concatenate([batch.labels.numpy() for batch in microbatches])

    expected = labels(slice(None), 512)
    is_kept = expected < 10
    assert (expected[is_kept] == np.arange(count)[is_kept] % 10).all() and set(expected[~is_kept]) == {10}
    assert abs((~is_kept).mean() - 0.1) < 4 * (0.09 / count) ** 0.5
    halves = [labels(slice(None, 1_000), 64), labels(slice(1_000, None), 300)]
    assert (np.concatenate(halves) == expected).all()
    assert (labels(slice(None), 512, epoch=1) != expected).any() and (
        labels(slice(None), 512, seed=4) != expected
    ).any()


@pytest.mark.parametrize("noised", [True, False])
def test_the_classifier_receives_noised_images_at_their_timesteps_or_clean_ones_at_0(noised: bool) -> None:
    config = classifier_presets()["digits"][1].model_copy(update={"noised": noised})
    rng = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 1, 8, 8, generator=rng) for _ in range(2))
    zeros = np.zeros(4, np.int64)
    received: list[tuple[torch.Tensor, torch.Tensor]] = []

    def network(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        received.append((x, timesteps))
        return torch.zeros(4, 10)

    losses = classifier_losses(config, Diffusion(config.diffusion), UniformTimesteps(config.diffusion.num_timesteps))
    u = np.array([0.1, 0.4, 0.6, 0.9])
    losses(network, Microbatch(x_start, torch.arange(4), noise, u, zeros, zeros > 0, 0, 0))
    ((x, timesteps),) = received
    if noised:
        assert (x != x_start).all() and (timesteps.diff() > 0).all()
    else:
        assert torch.equal(x, x_start) and (timesteps == 0).all()
