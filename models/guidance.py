"""Guidance: wrappers from denoise to denoise.

By a classifier (Dhariwal & Nichol 2021, section 4): a gradient function gives scale * grad log p(y | x_t) at a step's
own input and timestep, or None where it is off; the two wrappers put it into the mean (algorithm 1) or into the
predicted noise (algorithm 2). By a weaker prediction, without the class or by a worse model: `extrapolated`.

Scale 0 is unguided everywhere. The papers' own numbers differ: DiT's cfg-scale is ours + 1, and so is Karras's w.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from models.diffusion import Denoise, Diffusion, Model, Prediction, Timestep
from models.samplers import SAMPLERS

Gradient = Callable[[Tensor, Timestep], Tensor | None]
Interval = tuple[float, float]  # fractions of the chain, 0 = clean, 1 = noise

WHOLE_CHAIN: Interval = (0.0, 1.0)

GRADIENT_NORM = 2.0**8  # of a sample's gradient at the logits, as it enters the backward pass


GuidanceKind = Literal["none", "classifier", "classifier_free", "auto"]


class GuidanceConfig(BaseModel, frozen=True, extra="forbid"):
    """The kind, the scale and the interval of guidance."""

    kind: GuidanceKind = "classifier"  # classifier_free: the model without the class; auto: a weaker model
    scale: float = Field(0.0, ge=0)  # 0 = no guidance; factor of grad log p(y | x_t), or of a difference of predictions
    weak_weights: str | None = None  # for auto: weaker model, a run's folder or a file
    interval: Interval = WHOLE_CHAIN  # guided part of the chain as fractions: 0 = clean, 1 = noise

    @field_validator("interval")
    @classmethod
    def _check_interval(cls, interval: Interval) -> Interval:
        return check_interval(interval)

    @model_validator(mode="after")
    def _check_meaning(self) -> Self:
        if self.scale and self.kind == "none":
            raise ValueError(f"scale={self.scale} has no meaning for kind='none'; choose another kind, or scale=0")
        if self.weak_weights is not None and self.kind != "auto":
            raise ValueError(
                f"weak_weights={self.weak_weights!r} has no meaning for kind={self.kind!r}, only for 'auto'"
            )
        if self.scale and self.kind == "auto" and self.weak_weights is None:
            raise ValueError(
                "kind='auto' needs weak_weights, the weaker model: an earlier snapshot of the same run, for example"
            )
        return self


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
        if not is_inside(diffusion, t, interval, inside):
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


def extrapolated(
    denoise: Denoise,
    weak: Denoise,
    diffusion: Diffusion,
    scale: float,
    interval: Interval = WHOLE_CHAIN,
    clip: bool = True,
) -> Denoise:
    """eps_weak + (1 + scale) (eps - eps_weak): away from a weaker prediction of the same.

    That is classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6) where `weak` knows no class, and
    autoguidance (Karras et al. 2024, arXiv 2406.02507, eq. 3) where it is a worse model. Both must be unclipped; `clip`
    clamps the x_0 that comes of them. Variances are those of `denoise`. Outside `interval` `weak` is not evaluated.
    """
    inside = guided_timesteps(interval, diffusion.config.num_timesteps)

    def guided_denoise(x_t: Tensor, t: Timestep) -> Prediction:
        prediction = denoise(x_t, t)
        if not is_inside(diffusion, t, interval, inside):
            return diffusion.with_eps(prediction, x_t, t, prediction.eps, clip)
        eps = prediction.eps + scale * (prediction.eps - weak(x_t, t).eps)
        return diffusion.with_eps(prediction, x_t, t, eps, clip)

    return guided_denoise


def is_inside(diffusion: Diffusion, t: Timestep, interval: Interval, inside: range) -> bool:
    """Return whether chain index t is guided; ValueError for timesteps [B] and a part of the chain."""
    if interval == WHOLE_CHAIN:
        return True
    if not isinstance(t, int):
        raise ValueError("guidance in an interval needs one timestep for the batch, not a tensor")
    return int(diffusion.timestep_map[t]) in inside


def guided(
    denoise: Denoise,
    sampler_name: str,
    classifier: Model,
    diffusion: Diffusion,
    y: Tensor,
    config: GuidanceConfig,
) -> Denoise:
    """Return `denoise` guided by a classifier towards labels y [B], by mean or score as the sampler's entry says.

    At scale 0 it is `denoise` itself.
    """
    if config.scale == 0:
        return denoise
    gradient = classifier_gradient(classifier, diffusion, y, config.scale, config.interval)
    if SAMPLERS[sampler_name].guidance == "mean":
        return mean_shift(denoise, gradient)
    return score_shift(denoise, gradient, diffusion)


@dataclass(frozen=True)
class Guided:
    """The networks of a guided chain, and what they are told."""

    model: Model
    y: Tensor  # labels int64 [B]
    is_conditional: bool  # whether `model`, and with it a weaker one, takes labels
    low_res: Tensor | None = None  # float32 [B, C, h, w] in [-1, 1], what an upsampler enlarges
    clip: bool = True  # clamp the predicted x_0 to [-1, 1]
    null_label: int | None = None  # the label that means no class, for the kind "classifier_free"
    guide: Model | None = None  # the classifier, or the weaker model of the kind "auto"

    def denoiser(self, model: Model, diffusion: Diffusion, y: Tensor, clip: bool) -> Denoise:
        """Return the unguided denoiser of one of the models for labels `y`."""
        return diffusion.denoiser(model, y=y if self.is_conditional else None, low_res=self.low_res, clip=clip)


def _by_classifier(chain: Guided, diffusion: Diffusion, sampler_name: str, config: GuidanceConfig) -> Denoise:
    assert chain.guide is not None
    plain = chain.denoiser(chain.model, diffusion, chain.y, chain.clip)
    return guided(plain, sampler_name, chain.guide, diffusion, chain.y, config)


def _classifier_free(chain: Guided, diffusion: Diffusion, sampler_name: str, config: GuidanceConfig) -> Denoise:
    assert chain.null_label is not None
    conditional, unconditional = (
        chain.denoiser(chain.model, diffusion, y, clip=False)
        for y in (chain.y, torch.full_like(chain.y, chain.null_label))
    )
    return extrapolated(conditional, unconditional, diffusion, config.scale, config.interval, chain.clip)


def _auto(chain: Guided, diffusion: Diffusion, sampler_name: str, config: GuidanceConfig) -> Denoise:
    assert chain.guide is not None
    strong, weak = (chain.denoiser(model, diffusion, chain.y, clip=False) for model in (chain.model, chain.guide))
    return extrapolated(strong, weak, diffusion, config.scale, config.interval, chain.clip)


# Each kind of guidance: a function from the networks to a guided denoiser.
GUIDANCE: dict[str, Callable[[Guided, Diffusion, str, GuidanceConfig], Denoise]] = {
    "classifier": _by_classifier,
    "classifier_free": _classifier_free,
    "auto": _auto,
}


def guided_denoiser(chain: Guided, diffusion: Diffusion, sampler_name: str, config: GuidanceConfig) -> Denoise:
    """Return the denoiser of a chain, guided as `config` says; at scale 0 the unguided one, to the bit."""
    if config.scale == 0:
        return chain.denoiser(chain.model, diffusion, chain.y, chain.clip)
    return GUIDANCE[config.kind](chain, diffusion, sampler_name, config)
