"""Guidance: closed forms of all kinds, the interval, and small gradients in low precision."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.diffusion import Denoise, Diffusion, DiffusionConfig, Prediction, Timestep
from models.guidance import (
    WHOLE_CHAIN,
    GuidanceConfig,
    GuidanceKind,
    Guided,
    classifier_gradient,
    extrapolation,
    guided,
    guided_denoiser,
    guided_timesteps,
    log_prob_gradient,
    mean_shift,
    score_shift,
)
from models.samplers import SamplerConfig, ddim, ddpm, final_x, respacing_for, sample
from models.unet import ClassifierConfig, NoisyClassifier
from tests.models.gaussian import Gaussian

CENTRE, STD = 0.4, 0.3  # pixels of class 0 ~ N(-CENTRE, STD^2), of class 1 ~ N(CENTRE, STD^2), equally likely


def process(respacing: str = "20") -> Diffusion:
    return Diffusion(DiffusionConfig(variance="fixed_small"), respacing)


def noise(t: int) -> Tensor:
    return torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(t))


class ExactClassifier(nn.Module):
    """log p(x_t | class), up to a constant: its softmax is p(class | x_t)."""

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__()
        self.abar = torch.from_numpy(diffusion.alphas_cumprod)
        self.original = diffusion.timestep_map.tolist()
        self.calls = 0

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        abar = self.abar[[self.original.index(int(t)) for t in timesteps]].view(-1, 1)
        means = abar.sqrt() * torch.tensor([[-CENTRE, CENTRE]])
        return -((x.flatten(1).double() - means) ** 2) / (2 * (abar * STD**2 + 1 - abar))


def exact_denoiser(diffusion: Diffusion, label: int | None) -> Denoise:
    """Return the exact denoiser of one class or of both."""
    classifier = ExactClassifier(diffusion)

    def denoise(x_t: Tensor, t: Timestep) -> Prediction:
        assert isinstance(t, int)
        abar = diffusion.alphas_cumprod[t]
        gain = STD**2 * math.sqrt(abar) / (abar * STD**2 + 1 - abar)
        x_starts = [c + gain * (x_t - math.sqrt(abar) * c) for c in (-CENTRE, CENTRE)]
        if label is None:
            p = classifier(x_t, diffusion.model_timesteps(t, x_t)).softmax(dim=1).float()
            x_start = sum(p[:, i].view(-1, 1, 1, 1) * x_starts[i] for i in range(2))
        else:
            x_start = x_starts[label]
        assert isinstance(x_start, Tensor)
        mean = diffusion.q_posterior_mean(x_start, x_t, t)
        variance, log_variance = diffusion.variance(None, t, x_t)
        return Prediction(diffusion.eps_from_x_start(x_t, t, x_start), x_start, mean, variance, log_variance)

    return denoise


@pytest.mark.parametrize("t", [0, 5, 19])
def test_the_exact_classifier_turns_the_unconditional_score_into_the_conditional_one(t: int) -> None:
    diffusion = process()
    x_t, y = torch.linspace(-1.5, 1.5, 6).view(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 0, 1])
    gradient = classifier_gradient(ExactClassifier(diffusion), diffusion, y, scale=1.0)
    actual = score_shift(exact_denoiser(diffusion, None), gradient, diffusion)(x_t, t)
    for label in (0, 1):
        rows, expected = y == label, exact_denoiser(diffusion, label)(x_t, t)
        for field in ("eps", "pred_x_start", "mean"):
            a, b = getattr(actual, field)[rows], getattr(expected, field)[rows]
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_the_mean_moves_by_variance_times_gradient_and_nothing_else_does() -> None:
    diffusion = process()
    x_t, y, t = torch.linspace(-1.5, 1.5, 6).view(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64), 7
    denoise, scale = exact_denoiser(diffusion, None), 3.0
    gradient = classifier_gradient(ExactClassifier(diffusion), diffusion, y, scale)
    plain, shifted = denoise(x_t, t), mean_shift(denoise, gradient)(x_t, t)
    abar = diffusion.alphas_cumprod[t]
    posterior = ExactClassifier(diffusion)(x_t, diffusion.model_timesteps(t, x_t)).softmax(dim=1)[:, 1]
    # d/dx log p(0 | x) of two Gaussians of one variance
    slope = -posterior * 2 * CENTRE * math.sqrt(abar) / (abar * STD**2 + 1 - abar)
    expected = scale * slope.float().view(6, 1, 1, 1) * diffusion.posterior_variance[t]
    torch.testing.assert_close(shifted.mean - plain.mean, expected.float(), atol=1e-6, rtol=1e-3)
    for field in ("eps", "pred_x_start", "variance", "log_variance"):
        assert torch.equal(getattr(shifted, field), getattr(plain, field))


@pytest.mark.parametrize("sampler_name", ["ddpm", "ddim"])
def test_guided_samples_follow_their_labels(sampler_name: str) -> None:
    diffusion = process()
    y = torch.tensor([0, 1] * 3)
    classifier = ExactClassifier(diffusion)
    denoise = guided(exact_denoiser(diffusion, None), sampler_name, classifier, diffusion, y, GuidanceConfig(scale=8))
    sampler = {"ddpm": ddpm, "ddim": ddim}[sampler_name]
    x = final_x(sampler(denoise, diffusion, noise(0), noise)).flatten()
    assert ((x > 0) == (y == 1)).all(), x


def test_outside_its_interval_the_classifier_is_not_called() -> None:
    diffusion = process("10")  # 0, 111, ..., 999
    y = torch.ones(6, dtype=torch.int64)
    denoise = exact_denoiser(diffusion, None)
    for interval, calls in (
        ((222 / 999, 555 / 999), 4),
        ((0.0, 0.0001), 1),
        ((112 / 999, 221 / 999), 0),
        (WHOLE_CHAIN, 10),
    ):
        classifier = ExactClassifier(diffusion)
        config = GuidanceConfig(scale=1, interval=interval)
        x = final_x(ddim(guided(denoise, "ddim", classifier, diffusion, y, config), diffusion, noise(0), noise))
        assert classifier.calls == calls
        assert torch.equal(x, final_x(ddim(denoise, diffusion, noise(0), noise))) == (calls == 0)
    gradient = classifier_gradient(ExactClassifier(diffusion), diffusion, y, 1.0, (0.0, 0.5))
    with pytest.raises(ValueError, match="int timestep"):
        gradient(noise(0), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("interval", [(0.5, 0.1), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (200, 799)])
def test_an_interval_that_is_no_part_of_the_chain_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="0 <= low < high <= 1"):
        GuidanceConfig(scale=1, interval=interval)


def test_the_same_interval_is_the_same_part_of_every_chain() -> None:
    assert guided_timesteps(WHOLE_CHAIN, 1000) == range(1000)
    assert guided_timesteps((0.2, 0.8), 1000) == range(200, 800)
    assert guided_timesteps((0.2, 0.8), 4000) == range(800, 3200)
    assert guided_timesteps((0.0, 0.0001), 1000) == range(1), "both ends are guided"


def classifier_with_logits_times(factor: float) -> NoisyClassifier:
    torch.manual_seed(0)
    network = ClassifierConfig(
        image_size=16,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(8,),
        num_head_channels=16,
        num_classes=5,
    ).build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        head = network.out[2].c_proj
        assert isinstance(head, nn.Conv1d) and head.bias is not None
        head.weight.mul_(factor)
        head.bias.copy_(torch.tensor([factor, 0, 0, 0, 0]))
    return network.eval().requires_grad_(False)


def plain_gradient(classifier: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    log_prob = classifier(x, t).float().log_softmax(dim=1).gather(1, y[:, None])
    return torch.autograd.grad(log_prob.sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tiny_gradient_does_not_vanish_in_low_precision(dtype: torch.dtype) -> None:
    classifier = classifier_with_logits_times(16.0)  # so sure of class 0 that its log p hardly has a slope
    x, t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.full((4,), 300)
    y = torch.zeros(4, dtype=torch.int64)
    exact = plain_gradient(classifier, x, t, y)
    with torch.autocast("cpu", dtype=dtype):
        scaled, naive = log_prob_gradient(classifier, x, t, y), plain_gradient(classifier, x, t, y)

    def error(gradient: Tensor) -> float:
        return ((gradient - exact).norm() / exact.norm()).item()

    assert 0 < exact.abs().max() < 1e-5, exact.abs().max()
    assert scaled.dtype == torch.float32
    assert error(scaled) < 0.05, (error(scaled), error(naive))
    if dtype == torch.float16:  # bf16 has the range of float32 and loses less
        assert error(naive) > 0.3, (error(scaled), error(naive))


def test_scaling_changes_no_bit_in_float32() -> None:
    classifier = classifier_with_logits_times(1.0)
    x, t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.full((4,), 300)
    y = torch.tensor([0, 1, 2, 3])
    assert torch.equal(log_prob_gradient(classifier, x, t, y), plain_gradient(classifier, x, t, y))


def test_guidance_works_where_gradients_are_off() -> None:
    diffusion = Diffusion(DiffusionConfig(), "10")
    classifier = classifier_with_logits_times(1.0)
    with torch.no_grad():
        y = torch.tensor([0, 1])
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        expected = classifier_gradient(classifier, diffusion, y, 2.0)(x, 5)
    with torch.inference_mode():
        actual = classifier_gradient(classifier, diffusion, y.clone(), 2.0)(x.clone(), 5)
    assert expected is not None and actual is not None
    assert expected.abs().max() > 0 and not expected.requires_grad
    assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------------ weaker predictions


@pytest.mark.parametrize("t", [0, 5, 19])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_classifier_free_guidance_is_that_of_the_exact_classifier(t: int, scale: float) -> None:
    """By Bayes, eps(class) - eps is -sqrt(1 - abar) grad log p(class | x_t), so both kinds are equal here."""
    diffusion = process()
    x_t, label = torch.linspace(-1.5, 1.5, 6).view(6, 1, 1, 1), 1
    gradient = classifier_gradient(ExactClassifier(diffusion), diffusion, torch.full((6,), label), scale)
    conditional = exact_denoiser(diffusion, label)
    expected = score_shift(conditional, gradient, diffusion)(x_t, t)
    prediction = extrapolation(conditional, exact_denoiser(diffusion, None), diffusion, scale, clip=False)(x_t, t)
    torch.testing.assert_close(prediction.eps, expected.eps, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(prediction.pred_x_start, expected.pred_x_start, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(prediction.variance, conditional(x_t, t).variance, rtol=0, atol=0)


@pytest.mark.parametrize("t", [0, 5, 19])
def test_autoguidance_of_gaussians_has_the_closed_form(t: int) -> None:
    """Scores of N(m, v) are linear: sqrt(1 - abar) (x - sqrt(abar) m) / (abar v + 1 - abar)."""
    diffusion, scale = process(), 1.5
    strong, weak = Gaussian(mean=0.1, std=0.2), Gaussian(mean=0.0, std=0.7)
    abar, x_t = diffusion.alphas_cumprod[t], torch.linspace(-1, 1, 5).view(5, 1, 1, 1)

    def eps(data: Gaussian) -> Tensor:
        return math.sqrt(1 - abar) * (x_t - math.sqrt(abar) * data.mean) / data.marginal_variance(np.array(abar)).item()

    expected = (1 + scale) * eps(strong) - scale * eps(weak)
    arguments = (strong.denoiser(diffusion), weak.denoiser(diffusion), diffusion, scale)
    prediction = extrapolation(*arguments, clip=False)(x_t, t)
    torch.testing.assert_close(prediction.eps, expected, rtol=1e-3, atol=1e-3)
    clipped = extrapolation(*arguments, clip=True)(x_t, t)
    torch.testing.assert_close(clipped.pred_x_start, prediction.pred_x_start.clamp(-1, 1))
    torch.testing.assert_close(
        clipped.eps, diffusion.eps_from_x_start(x_t, t, clipped.pred_x_start), rtol=1e-4, atol=1e-4
    )


class CountedModel(nn.Module):
    """A model with random weights that records its labels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gain = torch.rand(12, generator=generator)
        self.labels: list[list[int] | None] = []

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        self.labels.append(None if y is None else y.tolist())
        return x * (0.5 if y is None else self.gain[y].view(-1, 1, 1, 1)) + timesteps.view(-1, 1, 1, 1) * 1e-4


