"""Guidance: functions that take a `denoise` function and return a guided one.

Classifier guidance (Dhariwal & Nichol 2021, section 4) adds scale * grad log p(y | x_t) to the mean (`mean_shift`,
algorithm 1) or to the predicted noise (`score_shift`, algorithm 2). Classifier-free guidance and autoguidance
extrapolate away from a weaker prediction (`extrapolation`).

Scale 0 always means no guidance. Papers count differently: DiT's cfg-scale and Karras's w are our scale + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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

GRADIENT_NORM = 2.0**8  # a sample's scaled gradient at the logits has a norm from half of this up to this

GuidanceKind = Literal["none", "classifier", "classifier_free", "auto"]


class GuidanceConfig(BaseModel, frozen=True, extra="forbid"):
    """The kind, the scale and the interval of guidance."""

    kind: GuidanceKind = "classifier"  # by a classifier, the model without the class, or a weaker model
    scale: float = Field(0.0, ge=0)  # factor of the guidance term; 0 = no guidance
    weak_weights: str | None = None  # for auto: weaker model, a run's folder or a file
    interval: Interval = WHOLE_CHAIN  # guided part of the chain as fractions: 0 = clean, 1 = noise

    @field_validator("interval")
    @classmethod
    def _check_interval(cls, interval: Interval) -> Interval:
        return check_interval(interval)

    @model_validator(mode="after")
    def _check_meaning(self) -> Self:
        if self.scale and self.kind == "none":
            raise ValueError(f"scale={self.scale} has no effect with kind='none'; use another kind or scale=0")
        if self.weak_weights is not None and self.kind != "auto":
            raise ValueError(
                f"weak_weights={self.weak_weights!r} has no effect with kind={self.kind!r}; use kind='auto'"
            )
        if self.scale and self.kind == "auto" and self.weak_weights is None:
            raise ValueError(
                "kind='auto' needs weak_weights, a weaker model such as an earlier snapshot of the same run"
            )
        return self


def check_interval(interval: Interval) -> Interval:
    """Return `interval`; ValueError unless 0 <= low < high <= 1."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval={interval}; expected two fractions of the chain with 0 <= low < high <= 1")
    return interval


def guided_timesteps(interval: Interval, num_timesteps: int) -> range:
    """Return the original timesteps inside `interval` of a process with `num_timesteps` steps."""
    low, high = (round(fraction * (num_timesteps - 1)) for fraction in interval)
    return range(low, high + 1)


