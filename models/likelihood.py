"""Likelihood of given images: bits per dimension, progressive coding and interpolation.

Sources: DDPM (Ho et al. 2020) sections 4.3 and 4.4, IDDPM (Nichol & Dhariwal 2021) section 3, DDIM (Song et
al. 2021) section 5.4. Images are [B, C, H, W] in [-1, 1]. Arrays over the chain are [B, T'] in the order of
generation: column i belongs to chain index T' - 1 - i.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.diffusion import Denoise, Diffusion, mean_flat, normal_kl
from models.samplers import Noise, Step, ddpm, final_x


@dataclass(frozen=True)
class BitsPerDim:
    """The variational bound and its terms, float32, in bits per dimension unless stated otherwise."""

    total: Tensor  # [B], prior + sum of vb
    prior: Tensor  # [B], KL(q(x_T | x_0) || N(0, 1))
    vb: Tensor  # [B, T'], the terms of the chain; the last one is the decoder's
    x_start_mse: Tensor  # [B, T'], mean squared error of the predicted x_0, images in [-1, 1]
    mse: Tensor  # [B, T'], mean squared error of the predicted noise


def prior_bits_per_dim(diffusion: Diffusion, x_start: Tensor) -> Tensor:
    """Return KL(q(x_T | x_0) || N(0, 1)) in bits per dimension [B]; it is near 0 if the schedule ends in pure noise."""
    t = diffusion.num_timesteps - 1
    mean = diffusion.at("sqrt_alphas_cumprod", t, x_start) * x_start
    log_variance = diffusion.at("log_one_minus_alphas_cumprod", t, x_start)
    zero = torch.zeros((), device=x_start.device)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)


def bits_per_dim(denoise: Denoise, diffusion: Diffusion, x_start: Tensor, noise: Noise) -> BitsPerDim:
    """Return the bound on -log2 p(x_0) per dimension (DDPM eq. 5), from one noise sample for each step of the chain.

    `x_start` must be 8-bit images scaled to [-1, 1], because the decoder term depends on grey levels. `noise` is called
    with original timesteps, including t = 0. Each step takes one network evaluation.
    """
    vb, x_start_mse, mse = [], [], []
    for t in reversed(range(diffusion.num_timesteps)):
        z = noise(int(diffusion.timestep_map[t]))
        x_t = diffusion.q_sample(x_start, t, z)
        prediction = denoise(x_t, t)
        vb.append(diffusion.vb_term(x_start, x_t, t, prediction))
        x_start_mse.append(mean_flat((prediction.pred_x_start - x_start) ** 2))
        mse.append(mean_flat((prediction.eps - z) ** 2))
    prior = prior_bits_per_dim(diffusion, x_start)
    terms = torch.stack(vb, dim=1)
    return BitsPerDim(
        total=terms.sum(dim=1) + prior,
        prior=prior,
        vb=terms,
        x_start_mse=torch.stack(x_start_mse, dim=1),
        mse=torch.stack(mse, dim=1),
    )


def progressive_coding(bits: BitsPerDim) -> tuple[Tensor, Tensor]:
    """Return rate and distortion of DDPM's figure 5, float64 [B, T'].

    Column i of the rate is the number of bits per dimension received before step i: the prior and the vb terms of
    earlier steps. Column i of the distortion is the root mean squared error of the x_0 predicted at step i, in grey
    levels 0..255.
    """
    received = torch.cat([bits.prior[:, None], bits.vb[:, :-1]], dim=1).double()
    return received.cumsum(dim=1), 127.5 * bits.x_start_mse.double().sqrt()


def progressive_generation(steps: Iterable[Step], every: int) -> Tensor:
    """Return the x_0 predicted along a chain, [B, n, C, H, W], noisiest first (DDPM figure 6).

    The chain is divided into n groups of `every` consecutive chain indices, and the last prediction of each group is
    returned, as in the published code.
    """
    last_of_group = {step.t // every: step.pred_x_start for step in steps}  # later steps overwrite earlier ones
    return torch.stack([last_of_group[group] for group in sorted(last_of_group, reverse=True)], dim=1)


def interpolate(
    denoise: Denoise,
    diffusion: Diffusion,
    x_starts: tuple[Tensor, Tensor],
    noises: tuple[Tensor, Tensor],
    lam: float,
    t: int,
    noise: Noise,
) -> Tensor:
    """Interpolate between two images by decoding (1 - lam) x_t + lam x_t' with the reverse process (DDPM section 4.4).

    Args:
        noises: independent noise for the encodings of the two images.
        t: the chain index of the encodings.
        noise: noise for decoding; it can be the same for all values of lam.
    """
    latent = interpolated_latent(diffusion, x_starts, noises, lam, t)
    return final_x(ddpm(denoise, diffusion, latent, noise, start=t))


def interpolated_latent(
    diffusion: Diffusion, x_starts: tuple[Tensor, Tensor], noises: tuple[Tensor, Tensor], lam: float, t: int
) -> Tensor:
    """Return (1 - lam) x_t + lam x_t' with x_t ~ q(x_t | x_0); its variance is smallest at lam = 0.5."""
    first, second = (diffusion.q_sample(x, t, z) for x, z in zip(x_starts, noises, strict=True))
    return (1 - lam) * first + lam * second
