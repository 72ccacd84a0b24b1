"""Samplers: generators that call `denoise` and yield a Step after every step of the chain.

Chain indices run from the last one down to 0. The caller provides the noise: `noise(t)` returns standard normal noise
with the shape of x for the *original* timestep t, so that chains of different lengths can share it. It is called only
if the noise is used: it is not called at t = 0 or by deterministic samplers.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from models.diffusion import Denoise, Diffusion, DiffusionConfig, Prediction, Timestep, space_timesteps

Noise = Callable[[int], Tensor]  # original timestep -> standard normal noise, shaped like x


@dataclass(frozen=True)
class Step:
    """The result of one step."""

    t: int  # chain index
    x: Tensor  # after the step
    pred_x_start: Tensor  # the predicted x_0


# Single steps at t, one chain index or int64 [B]


def ddpm_step(diffusion: Diffusion, prediction: Prediction, x_t: Tensor, t: Timestep, noise: Tensor) -> Tensor:
    """Return x_{t-1} by ancestral sampling (DDPM algorithm 2); no noise is added at t = 0."""
    sigma = torch.exp(0.5 * prediction.log_variance)
    return prediction.mean + diffusion.at("adds_noise", t, x_t) * sigma * noise


def ddim_step(
    diffusion: Diffusion, prediction: Prediction, x_t: Tensor, t: Timestep, noise: Tensor | None, eta: float
) -> Tensor:
    """Return x_{t-1} by DDIM eq. 12 with eta^2 times the posterior variance (eq. 16); eta = 0 needs no noise."""
    variance = eta**2 * diffusion.at("posterior_variance", t, x_t)  # 0 at t = 0
    direction = torch.sqrt(diffusion.at("one_minus_alphas_cumprod_prev", t, x_t) - variance)
    x = torch.sqrt(diffusion.at("alphas_cumprod_prev", t, x_t)) * prediction.pred_x_start
    x = x + direction * prediction.eps
    return x if noise is None else x + torch.sqrt(variance) * noise


def ddim_reverse_step(diffusion: Diffusion, prediction: Prediction, x_t: Tensor, t: Timestep) -> Tensor:
    """Return x_{t+1} by deterministic DDIM in reverse (DDIM section 4.3); at the last index it is pure noise."""
    alphas_cumprod_next = diffusion.at("alphas_cumprod_next", t, x_t)
    return (
        torch.sqrt(alphas_cumprod_next) * prediction.pred_x_start + torch.sqrt(1 - alphas_cumprod_next) * prediction.eps
    )


# Whole chains


def ddpm(denoise: Denoise, diffusion: Diffusion, x_T: Tensor, noise: Noise, start: int | None = None) -> Iterator[Step]:
    """Sample by ancestral sampling (DDPM algorithm 2); `start` is the chain index of x_T, by default the last one."""
    x = x_T
    for t in reversed(range(diffusion.num_timesteps if start is None else start + 1)):
        prediction = denoise(x, t)
        original = int(diffusion.timestep_map[t])
        x = ddpm_step(diffusion, prediction, x, t, noise(original)) if t > 0 else prediction.mean
        yield Step(t, x, prediction.pred_x_start)


def ddim(denoise: Denoise, diffusion: Diffusion, x_T: Tensor, noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """Sample by DDIM eq. 12; eta = 0 is deterministic, eta = 1 has the posterior variance of DDPM."""
    x = x_T
    for t in reversed(range(diffusion.num_timesteps)):
        prediction = denoise(x, t)
        z = noise(int(diffusion.timestep_map[t])) if eta > 0 and t > 0 else None
        x = ddim_step(diffusion, prediction, x, t, z, eta)
        yield Step(t, x, prediction.pred_x_start)


def ddim_reverse(denoise: Denoise, diffusion: Diffusion, x_0: Tensor) -> Iterator[Step]:
    """Encode x_0 by the DDIM ODE in reverse, over indices 0 to T' - 1; the last x is the latent x_T."""
    x = x_0
    for t in range(diffusion.num_timesteps):
        prediction = denoise(x, t)
        x = ddim_reverse_step(diffusion, prediction, x, t)
        yield Step(t, x, prediction.pred_x_start)


