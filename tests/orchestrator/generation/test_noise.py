"""Test that noise drawn ahead is the noise of its keys in the order of the plan."""

import numpy as np
import pytest
import torch

from orchestrator.generation.noise import Draw, draw_noise, noise_ahead
from orchestrator.order import Purpose, index_rng

KEYS = [Draw((8, 9, 10), (3, 4, 4), Purpose.STEP, timestep) for timestep in range(40)]


def test_the_noise_of_an_index_does_not_depend_on_its_batch() -> None:
    noise = draw_noise(5, Draw((3, 17), (2, 4, 4), Purpose.START))
    expected = index_rng(5, 17, Purpose.START).standard_normal((2, 4, 4), np.float32)
    assert noise.shape == (2, 2, 4, 4) and np.array_equal(noise[1].numpy(), expected)


def test_noise_drawn_ahead_is_bit_equal() -> None:
    with noise_ahead(2**63, KEYS) as draw:
        for key in KEYS:
            assert torch.equal(draw(key), draw_noise(2**63, key))


def test_an_unplanned_request_is_refused() -> None:
    with noise_ahead(0, KEYS) as draw, pytest.raises(RuntimeError, match="is not the next in the plan"):
        draw(KEYS[1])
