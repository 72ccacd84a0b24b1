"""Samplers agree with closed forms: for Gaussian data, the exact denoiser, marginals and ODE are known."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models import zoo
from models.diffusion import Diffusion, DiffusionConfig
from models.samplers import (
    SAMPLERS,
    SamplerConfig,
    ddim,
    ddim_reverse,
    ddim_step,
    ddpm,
    ddpm_step,
    edm_steps,
    evaluated_timesteps,
    final_x,
    noise_timesteps,
    respacing_for,
    sample,
)
from tests.models.gaussian import Gaussian

DATA = Gaussian()
X_T = torch.tensor([-2.0, -0.5, 1.0, 2.0]).view(4, 1, 1, 1)


def process(respacing: str = "", **fields: Any) -> Diffusion:
    return Diffusion(DiffusionConfig(**fields), respacing)


def no_noise(t: int) -> Tensor:
    raise AssertionError(f"noise was drawn for timestep {t}")


def keyed_noise(like: Tensor, drawn: list[int] | None = None) -> Callable[[int], Tensor]:
    def noise(t: int) -> Tensor:
        if drawn is not None:
            drawn.append(t)
        values = np.random.default_rng([11, t]).standard_normal(like.shape)
        return torch.from_numpy(values).to(like)

    return noise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["", "50"])
def test_ddpm_with_the_exact_reverse_step_has_the_exact_marginals(schedule: str, respacing: str) -> None:
    diffusion = process(respacing, schedule=schedule)
    denoise = DATA.denoiser(diffusion)
    # a step is affine in x and in the noise: three probes give its coefficients, which map mean and variance
    probes = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1)
    noise = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1, 1)
    abar = diffusion.alphas_cumprod
    mean, variance = abar[-1] ** 0.5 * DATA.mean, DATA.marginal_variance(abar)[-1]
    for t in reversed(range(1, diffusion.num_timesteps)):
        out = ddpm_step(diffusion, denoise(probes, t), probes, t, noise).flatten().double()
        offset, slope, sigma = out[0], out[1] - out[0], out[2] - out[0]
        mean, variance = offset + slope * mean, slope**2 * variance + sigma**2
        assert float(mean) == pytest.approx(abar[t - 1] ** 0.5 * DATA.mean, abs=2e-5)
        assert float(variance) == pytest.approx(DATA.marginal_variance(abar)[t - 1], abs=2e-5)


def test_ddpm_samples_have_the_data_distribution() -> None:
    diffusion = process("100")
    x_T = keyed_noise(torch.empty(1, 1, 150, 150))(1000)
    x = final_x(ddpm(DATA.denoiser(diffusion), diffusion, x_T, keyed_noise(x_T)))
    assert x.mean().item() == pytest.approx(DATA.mean, abs=4 * DATA.std / 150)
    assert x.std().item() == pytest.approx(DATA.std, rel=4 / (2**0.5 * 150))


@pytest.mark.parametrize(
    ("sampler", "schedule", "order"),
    [
        ("ddim", "linear", 1),
        ("ddim", "cosine", 1),
        ("dpm_solver", "linear", 2),
        ("dpm_solver", "cosine", 2),
        ("heun", "linear", 2),
        ("heun", "cosine", 2),
    ],
)
def test_solvers_converge_to_the_ode_with_their_order(sampler: str, schedule: str, order: int) -> None:
    errors = []
    for steps in (40, 80, 160):
        diffusion = process(str(steps), schedule=schedule)
        chain = list(SAMPLERS[sampler].run(DATA.denoiser(diffusion), diffusion, X_T, no_noise))
        abar = diffusion.alphas_cumprod
        # the last step is not one of the ODE: it returns the predicted x_0
        errors.append((chain[-2].x - DATA.ode(X_T, abar[-1], abar[0])).abs().max().item())
    orders = [float(np.log2(a / b)) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.15), errors


def test_ddim_with_eta_1_over_all_steps_is_ddpm_with_the_posterior_variance() -> None:
    diffusion = process(variance="fixed_small")
    x_t, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in (0, 1, 2, 10, 500, 999):
        prediction = diffusion.predict(0.5 * x_t, x_t, t)
        ancestral = ddpm_step(diffusion, prediction, x_t, t, noise)
        implicit = ddim_step(diffusion, prediction, x_t, t, noise, eta=1.0)
        assert (implicit - ancestral).abs().max() < 2e-5


@pytest.mark.parametrize("respacing", ["20", "ddim25"])
def test_ddim_noise_has_eta_squared_times_the_posterior_variance(respacing: str) -> None:
    diffusion = process(respacing)
    prediction = DATA.denoiser(diffusion)
    for t, eta in ((0, 1.0), (1, 1.0), (7, 0.5), (19, 1.0)):
        with_noise = ddim_step(diffusion, prediction(X_T, t), X_T, t, torch.ones_like(X_T), eta)
        without = ddim_step(diffusion, prediction(X_T, t), X_T, t, torch.zeros_like(X_T), eta)
        sigma = (with_noise - without).double()
        expected = eta * diffusion.posterior_variance[t] ** 0.5
        torch.testing.assert_close(sigma, torch.full_like(sigma, expected), atol=1e-6, rtol=1e-5)


def test_ddim_encoding_and_decoding_return_the_image_as_steps_grow() -> None:
    images = torch.tensor([-0.6, 0.1, 0.3, 0.9]).view(4, 1, 1, 1)
    errors = []
    for steps in (20, 40, 100, 200, 500):
        diffusion = process(f"ddim{steps}")
        denoise = DATA.denoiser(diffusion)
        latent = final_x(ddim_reverse(denoise, diffusion, images))
        errors.append((final_x(ddim(denoise, diffusion, latent, no_noise)) - images).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < errors[0]


def test_noise_is_keyed_by_original_timesteps_and_drawn_only_where_used() -> None:
    diffusion = process("5")
    denoise = DATA.denoiser(diffusion)
    for name, eta, expected in (
        ("ddpm", 0.0, [999, 749, 500, 250]),
        ("ddim", 0.7, [999, 749, 500, 250]),
        ("ddim", 0.0, []),
        ("dpm_solver", 0.0, []),
        ("heun", 0.0, []),
    ):
        drawn: list[int] = []
        config = SamplerConfig(name=name, num_steps=5, eta=eta, respacing="5")
        steps = list(sample(config, denoise, diffusion, X_T, keyed_noise(X_T, drawn)))
        assert [step.t for step in steps] == [4, 3, 2, 1, 0]
        assert drawn == expected == noise_timesteps(config, diffusion), name
        assert all(step.x.shape == X_T.shape == step.pred_x_start.shape for step in steps)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_edm_follows_its_ode(schedule: str) -> None:
    """In x = x_0 + sigma z the exact solution keeps (x - mean) / sqrt(std^2 + sigma^2)."""
    diffusion = process("", schedule=schedule)
    errors = []
    for steps in (9, 18, 36):
        config = SamplerConfig(name="edm", num_steps=steps)
        first = edm_steps(config, diffusion)[0].start
        final = final_x(sample(config, DATA.denoiser(diffusion), diffusion, X_T, no_noise))
        exact = DATA.mean + (X_T * first - DATA.mean) * DATA.std / (DATA.std**2 + first**2) ** 0.5
        errors.append((final - exact).abs().max().item())
    assert errors[-1] < 0.02 and all(a / b > 3.5 for a, b in itertools.pairwise(errors)), errors  # second order


def test_edm_with_churn_keeps_the_data_distribution() -> None:
    diffusion = process("", schedule="cosine")
    config = SamplerConfig(name="edm", num_steps=40, s_churn=20)
    x_T = keyed_noise(torch.empty(1, 1, 150, 150))(1000)
    x = final_x(sample(config, DATA.denoiser(diffusion), diffusion, x_T, keyed_noise(x_T)))
    assert x.mean().item() == pytest.approx(DATA.mean, abs=4 * DATA.std / 150)
    assert x.std().item() == pytest.approx(DATA.std, rel=0.05)


def test_edm_draws_noise_in_the_steps_that_churn() -> None:
    diffusion = process("", schedule="cosine")
    config = SamplerConfig(name="edm", num_steps=12, s_churn=5, s_min=0.05, s_max=50)
    drawn: list[int] = []
    steps = list(sample(config, DATA.denoiser(diffusion), diffusion, X_T, keyed_noise(X_T, drawn)))
    levels = [step.start for step in edm_steps(config, diffusion)]
    assert drawn == noise_timesteps(config, diffusion) == [i for i, level in enumerate(levels) if 0.05 <= level <= 50]
    assert 0 < len(drawn) < len(steps) == 12
    assert not noise_timesteps(SamplerConfig(name="edm", num_steps=12), diffusion)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "ddim", "s_churn": 3}, "s_churn=3"),
        ({"name": "edm", "respacing": "10"}, "respacing='10'"),
        ({"name": "edm", "eta": 0.5}, "eta=0.5"),
    ],
)
def test_settings_of_other_samplers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplerConfig(**fields)


def test_edm_takes_its_authors_steps_for_adm_64() -> None:
    """256 steps are 511 evaluations, although several steps share one of the model's 1,000 noise levels."""
    entry = zoo.entry("adm-64-edm")
    assert entry.recipe is not None
    sampler = entry.recipe.sampler
    steps = edm_steps(sampler, Diffusion(entry.diffusion))
    assert len(steps) == 256 and len(evaluated_timesteps(sampler, entry.diffusion)) == 511
    assert all(step.end <= step.start <= step.churned for step in steps)
    x = final_x(
        sample(sampler, DATA.denoiser(Diffusion(entry.diffusion)), Diffusion(entry.diffusion), X_T, lambda _: X_T)
    )
    assert x.isfinite().all()


