"""Classifier guidance (Dhariwal & Nichol 2021, section 4): wrappers from denoise to denoise.

A gradient function gives scale * grad log p(y | x_t) at a step's own input and timestep, or None where it
is off; the two wrappers put it into the mean (algorithm 1) or into the predicted noise (algorithm 2).
"""

from collections.abc import Callable

import torch
from pydantic import BaseModel, Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from models.diffusion import Denoise, Diffusion, Model, Prediction, Timestep
from models.samplers import SAMPLERS

Gradient = Callable[[Tensor, Timestep], Tensor | None]
Interval = tuple[float, float]  # fractions of the chain, 0 = clean, 1 = noise

WHOLE_CHAIN: Interval = (0.0, 1.0)

GRADIENT_NORM = 2.0**8  # of a sample's gradient at the logits, as it enters the backward pass


class GuidanceConfig(BaseModel, frozen=True, extra="forbid"):
    """How strongly, and where in the chain, the classifier guides."""

    scale: float = Field(0.0, ge=0)  # multiplies grad log p(y | x_t); 0 = unguided
    interval: Interval = WHOLE_CHAIN  # guided part of the chain, as fractions: 0 = clean, 1 = noise

    @field_validator("interval")
    @classmethod
    def _check_interval(cls, interval: Interval) -> Interval:
        return check_interval(interval)


def check_interval(interval: Interval) -> Interval:
    """Return `interval`; ValueError unless 0 <= low < high <= 1."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval={interval} must be two fractions of the chain, 0 <= low < high <= 1")
    return interval


def guided_timesteps(interval: Interval, num_timesteps: int) -> range:
    """Return the original timesteps inside `interval`, for a diffusion with `num_timesteps` of them."""
    low, high = (round(fraction * (num_timesteps - 1)) for fraction in interval)
    return range(low, high + 1)


def log_prob_gradient(classifier: Model, x: Tensor, t: Timestep, y: Tensor) -> Tensor:
    """grad_x log p(y | x), float32 [B, C, H, W], for `classifier(x, t)` -> logits [B, K] and labels y [B].

    The classifier may run in fp16 or bf16 and its parameters need no gradients. Each sample's log p is scaled
    by a power of two, so that its gradient enters the backward pass with a norm near 256 however sure the
    classifier is, and unscaled in float32: small gradients do not vanish, and float32 results do not change.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = classifier(x, t).float()
        log_prob = F.log_softmax(logits, dim=-1).gather(1, y.clone()[:, None])[:, 0]
        with torch.no_grad():
            # grad log p with respect to the logits: one-hot of y minus the probabilities
            at_logits = (-F.softmax(logits, dim=-1)).scatter_add(1, y[:, None], torch.ones_like(logits))
            exponent = torch.frexp(at_logits.norm(dim=1)).exponent
            scale = torch.ldexp(torch.full_like(log_prob, GRADIENT_NORM), -exponent)
        objective = (log_prob * scale).sum()
        with torch.autocast(x.device.type, enabled=False):  # else the float32 layers' backward runs in half precision
            gradient = torch.autograd.grad(objective, x)[0]
    return gradient.float() / scale.view(-1, *[1] * (x.ndim - 1))


def classifier_gradient(
    classifier: Model,
    diffusion: Diffusion,
    y: Tensor,
    scale: float,
    interval: Interval = WHOLE_CHAIN,
) -> Gradient:
    """Return (x_t, t) -> scale * grad log p(y | x_t), which is None where the timestep is outside `interval`.

    Only an int t can be inside or outside: with timesteps [B] and a part of the chain it raises ValueError.
    """
    on_chain = diffusion.on_chain(classifier)
    inside = guided_timesteps(interval, diffusion.config.num_timesteps)

    def gradient(x_t: Tensor, t: Timestep) -> Tensor | None:
        if interval != WHOLE_CHAIN:
            if not isinstance(t, int):
                raise ValueError("guidance in an interval needs one timestep for the batch, not a tensor")
            if int(diffusion.timestep_map[t]) not in inside:
                return None
        return scale * log_prob_gradient(on_chain, x_t, t, y)

    return gradient


def mean_shift(denoise: Denoise, gradient: Gradient) -> Denoise:
    """ADM algorithm 1: mean + variance * gradient. pred_x_start and eps stay the unguided ones."""

    def guided_denoise(x_t: Tensor, t: Timestep) -> Prediction:
        prediction, g = denoise(x_t, t), gradient(x_t, t)
        if g is None:
            return prediction
        return prediction.with_mean(prediction.mean + prediction.variance * g)

    return guided_denoise


def score_shift(denoise: Denoise, gradient: Gradient, diffusion: Diffusion) -> Denoise:
    """ADM algorithm 2: eps - sqrt(1 - abar_t) * gradient; pred_x_start follows and is not clipped again."""

    def guided_denoise(x_t: Tensor, t: Timestep) -> Prediction:
        prediction, g = denoise(x_t, t), gradient(x_t, t)
        if g is None:
            return prediction
        eps = prediction.eps - diffusion.at("sqrt_one_minus_alphas_cumprod", t, x_t) * g
        return diffusion.with_eps(prediction, x_t, t, eps)

    return guided_denoise


def guided(
    denoise: Denoise,
    sampler_name: str,
    classifier: Model,
    diffusion: Diffusion,
    y: Tensor,
    config: GuidanceConfig,
) -> Denoise:
    """Return `denoise` guided towards labels y [B], by the mean or the score as the sampler's registry entry says.

    At scale 0 it is `denoise` itself.
    """
    if config.scale == 0:
        return denoise
    gradient = classifier_gradient(classifier, diffusion, y, config.scale, config.interval)
    if SAMPLERS[sampler_name].guidance == "mean":
        return mean_shift(denoise, gradient)
    return score_shift(denoise, gradient, diffusion)
