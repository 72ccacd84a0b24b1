"""Conversions between pictures and network inputs."""

import torch

from models.images import area_downsample, from_uint8, to_uint8


def test_every_grey_level_survives_the_round_trip_up_to_the_published_truncation() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    x = from_uint8(levels)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    lost = to_uint8(x).int() - levels.int()
    assert set(lost.unique().tolist()) <= {-1, 0}, "truncation may lose one level, and never gains one"
    assert torch.equal(to_uint8(x + 1e-4), levels)


def test_values_outside_minus_1_to_1_are_clamped() -> None:
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 2, 2)
    assert to_uint8(x)[0, :, :, 0].flatten().tolist() == [0, 0, 255, 255]


def test_one_channel_is_grey() -> None:
    grey = torch.randint(0, 256, (2, 4, 4, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = from_uint8(grey.expand(-1, -1, -1, 3), channels=1)
    assert x.shape == (2, 1, 4, 4)
    assert torch.equal(to_uint8(x + 1e-4), grey.expand(-1, -1, -1, 3))


def test_area_downsampling_takes_means() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert area_downsample(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
