"""Gaussian data, for which the exact denoiser, the exact reverse step and the exact ODE are known."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.diffusion import Denoise, Diffusion, Prediction, Timestep


@dataclass(frozen=True)
class Gaussian:
    """Independent pixels ~ N(mean, std^2)."""

    mean: float = 0.3
    std: float = 0.5

    def marginal_variance(self, abar: NDArray[Any]) -> NDArray[Any]:
        """Return the variance of x_t."""
        return abar * self.std**2 + 1 - abar

    def x_start_variance(self, diffusion: Diffusion) -> NDArray[Any]:
        """Return the variance of x_0 given x_t, float64 [T']."""
        abar = diffusion.alphas_cumprod
        return self.std**2 * (1 - abar) / self.marginal_variance(abar)

    def reverse_variance(self, diffusion: Diffusion) -> NDArray[Any]:
        """Return the variance of x_{t-1} given x_t, float64 [T']."""
        return diffusion.posterior_variance + diffusion.posterior_mean_coef1**2 * self.x_start_variance(diffusion)

    def denoiser(self, diffusion: Diffusion) -> Denoise:
        """Return a denoiser that computes E[x_0 | x_t] and the exact reverse step."""
        variance = self.reverse_variance(diffusion)

        def denoise(x_t: Tensor, t: Timestep) -> Prediction:
            abar = torch.from_numpy(diffusion.alphas_cumprod)[t]
            exact = torch.from_numpy(variance)[t]
            if not isinstance(t, int):
                abar, exact = abar.view(-1, 1, 1, 1), exact.view(-1, 1, 1, 1)
            gain = self.std**2 * abar.sqrt() / (abar * self.std**2 + 1 - abar)
            x_start = (self.mean + gain * (x_t.double() - abar.sqrt() * self.mean)).float()
            return Prediction(
                eps=diffusion.eps_from_x_start(x_t, t, x_start),
                pred_x_start=x_start,
                mean=diffusion.q_posterior_mean(x_start, x_t, t),
                variance=exact.float(),
                log_variance=exact.log().float(),
            )

        return denoise

    def ode(self, x: Tensor, abar_from: float, abar_to: float) -> Tensor:
        """Return the exact solution of the DDIM ODE, which maps marginals to marginals."""
        scale = (self.marginal_variance(np.array(abar_to)) / self.marginal_variance(np.array(abar_from))) ** 0.5
        return abar_to**0.5 * self.mean + float(scale) * (x - abar_from**0.5 * self.mean)
