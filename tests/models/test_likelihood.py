"""Likelihood: for Gaussian data, every term of the bound has a closed form."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig
from models.likelihood import (
    BitsPerDim,
    bits_per_dim,
    interpolate,
    interpolated_latent,
    prior_bits_per_dim,
    progressive_coding,
    progressive_generation,
)
from models.samplers import ddim, ddim_reverse, ddpm, final_x
from tests.models.gaussian import Gaussian

DATA = Gaussian(mean=0.05, std=0.25)  # four standard deviations inside [-1, 1]
SIZE = 256


def process(respacing: str = "25") -> Diffusion:
    return Diffusion(DiffusionConfig(), respacing)


def noise(t: int, size: int = SIZE) -> Tensor:
    return torch.from_numpy(np.random.default_rng([5, t]).standard_normal((1, 1, size, size))).float()


def no_noise(t: int) -> Tensor:
    raise AssertionError(f"noise was drawn for timestep {t}")


def images() -> Tensor:
    """Return 8-bit images of Gaussian pixels, in [-1, 1]."""
    x = DATA.mean + DATA.std * np.random.default_rng([6]).standard_normal((1, 1, SIZE, SIZE))
    return torch.from_numpy(np.round((x + 1) * 127.5) / 127.5 - 1).float()


@cache
def gaussian_bits() -> tuple[Diffusion, BitsPerDim]:
    diffusion = process()
    return diffusion, bits_per_dim(DATA.denoiser(diffusion), diffusion, images(), noise)


def test_every_term_of_the_bound_has_its_closed_form() -> None:
    diffusion, bits = gaussian_bits()
    # E KL(q(x_{t-1} | x_t, x_0) || q(x_{t-1} | x_t)) of Gaussians is half the log ratio of their variances
    ratio = DATA.reverse_variance(diffusion)[1:] / diffusion.posterior_variance[1:]
    expected = torch.from_numpy(0.5 * np.log2(ratio)).flip(0)
    torch.testing.assert_close(bits.vb[0, :-1].double(), expected, atol=2e-3, rtol=0.02)
    variance = torch.from_numpy(DATA.x_start_variance(diffusion)).flip(0)
    torch.testing.assert_close(bits.x_start_mse[0].double(), variance, atol=1e-5, rtol=0.03)


def test_the_bound_is_the_entropy_of_the_data() -> None:
    _, bits = gaussian_bits()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * DATA.std**2) + math.log2(127.5)
    assert bits.total.item() == pytest.approx(entropy, abs=0.02)
    torch.testing.assert_close(bits.total, bits.prior + bits.vb.sum(dim=1))


def test_a_worse_model_needs_more_bits() -> None:
    diffusion, bits = gaussian_bits()
    wrong = Gaussian(DATA.mean + 0.1, DATA.std).denoiser(diffusion)
    assert bits_per_dim(wrong, diffusion, images(), noise).total > bits.total + 0.05


def test_the_prior_term_is_the_divergence_of_the_noisiest_step() -> None:
    diffusion = process("")
    x_start = torch.tensor([-1.0, 0.0, 0.7]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    abar = diffusion.alphas_cumprod[-1]
    exact = 0.5 * (abar * x_start[:, 0, 0, 0].double() ** 2 - abar - math.log1p(-abar)) / math.log(2)
    torch.testing.assert_close(prior_bits_per_dim(diffusion, x_start).double(), exact, atol=1e-7, rtol=0)


def test_progressive_coding_spends_bits_and_lowers_distortion() -> None:
    diffusion, bits = gaussian_bits()
    rate, distortion = progressive_coding(bits)
    assert rate.shape == distortion.shape == (1, diffusion.num_timesteps)
    torch.testing.assert_close(rate[:, 0], bits.prior.double())
    torch.testing.assert_close(rate[:, -1] + bits.vb[:, -1], bits.total.double(), atol=1e-5, rtol=0)
    assert (rate.diff(dim=1) > 0).all()
    assert (distortion.diff(dim=1) < 0.01).all()  # hardly anything is known from the noisiest steps
    assert distortion[0, 0].item() == pytest.approx(127.5 * DATA.std, rel=0.02)
    # Gaussian data: the rate-distortion function 0.5 log2(variance / mse) is a lower bound, and is met
    shannon = torch.log2(127.5 * DATA.std / distortion)
    torch.testing.assert_close(rate, shannon, atol=0.02, rtol=0.02)


def test_progressive_generation_keeps_the_last_prediction_of_each_slot() -> None:
    diffusion = process("10")
    x_T = noise(999, size=4)
    steps = list(ddpm(DATA.denoiser(diffusion), diffusion, x_T, lambda t: noise(t, size=4)))
    strip = progressive_generation(steps, every=4)
    assert strip.shape == (1, 3, 1, 4, 4)
    for slot, t in enumerate((8, 4, 0)):
        assert torch.equal(strip[:, slot], steps[9 - t].pred_x_start)


def test_interpolation_ends_at_its_two_images() -> None:
    diffusion = process("50")
    denoise = DATA.denoiser(diffusion)
    pair = (torch.full((1, 1, 4, 4), -0.4), torch.full((1, 1, 4, 4), 0.5))
    noises = (noise(1, size=4), noise(2, size=4))

    def reverse_noise(t: int) -> Tensor:
        return noise(t, size=4)

    for lam, end in ((0.0, 0), (1.0, 1)):
        actual = interpolate(denoise, diffusion, pair, noises, lam, 20, reverse_noise)
        x_t = diffusion.q_sample(pair[end], 20, noises[end])
        assert torch.equal(actual, final_x(ddpm(denoise, diffusion, x_t, reverse_noise, start=20)))
    # from t = 1 the images are reconstructed, and lambda = 0.5 lies between them
    ends = [interpolate(denoise, diffusion, pair, noises, lam, 1, reverse_noise).mean().item() for lam in (0, 0.5, 1)]
    assert ends == pytest.approx([-0.4, 0.05, 0.5], abs=0.05)
    latent = interpolated_latent(diffusion, pair, noises, 0.5, 20)
    variance = latent.double().var().item() / (1 - diffusion.alphas_cumprod[20])
    assert variance < 1, "the mixture of two noises has less variance than one"


def test_ddim_latents_are_the_ode_and_decode_to_the_image() -> None:
    diffusion = process("ddim250")
    denoise = DATA.denoiser(diffusion)
    x_start = torch.tensor([-0.5, 0.0, 0.4]).view(3, 1, 1, 1)
    latent = final_x(ddim_reverse(denoise, diffusion, x_start))
    exact = (x_start - DATA.mean) / DATA.std  # the ODE maps quantiles of the data to those of the noise
    torch.testing.assert_close(latent, exact, atol=0.1, rtol=0.1)
    decoded = final_x(ddim(denoise, diffusion, latent, no_noise))
    torch.testing.assert_close(decoded, x_start, atol=0.03, rtol=0)
