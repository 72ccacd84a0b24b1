"""Costs: FLOPs agree with published ones, evaluations with those of the samplers, peak memory with closed forms.

Source: ADM (arXiv 2105.05233) table 7 for the theoretical speed of training.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from models.costs import (
    Evaluations,
    LiveBytes,
    count_parameters,
    forward_multiply_adds,
    peak_memory,
    sampling_evaluations,
    sampling_flops,
    training_flops,
)
from models.diffusion import Diffusion, DiffusionConfig, Prediction, Timestep
from models.guidance import WHOLE_CHAIN, GuidanceConfig, guided
from models.samplers import SAMPLERS, SamplerConfig, final_x, respacing_for, sample
from models.unet import ClassifierConfig, UNetConfig
from models.zoo import ZOO
from tests.models.gaussian import Gaussian
from tests.models.published import FAST, PAPER_PEAK, TABLE_7

SMALL = UNetConfig(
    image_size=16, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,), num_heads=1
)


# giga multiply-adds of a forward pass; papers that say 1120 "GFLOPs" for adm-256 mean these
FAST_GMAC = {"adm-64": 109.7, "adm-256": 1119.8, "classifier-64": 19.1, "classifier-256": 73.3}
SLOW_GMAC = {"adm-128": 306.9, "adm-512": 1982.3, "classifier-128": 21.0, "classifier-512": 112.8}


@pytest.mark.parametrize("name", [*FAST_GMAC, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_GMAC)])
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    assert forward_multiply_adds(ZOO[name].network) / 1e9 == pytest.approx((FAST_GMAC | SLOW_GMAC)[name], abs=0.1)


def test_multiply_adds_of_one_convolution_are_counted_by_hand() -> None:
    config = UNetConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_heads=1
    )
    wider = config.model_copy(update={"in_channels": 4})
    added = forward_multiply_adds(wider) - forward_multiply_adds(config)
    assert added == 8 * 8 * 3 * 3 * 32  # one more input channel of the first convolution


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in TABLE_7 if n not in FAST)])
def test_flops_are_those_of_the_papers_theoretical_speed(name: str) -> None:
    theoretical, _ = TABLE_7[name]
    assert PAPER_PEAK / training_flops(ZOO[name].network) == pytest.approx(theoretical, rel=0.01)


def test_sampling_counts_two_flops_a_multiply_add_and_two_passes_of_the_classifier() -> None:
    network, classifier = ZOO["adm-64"].network, ZOO["classifier-64"].network
    assert sampling_flops(Evaluations(1, 0), network, None) == pytest.approx(2 * 109.7e9, rel=1e-3)
    guided_everywhere = sampling_flops(Evaluations(10, 10), network, classifier)
    assert guided_everywhere == pytest.approx(10 * 2 * (109.7e9 + 2 * 19.06e9), rel=1e-3)
    guided_in_part = sampling_flops(Evaluations(10, 4), network, classifier)
    assert guided_in_part == pytest.approx(2 * (10 * 109.7e9 + 4 * 2 * 19.06e9), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "interval", "expected"),
    [
        ("ddpm", WHOLE_CHAIN, (10, 10)),  # 0, 111, ..., 999
        ("ddpm", (0.2, 0.8), (10, 6)),  # 222 to 777
        ("ddpm", (222 / 999, 777 / 999), (10, 6)),  # both ends are guided
        ("ddpm", (112 / 999, 221 / 999), (10, 0)),
        ("ddim", (0.0, 0.5), (10, 6)),  # 0, 100, ..., 500
        ("heun", WHOLE_CHAIN, (19, 19)),  # every step but the last evaluates twice
        ("heun", (0.2, 0.8), (19, 12)),
        ("heun", (0.9, 1.0), (19, 1)),  # nothing looks ahead to the noisiest timestep
        ("heun", (0.0, 0.1), (19, 2)),
    ],
)
def test_evaluations_are_those_inside_the_interval(
    name: str, interval: tuple[float, float], expected: tuple[int, int]
) -> None:
    sampler = SamplerConfig(name=name, num_steps=10)
    assert sampling_evaluations(sampler, GuidanceConfig(scale=1, interval=interval), DiffusionConfig()) == expected
    assert sampling_evaluations(sampler, GuidanceConfig(interval=interval), DiffusionConfig()) == (expected[0], 0)
    assert Evaluations(*expected).total == sum(expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_those_that_the_sampler_makes(name: str) -> None:
    spacings = (None,) if name == "edm" else (None, "6,4")
    for respacing, interval in product(spacings, (WHOLE_CHAIN, (0.2, 0.8), (0.0, 0.0001), (0.95, 1.0))):
        sampler = SamplerConfig(name=name, num_steps=10, respacing=respacing)
        guidance = GuidanceConfig(scale=1.0, interval=interval)
        for config in (guidance, GuidanceConfig()):
            expected = sampling_evaluations(sampler, config, DiffusionConfig())
            assert count_evaluations(sampler, config) == expected, (respacing, interval)


def count_evaluations(sampler: SamplerConfig, guidance: GuidanceConfig) -> Evaluations:
    """Run a chain and count the calls of its two networks."""
    diffusion = Diffusion(DiffusionConfig(), respacing_for(sampler, 1000))
    exact, calls = Gaussian().denoiser(diffusion), {"model": 0, "guide": 0}

    def denoise(x_t: Tensor, t: Timestep) -> Prediction:
        calls["model"] += 1
        return exact(x_t, t)

    def classifier(x: Tensor, timesteps: Tensor) -> Tensor:
        calls["guide"] += 1
        return x.flatten(1)

    x_T, y = torch.ones(2, 2, 1, 1), torch.tensor([0, 1])
    guided_denoise = guided(denoise, sampler.name, classifier, diffusion, y, guidance)
    final_x(sample(sampler, guided_denoise, diffusion, x_T, lambda t: torch.ones_like(x_T)))
    return Evaluations(**calls)


def test_evaluations_of_an_impossible_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="no integer stride"):
        sampling_evaluations(SamplerConfig(name="ddim", num_steps=300), GuidanceConfig(), DiffusionConfig())


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


def test_recomputation_and_half_precision_save_memory() -> None:
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