def log_prob_gradient(classifier: Model, x: Tensor, t: Timestep, y: Tensor) -> Tensor:
    """Return grad_x log p(y | x), float32 [B, C, H, W], for `classifier(x, t)` -> logits [B, K] and labels y [B].

    The classifier may run in fp16 or bf16, and its parameters need no gradients. If the classifier is certain, the
    gradient is so small that it would underflow. Therefore each sample's log p is multiplied by a power of two, so that
    its gradient at the logits has a norm of 128 to 256, and the result is divided by this power in float32.
    Results of float32 classifiers do not change.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        logits = classifier(x, t).float()
        log_prob = F.log_softmax(logits, dim=-1).gather(1, y.clone()[:, None])[:, 0]
        with torch.no_grad():
            # The gradient of log p with respect to the logits is the one-hot vector of y minus the probabilities.
            logits_gradient = (-F.softmax(logits, dim=-1)).scatter_add(1, y[:, None], torch.ones_like(logits))
            exponent = torch.frexp(logits_gradient.norm(dim=1)).exponent
            scale = torch.ldexp(torch.full_like(log_prob, GRADIENT_NORM), -exponent)
        objective = (log_prob * scale).sum()
        # Under autocast, the backward pass of float32 layers would run in half precision.
        with torch.autocast(x.device.type, enabled=False):
            gradient = torch.autograd.grad(objective, x)[0]
    return gradient.float() / scale.view(-1, *[1] * (x.ndim - 1))


def classifier_gradient(
    classifier: Model, diffusion: Diffusion, y: Tensor, scale: float, interval: Interval = WHOLE_CHAIN
) -> Gradient:
    """Return a function (x_t, t) -> scale * grad log p(y | x_t), or None if the timestep is outside `interval`.

    The function raises ValueError for timesteps [B] if the interval is not the whole chain.
    """
    on_chain = diffusion.on_chain(classifier)

    def gradient(x_t: Tensor, t: Timestep) -> Tensor | None:
        if not is_guided(diffusion, t, interval):
            return None
        return scale * log_prob_gradient(on_chain, x_t, t, y)

    return gradient


def mean_shift(denoise: Denoise, gradient: Gradient) -> Denoise:
    """Add variance * gradient to the mean (ADM algorithm 1); pred_x_start and eps stay unguided."""

    def guided_denoise(x_t: Tensor, t: Timestep) -> Prediction:
        prediction, shift = denoise(x_t, t), gradient(x_t, t)
        if shift is None:
            return prediction
        return replace(prediction, mean=prediction.mean + prediction.variance * shift)

    return guided_denoise


def score_shift(denoise: Denoise, gradient: Gradient, diffusion: Diffusion) -> Denoise:
    """Subtract sqrt(1 - abar_t) * gradient from eps (ADM algorithm 2); the new pred_x_start is not clipped."""

    def guided_denoise(x_t: Tensor, t: Timestep) -> Prediction:
        prediction, shift = denoise(x_t, t), gradient(x_t, t)
        if shift is None:
            return prediction
        eps = prediction.eps - diffusion.at("sqrt_one_minus_alphas_cumprod", t, x_t) * shift
        return diffusion.with_eps(prediction, x_t, t, eps)

    return guided_denoise


def extrapolation(
    denoise: Denoise,
    weak: Denoise,
    diffusion: Diffusion,
    scale: float,
    interval: Interval = WHOLE_CHAIN,
    clip: bool = True,
) -> Denoise:
    """Replace eps by eps_weak + (1 + scale) (eps - eps_weak).

    This is classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6) if `weak` is the model without the
    class, and autoguidance (Karras et al. 2024, arXiv 2406.02507, eq. 3) if it is a worse model. Both functions must
    return unclipped predictions; `clip` clamps the resulting x_0. Variances are those of `denoise`. Outside `interval`,
    `weak` is not evaluated.
    """

    def guided_denoise(x_t: Tensor, t: Timestep) -> Prediction:
        prediction = denoise(x_t, t)
        if not is_guided(diffusion, t, interval):
            return diffusion.with_eps(prediction, x_t, t, prediction.eps, clip)
        eps = prediction.eps + scale * (prediction.eps - weak(x_t, t).eps)
        return diffusion.with_eps(prediction, x_t, t, eps, clip)

    return guided_denoise


def is_guided(diffusion: Diffusion, t: Timestep, interval: Interval) -> bool:
    """Return whether chain index t is inside `interval`; ValueError for t [B] unless it is the whole chain."""
    if interval == WHOLE_CHAIN:
        return True
    if not isinstance(t, int):
        raise ValueError(f"guidance in interval={interval} needs an int timestep for the whole batch, not a tensor")
    return int(diffusion.timestep_map[t]) in guided_timesteps(interval, diffusion.config.num_timesteps)


def guided(
    denoise: Denoise, sampler_name: str, classifier: Model, diffusion: Diffusion, y: Tensor, config: GuidanceConfig
) -> Denoise:
    """Return `denoise` guided by a classifier towards labels y [B]; at scale 0 this is `denoise` itself.

    The sampler's entry in the registry decides between `mean_shift` and `score_shift`.
    """
    if config.scale == 0:
        return denoise
    gradient = classifier_gradient(classifier, diffusion, y, config.scale, config.interval)
    if SAMPLERS[sampler_name].guidance == "mean":
        return mean_shift(denoise, gradient)
    return score_shift(denoise, gradient, diffusion)


@dataclass(frozen=True)
class Guided:
    """The networks of a guided chain and their inputs."""

    model: Model
    y: Tensor  # labels int64 [B]
    is_conditional: bool  # whether `model` and a weaker model take labels
    low_res: Tensor | None = None  # float32 [B, C, h, w] in [-1, 1], the input of an upsampler
    clip: bool = True  # clamp the predicted x_0 to [-1, 1]
    null_label: int | None = None  # the label that means no class; needed for the kind "classifier_free"
    guide: Model | None = None  # the classifier or the weaker model; needed for the kinds "classifier" and "auto"

    def denoiser(self, model: Model, diffusion: Diffusion, y: Tensor, clip: bool) -> Denoise:
        """Return the unguided denoiser of `model` for labels y [B]."""
        return diffusion.denoiser(model, y=y if self.is_conditional else None, low_res=self.low_res, clip=clip)


def guided_denoiser(chain: Guided, diffusion: Diffusion, sampler_name: str, config: GuidanceConfig) -> Denoise:
    """Return the denoiser of a chain with the configured guidance; at scale 0 it is bit-equal to the unguided one."""
    if config.scale == 0:
        return chain.denoiser(chain.model, diffusion, chain.y, chain.clip)
    if config.kind == "classifier":
        assert chain.guide is not None
        unguided = chain.denoiser(chain.model, diffusion, chain.y, chain.clip)
        return guided(unguided, sampler_name, chain.guide, diffusion, chain.y, config)
    strong = chain.denoiser(chain.model, diffusion, chain.y, clip=False)
    if config.kind == "classifier_free":
        assert chain.null_label is not None
        weak = chain.denoiser(chain.model, diffusion, torch.full_like(chain.y, chain.null_label), clip=False)
    else:
        assert chain.guide is not None
        weak = chain.denoiser(chain.guide, diffusion, chain.y, clip=False)
    return extrapolation(strong, weak, diffusion, config.scale, config.interval, chain.clip)