def dpm_solver(denoise: Denoise, diffusion: Diffusion, x_T: Tensor, noise: Noise) -> Iterator[Step]:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), ending with the predicted x_0.

    It is deterministic and of second order in the log signal-to-noise ratio, with one network evaluation for each step.
    The first step has no history and the last has no finite end point, so both are of first order.
    """
    alpha, sigma = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    lam = np.log(alpha / sigma)  # lam, h, d and r are the paper's names
    x, previous_x_start = x_T, None
    for t in reversed(range(diffusion.num_timesteps)):
        x_start = denoise(x, t).pred_x_start
        if t == 0:
            x = x_start
        else:
            h = lam[t - 1] - lam[t]
            d = x_start
            if previous_x_start is not None:
                extrapolation = float(h / (lam[t] - lam[t + 1])) / 2  # 1 / (2 r)
                d = x_start + extrapolation * (x_start - previous_x_start)
            x = float(sigma[t - 1] / sigma[t]) * x - float(alpha[t - 1] * np.expm1(-h)) * d
        yield Step(t, x, x_start)
        previous_x_start = x_start


def heun(denoise: Denoise, diffusion: Diffusion, x_T: Tensor, noise: Noise) -> Iterator[Step]:
    """Sample by Heun's second-order method on the DDIM ODE (DDIM eq. 14), ending with the predicted x_0.

    With the angle phi, where tan(phi) = sqrt((1 - abar) / abar), the ODE is dx / dphi = cos(phi) eps - sin(phi) x_0.
    Steps in phi stay bounded at the noisy end. Steps in tan(phi), as in Karras et al. 2022 (algorithm 1), diverge
    there, because tan(phi) is up to 2e4 for cosine schedules. Each step takes two network evaluations, and the last
    step takes one.
    """
    cos, sin = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    phi = np.arctan2(sin, cos)

    def slope(prediction: Prediction, t: int) -> Tensor:
        return float(cos[t]) * prediction.eps - float(sin[t]) * prediction.pred_x_start

    x = x_T
    for t in reversed(range(diffusion.num_timesteps)):
        prediction = denoise(x, t)
        if t == 0:
            x = prediction.pred_x_start
        else:
            step = float(phi[t - 1] - phi[t])
            start_slope = slope(prediction, t)
            end_slope = slope(denoise(x + step * start_slope, t - 1), t - 1)
            x = x + step * (start_slope + end_slope) / 2
        yield Step(t, x, prediction.pred_x_start)


class EdmStep(NamedTuple):
    """The noise levels of one step of EDM's sampler, with their chain indices."""

    start: float
    churned: float  # the level after adding noise; equal to `start` if none is added
    churned_t: int
    end: float
    end_t: int | None  # None = clean


def edm_steps(config: "SamplerConfig", diffusion: Diffusion) -> list[EdmStep]:
    """Return the steps of EDM's algorithm 2 (Karras et al. 2022, arXiv 2206.00364) over the model's own noise levels.

    A level is sigma = sqrt((1 - abar) / abar). The levels of eq. 5 and of the churn are rounded to the nearest level of
    the model, as the authors do for iDDPM models. With many steps, two consecutive levels can be equal.
    """
    levels = diffusion.sqrt_one_minus_alphas_cumprod / diffusion.sqrt_alphas_cumprod

    def nearest(sigma: float) -> tuple[float, int | None]:
        if sigma < levels[0] / 2:
            return 0.0, None
        t = int(np.abs(levels - sigma).argmin())
        return float(levels[t]), t

    low, high = (
        np.clip(sigma, levels[0], levels[-1]) ** (1 / config.rho) for sigma in (config.sigma_min, config.sigma_max)
    )
    sigmas = (high + np.arange(config.num_steps) / (config.num_steps - 1) * (low - high)) ** config.rho
    chain = [nearest(sigma) for sigma in sigmas] + [(0.0, None)]
    steps = []
    for (start, t), (end, end_t) in pairwise(chain):
        churned, churned_t = start, t
        if config.s_min <= start and (config.s_max is None or start <= config.s_max):
            churned, churned_t = nearest(start * (1 + min(config.s_churn / config.num_steps, math.sqrt(2) - 1)))
        assert churned_t is not None
        steps.append(EdmStep(start, churned, churned_t, end, end_t))
    return steps