@pytest.mark.parametrize("kind", ["none", "classifier", "classifier_free", "auto"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "edm"])
def test_scale_0_is_unguided_to_the_bit_and_calls_no_other_network(kind: GuidanceKind, sampler: str) -> None:
    model, weak, classifier = CountedModel(1), CountedModel(2), ExactClassifier(process())
    config = SamplerConfig(name=sampler, num_steps=6)
    diffusion = Diffusion(DiffusionConfig(variance="fixed_small"), respacing_for(config, 1000))
    y, x_T = torch.tensor([0, 1, 2, 3, 4, 5]), noise(0)
    chain = Guided(model, y, True, null_label=10, guide=classifier if kind == "classifier" else weak)
    denoise = guided_denoiser(chain, diffusion, sampler, GuidanceConfig(kind=kind, scale=0))
    x = final_x(sample(config, denoise, diffusion, x_T, noise))
    plain = final_x(sample(config, diffusion.denoiser(model, y=y), diffusion, x_T, noise))
    assert torch.equal(x, plain)
    assert not weak.labels and not classifier.calls and all(labels == y.tolist() for labels in model.labels)


@pytest.mark.parametrize("kind", ["classifier_free", "auto"])
def test_outside_the_interval_there_is_one_pass(kind: GuidanceKind) -> None:
    model, weak = CountedModel(1), CountedModel(2)
    config, interval = SamplerConfig(name="ddim", num_steps=10), (0.3, 0.7)
    diffusion = Diffusion(DiffusionConfig(variance="fixed_small"), respacing_for(config, 1000))
    inside = [t for t in diffusion.timestep_map if t in guided_timesteps(interval, 1000)]
    y, x_T = torch.tensor([0, 1, 2, 3, 4, 5]), noise(0)
    chain = Guided(model, y, True, null_label=10, guide=weak)
    weak_weights = "snapshot" if kind == "auto" else None
    guidance = GuidanceConfig(kind=kind, scale=2.0, interval=interval, weak_weights=weak_weights)
    final_x(sample(config, guided_denoiser(chain, diffusion, "ddim", guidance), diffusion, x_T, noise))
    assert 0 < len(inside) < 10
    if kind == "auto":
        assert len(model.labels) == 10 and weak.labels == [y.tolist()] * len(inside)
    else:
        assert not weak.labels and model.labels.count(y.tolist()) == 10
        assert model.labels.count([10] * 6) == len(inside) == len(model.labels) - 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "none", "scale": 1.0}, "scale=1.0"),
        ({"kind": "auto", "scale": 1.0}, "weak_weights"),
        ({"kind": "classifier", "weak_weights": "x"}, "weak_weights='x'"),
    ],
)
def test_fields_that_a_kind_of_guidance_does_not_use_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GuidanceConfig(**fields)