def test_a_chain_can_start_anywhere() -> None:
    diffusion = process("20")
    denoise = DATA.denoiser(diffusion)
    full_chain = list(ddpm(denoise, diffusion, X_T, keyed_noise(X_T)))
    rest = list(ddpm(denoise, diffusion, full_chain[9].x, keyed_noise(X_T), start=9))
    assert torch.equal(rest[-1].x, full_chain[-1].x)


def test_respacing_belongs_to_the_sampler() -> None:
    assert respacing_for(SamplerConfig(name="ddpm", num_steps=250), 1000) == "250"
    assert respacing_for(SamplerConfig(name="ddim", num_steps=25), 1000) == "ddim25"
    lsun = SamplerConfig(num_steps=250, respacing="90,60,60,20,20")
    assert respacing_for(lsun, 1000) == "90,60,60,20,20"
    with pytest.raises(ValueError, match="no integer stride"):
        respacing_for(SamplerConfig(name="ddim", num_steps=300), 1000)
    with pytest.raises(ValueError, match="cannot keep 250"):
        respacing_for(SamplerConfig(num_steps=250), 100)
    with pytest.raises(ValueError, match="keeps 250 steps"):
        respacing_for(SamplerConfig(num_steps=100, respacing="90,60,60,20,20"), 1000)
    with pytest.raises(ValidationError, match="eta=0"):
        SamplerConfig(name="ddpm", eta=0.5)


def test_an_empty_chain_has_no_final_image() -> None:
    with pytest.raises(ValueError, match="no steps"):
        final_x([])