def edm(denoise: Denoise, diffusion: Diffusion, x_T: Tensor, noise: Noise, config: "SamplerConfig") -> Iterator[Step]:
    """Sample by EDM's stochastic sampler (algorithm 2) on a discrete model; `noise` is called with the step's number.

    The state is x = sqrt(1 + sigma^2) x_t in float64, in which it takes Heun steps in sigma. The network receives x_t
    in float32. `diffusion` must not be respaced. Each step takes two network evaluations, and the last step takes one.
    """
    steps = edm_steps(config, diffusion)

    def predict_x_start(x: Tensor, sigma: float, t: int) -> Tensor:
        return denoise((x / math.sqrt(1 + sigma**2)).float(), t).pred_x_start.double()

    x = x_T.double() * steps[0].start
    for number, step in enumerate(steps):
        if step.churned > step.start:
            std = math.sqrt(step.churned**2 - step.start**2) * config.s_noise
            x = x + std * noise(number).double()
        x_start = predict_x_start(x, step.churned, step.churned_t)
        start_slope = (x - x_start) / step.churned
        delta = step.end - step.churned
        x_end = x + delta * start_slope
        if step.end_t is not None:
            end_slope = (x_end - predict_x_start(x_end, step.end, step.end_t)) / step.end
            x_end = x + delta * (start_slope + end_slope) / 2
        x = x_end
        yield Step(step.churned_t, (x / math.sqrt(1 + step.end**2)).float(), x_start.float())


# The registry, and the config that chooses from it


@dataclass(frozen=True)
class Sampler:
    """An entry of the registry of samplers."""

    run: Callable[..., Iterator[Step]]
    evaluations_per_step: int  # network evaluations; the last step always takes one
    stochastic: bool  # draws noise at every step, for any config
    guidance: Literal["mean", "score"]  # what classifier guidance shifts: ADM algorithm 1 or 2
    spacing: Literal["even", "stride", "levels"]  # of num_steps over timesteps: "250", "ddim250", or EDM's eq. 5
    takes_eta: bool = False  # draws noise if eta > 0


SAMPLERS = {
    "ddpm": Sampler(ddpm, 1, stochastic=True, guidance="mean", spacing="even"),
    "ddim": Sampler(ddim, 1, stochastic=False, guidance="score", spacing="stride", takes_eta=True),
    "dpm_solver": Sampler(dpm_solver, 1, stochastic=False, guidance="score", spacing="even"),
    "heun": Sampler(heun, 2, stochastic=False, guidance="score", spacing="even"),
    "edm": Sampler(edm, 2, stochastic=False, guidance="score", spacing="levels"),  # noise only at steps with churn
}

EDM_FIELDS = ("rho", "sigma_min", "sigma_max", "s_churn", "s_min", "s_max", "s_noise")  # of SamplerConfig

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]


