"""Peak memory: closed forms, and what must grow with what."""

import torch

from models.costs import LiveBytes, count_parameters, peak_memory
from models.unet import ClassifierConfig, UNetConfig
from models.zoo import ZOO

SMALL = UNetConfig(
    image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,), num_heads=1
)


def test_live_bytes_are_what_is_held_at_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1  # 800
        del a  # 400
        c = b[:50]  # a view is no new memory
        d = b * 2  # 800
        del b, c, d
    assert (live.peak, live.now) == (800, 0)


def test_training_holds_the_activations_of_every_image() -> None:
    eight, sixteen, thirty_two = (peak_memory(SMALL, "training", batch) for batch in (8, 16, 32))
    assert thirty_two - sixteen == 2 * (sixteen - eight) > 0, "in large batches activations are all that counts"
    assert peak_memory(SMALL, "training", 1) > 4 * count_parameters(SMALL), "in small ones the gradients"


def test_what_saves_memory_saves_it() -> None:
    plain = peak_memory(SMALL, "training", 8)
    recomputed = peak_memory(SMALL.model_copy(update={"gradient_checkpointing": True}), "training", 8)
    half = peak_memory(SMALL, "training", 8, half=True)
    forward_only = peak_memory(SMALL, "sampling", 8)
    assert forward_only < recomputed < plain
    assert half < plain


def test_a_guide_holds_its_activations() -> None:
    config = ZOO["classifier-64"].network
    assert isinstance(config, ClassifierConfig)
    assert peak_memory(config, "guiding", 4) > peak_memory(config, "sampling", 4)


def test_a_large_network_is_measured_without_its_memory() -> None:
    config = ZOO["adm-256"].network
    assert peak_memory(config, "training", 256, half=True) > 200 * 2**30, "no machine has that"
