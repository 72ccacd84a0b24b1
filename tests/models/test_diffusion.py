"""Diffusion process: identities of its tables, respacing, parameterisations, losses and timestep sampling."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.diffusion import (
    Diffusion,
    DiffusionConfig,
    LossSecondMomentTimesteps,
    Prediction,
    UniformTimesteps,
    cosine_betas,
    discretized_gaussian_log_likelihood,
    normal_kl,
    space_timesteps,
)

SCHEDULES = ["linear", "cosine", "quad", "warmup10", "warmup50", "const", "jsd"]


def process(respacing: str = "", **fields: Any) -> Diffusion:
    return Diffusion(DiffusionConfig(**fields), respacing)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("respacing", ["", "10", "ddim50", "10,20,30"])
def test_tables_agree_with_each_other(schedule: str, respacing: str) -> None:
    diffusion = process(respacing, schedule=schedule, num_timesteps=100)
    full_chain = process(schedule=schedule, num_timesteps=100)
    # a shorter chain has the signal of the whole one where both have steps
    np.testing.assert_allclose(diffusion.alphas_cumprod, full_chain.alphas_cumprod[diffusion.timestep_map], rtol=1e-10)
    # the posterior mean of a noiseless x_t is the noiseless x_{t-1}
    signal = diffusion.posterior_mean_coef1 + diffusion.posterior_mean_coef2 * diffusion.sqrt_alphas_cumprod
    np.testing.assert_allclose(signal, np.sqrt(diffusion.alphas_cumprod_prev), rtol=1e-9)
    # x_{t-1} drawn from the posterior has the variance of q(x_{t-1} | x_0)
    spread = diffusion.posterior_variance + diffusion.posterior_mean_coef2**2 * (1 - diffusion.alphas_cumprod)
    np.testing.assert_allclose(spread, 1 - diffusion.alphas_cumprod_prev, rtol=1e-8, atol=1e-15)


def test_only_the_last_cosine_beta_is_capped() -> None:
    for num_timesteps in (10, 1000, 4000):
        assert np.flatnonzero(cosine_betas(num_timesteps) >= 0.999).tolist() == [num_timesteps - 1]


def test_betas_outside_their_range_are_refused() -> None:
    assert process(num_timesteps=20).betas[-1] == 1.0  # just allowed, though it leaves no signal
    with pytest.raises(ValueError, match="num_timesteps=19"):
        process(num_timesteps=19)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ddim300", r"no integer stride keeps 300 of 1000 steps; the nearest possible counts are 250 and 334"),
        ("10,500,10", "section 1 has only 333 timesteps"),
        ("10,,10", "not an integer"),
        ("7x", "not an integer"),
        ("ddim", "not an integer"),
        ("1", "at least 2"),
        ("0", "at least 2"),
    ],
)
def test_impossible_respacings_are_refused_with_the_reason(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process(spec)


def test_respacing_keeps_the_published_timesteps() -> None:
    assert space_timesteps(1000, "250")[[0, 1, -2, -1]].tolist() == [0, 4, 995, 999]
    assert space_timesteps(1000, "ddim25")[[0, 1, -1]].tolist() == [0, 40, 960]
    assert space_timesteps(300, [10, 15, 20]).tolist() == space_timesteps(300, "10,15,20").tolist()
    assert len([n for n in range(1, 1001) if _possible(f"ddim{n}")]) == 62


def _possible(spec: str) -> bool:
    try:
        space_timesteps(1000, spec)
    except ValueError:
        return False
    return True


def test_the_network_receives_original_timesteps() -> None:
    x = randn(3, 1, 2, 2)
    t = torch.tensor([0, 1, 9])
    assert process("10").model_timesteps(t, x).tolist() == [0, 111, 999]
    assert process("10").model_timesteps(9, x).tolist() == [999] * 3
    rescaled = process("10", num_timesteps=4000, rescale_timesteps=True, schedule="cosine")
    assert rescaled.model_timesteps(9, x).tolist() == [999.75] * 3


def test_q_sample_has_the_stated_mean_and_variance() -> None:
    diffusion = process()
    x_start = torch.full((1, 1, 200, 200), 0.5)
    x_t = diffusion.q_sample(x_start, 300, randn(*x_start.shape))
    abar = diffusion.alphas_cumprod[300]
    assert x_t.mean().item() == pytest.approx(math.sqrt(abar) * 0.5, abs=0.01)
    assert x_t.var().item() == pytest.approx(1 - abar, rel=0.02)


@pytest.mark.parametrize("clip", [False, True])
def test_all_parameterisations_of_the_same_x_start_agree(clip: bool) -> None:
    x_start, noise = randn(4, 3, 4, 4).clamp(-1, 1), randn(4, 3, 4, 4, seed=1)
    t = torch.tensor([1, 100, 500, 800])
    predictions: list[Prediction] = []
    for name in ("eps", "x_start", "previous_x"):
        diffusion = process(prediction=name, variance="fixed_large")
        x_t = diffusion.q_sample(x_start, t, noise)
        mean = diffusion.q_posterior_mean(x_start, x_t, t)
        output = {"eps": noise, "x_start": x_start, "previous_x": mean}[name]
        predictions.append(diffusion.predict(output, x_t, t, clip))
    for prediction in predictions:
        torch.testing.assert_close(prediction.pred_x_start, x_start, atol=2e-3, rtol=0)
        torch.testing.assert_close(prediction.mean, mean, atol=1e-4, rtol=0)
        torch.testing.assert_close(prediction.eps, noise, atol=2e-3, rtol=0)


def test_one_index_and_a_tensor_of_it_give_the_same_bits() -> None:
    x_t, output = randn(3, 3, 4, 4), randn(3, 6, 4, 4, seed=1)
    for variance in ("learned", "learned_range", "fixed_small", "fixed_large"):
        diffusion = process("10", variance=variance)
        out = output if diffusion.config.learns_variance else output[:, :3]
        for t in (0, 4, 9):
            scalar, batched = diffusion.predict(out, x_t, t), diffusion.predict(out, x_t, torch.full((3,), t))
            for field in ("eps", "pred_x_start", "mean", "variance", "log_variance"):
                a, b = torch.broadcast_tensors(getattr(scalar, field), getattr(batched, field))
                assert torch.equal(a, b), (variance, t, field)


def test_learned_range_variance_stays_between_its_bounds_and_reaches_them() -> None:
    diffusion = process(variance="learned_range")
    x_t = torch.zeros(1, 1, 1, 1)
    for t in (0, 1, 500, 999):
        low, high = diffusion.posterior_log_variance_clipped[t], math.log(diffusion.betas[t])
        logs = [
            diffusion.predict(torch.tensor([0.0, v]).view(1, 2, 1, 1), x_t, t).log_variance.item()
            for v in (-1, -0.5, 0, 0.5, 1)
        ]
        assert logs == sorted(logs)
        assert logs[0] == pytest.approx(low, rel=1e-6)
        assert logs[-1] == pytest.approx(high, rel=1e-6)


def test_a_network_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 output channels.*needs 6"):
        process(variance="learned_range").predict(randn(1, 3, 4, 4), randn(1, 3, 4, 4), 5)


@pytest.mark.parametrize("loss", ["simple", "rescaled_simple", "kl", "rescaled_kl"])
def test_the_true_noise_has_the_least_loss(loss: str) -> None:
    diffusion = process(loss=loss, variance="fixed_small")
    x_start, noise, t = randn(8, 3, 4, 4).clamp(-1, 1), randn(8, 3, 4, 4, seed=1), torch.arange(1, 801, 100)
    exact = diffusion.losses(lambda x, t: noise, x_start, t, noise)["loss"]
    worse = diffusion.losses(lambda x, t: noise + 0.1, x_start, t, noise)["loss"]
    assert exact.shape == (8,)
    assert (exact.abs() < 1e-4 * (1000 if loss == "rescaled_kl" else 1)).all()
    assert (worse > exact).all()


def test_the_bound_trains_the_variance_only() -> None:
    diffusion = process(loss="simple", variance="learned_range")
    x_start, noise, t = randn(2, 1, 4, 4).clamp(-1, 1), randn(2, 1, 4, 4, seed=1), torch.tensor([0, 500])
    output = randn(2, 2, 4, 4, seed=2).requires_grad_()
    terms = diffusion.losses(lambda x, t: output, x_start, t, noise)
    (of_vb,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert of_vb[:, :1].abs().max() == 0
    assert of_vb[:, 1:].abs().min() > 0
    assert of_mse[:, 1:].abs().max() == 0
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_loss_scales_are_the_chain_length() -> None:
    x_start, noise, t = randn(2, 1, 4, 4).clamp(-1, 1), randn(2, 1, 4, 4, seed=1), torch.tensor([0, 5])
    output = randn(2, 2, 4, 4, seed=2)

    def terms(loss: str) -> dict[str, Tensor]:
        return process("10", loss=loss).losses(lambda x, t: output, x_start, t, noise)

    torch.testing.assert_close(terms("rescaled_kl")["loss"], 10 * terms("kl")["loss"])
    torch.testing.assert_close(terms("rescaled_simple")["vb"], terms("simple")["vb"] * 10 / 1000)


def test_the_decoder_is_a_distribution_over_grey_levels() -> None:
    levels = torch.arange(256) / 127.5 - 1
    for mean, log_scale in ((0.0, -3.0), (0.3, -4.5), (-1.2, -1.0), (0.999, 0.5)):
        parameters = (torch.full_like(levels, mean), torch.full_like(levels, log_scale))
        log_probs = discretized_gaussian_log_likelihood(levels, *parameters)
        assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
        assert levels[log_probs.argmax()].item() == pytest.approx(max(min(mean, 1), -1), abs=1 / 127 + 1e-6)


def test_the_kl_of_gaussians_is_that_of_torch() -> None:
    mean1, log_variance1, mean2, log_variance2 = (torch.tensor(v) for v in (0.3, -1.0, -0.2, 0.4))
    p = torch.distributions.Normal(mean1, (0.5 * log_variance1).exp())
    q = torch.distributions.Normal(mean2, (0.5 * log_variance2).exp())
    kl = normal_kl(mean1, log_variance1, mean2, log_variance2)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))
    assert normal_kl(mean1, log_variance1, mean1, log_variance1) == 0


def test_uniform_timesteps_are_the_floor_of_their_uniforms() -> None:
    u = np.array([0.0, 0.1249, 0.1251, 0.5, np.nextafter(1.0, 0.0)])
    t, weights = UniformTimesteps(8).draw(u)
    assert t.tolist() == [0, 0, 1, 4, 7]
    assert weights.tolist() == [1.0] * 5


def losses_of(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (1.0 + t) * rng.exponential(size=len(t))


def test_loss_aware_sampling_is_unbiased_and_follows_the_losses() -> None:
    rng = np.random.default_rng([3, 1])
    sampler = LossSecondMomentTimesteps(20, history_per_term=10)
    all_timesteps = np.repeat(np.arange(20), 10)
    sampler.update(all_timesteps, losses_of(all_timesteps, rng))
    u = (np.arange(200_000) + 0.5) / 200_000
    t, weights = sampler.draw(u)
    counts = np.bincount(t, minlength=20)
    assert counts[15:].sum() > 2 * counts[:5].sum()
    # the weighted mean of any function of t is its mean over all timesteps
    assert np.mean(weights * np.sin(t)) == pytest.approx(np.mean(np.sin(np.arange(20))), abs=1e-3)


def test_loss_aware_sampling_is_uniform_until_every_timestep_is_known() -> None:
    sampler = LossSecondMomentTimesteps(4, history_per_term=2)
    sampler.update(np.array([0, 0, 1, 1, 2, 2, 3]), np.full(7, 5.0))
    assert sampler.weights().tolist() == [1.0] * 4
    sampler.update(np.array([3]), np.array([50.0]))
    assert sampler.weights()[3] > 2 * sampler.weights()[0]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_loss_aware_sampling_does_not_depend_on_the_number_of_workers(workers: int) -> None:
    def state(workers: int) -> dict[str, np.ndarray]:
        samplers = [LossSecondMomentTimesteps(5, history_per_term=3) for _ in range(workers)]
        for step in range(30):
            u = np.random.default_rng([7, step]).random(8)
            drawn = [s.draw(part)[0] for s, part in zip(samplers, np.split(u, workers), strict=True)]
            t = np.concatenate(drawn)  # gathered in the order of the ranks
            losses = losses_of(t, np.random.default_rng([8, step]))
            for sampler in samplers:
                sampler.update(t, losses)
        states = [{"history": sampler.history, "counts": sampler.counts} for sampler in samplers]
        for other in states[1:]:
            assert all(np.array_equal(other[name], states[0][name]) for name in states[0])
        return states[0]

    expected, actual = state(1), state(workers)
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


def test_time_embeddings_of_a_chain_are_computed_once() -> None:
    class Counting(torch.nn.Module):
        calls = 0

        def embed_timesteps(self, timesteps: Tensor) -> Tensor:
            self.calls += 1
            return timesteps[:, None].repeat(1, 4)

        def forward(self, x: Tensor, timesteps: Tensor, time_embedding: Tensor | None = None) -> Tensor:
            if time_embedding is None:
                time_embedding = self.embed_timesteps(timesteps)
            assert torch.equal(time_embedding[:, 0], timesteps)
            return x * time_embedding.mean()

    model, x = Counting(), randn(2, 1, 2, 2)
    denoise = process("10", variance="fixed_small").denoiser(model)
    chain = [denoise(x, t).eps for t in range(10)]
    assert model.calls == 1
    for t, eps in enumerate(chain):
        torch.testing.assert_close(denoise(x, torch.tensor([t, t])).eps, eps)
    assert model.calls == 11