class SamplerConfig(BaseModel, frozen=True, extra="forbid"):
    """The sampler and its steps."""

    name: SamplerName = "ddpm"  # dpm_solver is DPM-Solver++(2M); edm is algorithm 2 of arXiv 2206.00364
    num_steps: int = Field(250, ge=2)  # steps of the chain; heun and edm evaluate the network twice per step
    eta: float = Field(0.0, ge=0, le=1)  # ddim only: 0 = deterministic, 1 = ancestral; DDIM eq. 16
    respacing: str | None = None  # timesteps in the published syntax, such as "90,60,60,20,20"; None = by num_steps
    rho: float = Field(7.0, gt=0)  # edm only: larger values put more steps at small noise levels; eq. 5
    sigma_min: float = Field(0.002, gt=0)  # edm only: smallest noise level, sqrt((1 - abar) / abar)
    sigma_max: float = Field(80.0, gt=0)  # edm only: largest noise level
    s_churn: float = Field(0.0, ge=0)  # edm only: amount of noise that is added between steps; 0 = deterministic
    s_min: float = Field(0.0, ge=0)  # edm only: smallest noise level at which noise is added
    s_max: float | None = Field(None, gt=0)  # edm only: largest noise level at which noise is added; None = any
    s_noise: float = Field(1.0, gt=0)  # edm only: factor of the added noise

    @model_validator(mode="after")
    def _check_meaning(self) -> Self:
        if self.eta and not SAMPLERS[self.name].takes_eta:
            raise ValueError(f"eta={self.eta} has no effect with name={self.name!r}; use name='ddim' or eta=0")
        if self.name == "edm" and self.respacing is not None:
            raise ValueError(f"respacing={self.respacing!r} has no effect with name='edm'; leave it out")
        if self.name != "edm":
            for field in EDM_FIELDS:
                value = getattr(self, field)
                if value != type(self).model_fields[field].default:
                    raise ValueError(f"{field}={value:g} has no effect with name={self.name!r}; use name='edm'")
        return self


def respacing_for(config: SamplerConfig, num_timesteps: int) -> str:
    """Return config.respacing or, if it is None, the stride ("ddim25") or even spacing ("250") of the sampler.

    For EDM's sampler this is "", which means all timesteps.

    Raises:
        ValueError: num_timesteps has no such spacing, or config.respacing contradicts num_steps.
    """
    spacing, spec = SAMPLERS[config.name].spacing, config.respacing
    if spacing == "levels":
        return ""
    if spec is None:
        spec = f"ddim{config.num_steps}" if spacing == "stride" else str(config.num_steps)
    num_kept = len(space_timesteps(num_timesteps, spec))
    if num_kept != config.num_steps:
        raise ValueError(
            f"respacing={spec!r} keeps {num_kept} steps, but num_steps={config.num_steps}; make them equal"
        )
    return spec


def sample(config: SamplerConfig, denoise: Denoise, diffusion: Diffusion, x_T: Tensor, noise: Noise) -> Iterator[Step]:
    """Run the whole chain of the configured sampler; `diffusion` must be respaced by `respacing_for`."""
    sampler = SAMPLERS[config.name]
    options: dict[str, Any] = {}
    if sampler.takes_eta:
        options["eta"] = config.eta
    if sampler.spacing == "levels":
        options["config"] = config
    return sampler.run(denoise, diffusion, x_T, noise, **options)


def noise_timesteps(config: SamplerConfig, diffusion: Diffusion) -> list[int]:
    """Return the arguments with which `sample` calls `noise`, in order; an empty list if the chain is deterministic.

    They are original timesteps, and for EDM's sampler the numbers of its steps.
    """
    if SAMPLERS[config.name].spacing == "levels":
        return [number for number, step in enumerate(edm_steps(config, diffusion)) if step.churned > step.start]
    if SAMPLERS[config.name].stochastic or config.eta > 0:
        return [int(t) for t in diffusion.timestep_map[:0:-1]]  # all but the first timestep, noisiest first
    return []


def evaluated_timesteps(config: SamplerConfig, diffusion: DiffusionConfig) -> list[int]:
    """Return the original timestep of every network evaluation of one chain, in no particular order."""
    spacing = respacing_for(config, diffusion.num_timesteps)
    if SAMPLERS[config.name].spacing == "levels":
        steps = edm_steps(config, Diffusion(diffusion))
        return [t for step in steps for t in (step.churned_t, step.end_t) if t is not None]
    chain = [int(t) for t in space_timesteps(diffusion.num_timesteps, spacing)]
    return chain + chain[:-1] * (SAMPLERS[config.name].evaluations_per_step - 1)


def final_x(steps: Iterable[Step]) -> Tensor:
    """Run a chain to its end and return the final x; ValueError if the chain has no steps."""
    last = deque(steps, maxlen=1)
    if not last:
        raise ValueError("the chain has no steps")
    return last[0].x
