"""Gaussian diffusion: schedules, respacing, the processes q and p, losses and the sampling of timesteps.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), IDDPM (Nichol & Dhariwal 2021, arXiv 2102.09672), ADM
(Dhariwal & Nichol 2021, arXiv 2105.05233). Timesteps count from 0 (almost clean) to T - 1 (almost noise);
images are [B, C, H, W] in [-1, 1]. Tables are float64 NumPy arrays; arithmetic on images is float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor

Model = Callable[..., Tensor]  # (x_t [B, C, H, W], timesteps [B], **kwargs) -> [B, out, H, W]
Timestep = int | Tensor  # chain index: one for the whole batch, or int64 [B]


class DiffusionConfig(BaseModel, frozen=True, extra="forbid"):
    """The diffusion process and what the network predicts."""

    schedule: Literal["linear", "cosine", "quad", "warmup10", "warmup50", "const", "jsd"] = "linear"  # noise schedule
    num_timesteps: int = Field(1000, ge=2)  # T, the number of diffusion steps
    prediction: Literal["eps", "x_start", "previous_x"] = "eps"  # what the network predicts: noise, x_0 or x_(t-1)
    variance: Literal["fixed_small", "fixed_large", "learned", "learned_range"] = (
        "learned_range"  # variance of p(x_(t-1) | x_t)
    )
    loss: Literal["simple", "rescaled_simple", "kl", "rescaled_kl"] = "simple"  # training objective
    rescale_timesteps: bool = False  # pass t * 1000 / T to the network instead of t

    @property
    def learns_variance(self) -> bool:
        """Return whether the network has twice the output channels, for the variance."""
        return self.variance in ("learned", "learned_range")


# Schedules and respacing


def ddpm_betas(schedule: str, beta_start: float, beta_end: float, num_timesteps: int) -> NDArray[np.float64]:
    """Return the betas of one of DDPM's schedules, float64 [T]; unlike `betas_for`, this does not scale them with T."""

    def warmup(fraction: float) -> NDArray[np.float64]:
        betas = np.full(num_timesteps, beta_end, dtype=np.float64)
        warmup_steps = int(num_timesteps * fraction)
        betas[:warmup_steps] = np.linspace(beta_start, beta_end, warmup_steps, dtype=np.float64)
        return betas

    match schedule:
        case "linear":
            return np.linspace(beta_start, beta_end, num_timesteps, dtype=np.float64)
        case "quad":
            return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
        case "warmup10":
            return warmup(0.1)
        case "warmup50":
            return warmup(0.5)
        case "const":
            return np.full(num_timesteps, beta_end, dtype=np.float64)
        case "jsd":
            return 1.0 / np.linspace(num_timesteps, 1, num_timesteps, dtype=np.float64)
    raise ValueError(f"schedule={schedule!r} is unknown; use linear, quad, warmup10, warmup50, const, jsd or cosine")


def cosine_betas(num_timesteps: int) -> NDArray[np.float64]:
    """Return the betas whose alphas_cumprod is a squared cosine, each at most 0.999, float64 [T] (IDDPM eq. 17)."""

    def alphas_cumprod(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_timesteps)
    ratios = [alphas_cumprod((i + 1) / num_timesteps) / alphas_cumprod(i / num_timesteps) for i in steps]
    return np.minimum(1.0 - np.array(ratios), 0.999)


def betas_for(schedule: str, num_timesteps: int) -> NDArray[np.float64]:
    """Return the betas of the full process, float64 [T].

    DDPM's schedules go from 1e-4 to 0.02; the linear one is scaled by 1000 / T.
    """
    if schedule == "cosine":
        return cosine_betas(num_timesteps)
    scale = 1000 / num_timesteps if schedule == "linear" else 1.0
    return ddpm_betas(schedule, scale * 1e-4, scale * 0.02, num_timesteps)


def space_timesteps(num_timesteps: int, spec: str | Sequence[int]) -> NDArray[np.int64]:
    """Return the original timesteps of a shorter chain, sorted int64 (IDDPM section 4, DDIM section 4.2).

    Args:
        spec: "ddimN" keeps N timesteps with an integer stride, from 0. A list such as "10,20,30" divides the process
            into as many equal sections, and gives the number of timesteps to keep in each.

    Raises:
        ValueError: no such chain exists.
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        (count,) = _step_counts(spec[4:], spec)
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == count:
                return np.arange(0, num_timesteps, stride, dtype=np.int64)
        possible = {-(-num_timesteps // stride) for stride in range(1, num_timesteps)}
        nearest = sorted(sorted(possible, key=lambda n: abs(n - count))[:2])
        raise ValueError(
            f"respacing {spec!r}: no integer stride keeps {count} of {num_timesteps} steps; the nearest possible "
            f"counts are {' and '.join(map(str, nearest))}"
        )
    counts = _step_counts(spec, spec) if isinstance(spec, str) else list(spec)
    if not counts:
        raise ValueError(f"respacing {spec!r} has no sections; write step counts such as '250' or '10,20'")
    base_size, num_longer = divmod(num_timesteps, len(counts))
    timesteps: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = base_size + (section < num_longer)
        if size < count:
            raise ValueError(
                f"respacing {spec!r}: section {section} has only {size} timesteps, so it cannot keep {count}"
            )
        spacing = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # summed in floating point and rounded half to even, as in the published code
        for _ in range(count):
            timesteps.add(start + round(position))
            position += spacing
        start += size
    return np.array(sorted(timesteps), dtype=np.int64)


def _step_counts(text: str, spec: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"respacing {spec!r}: {text!r} is not an integer or a comma-separated list of them") from None


# The process


@dataclass(frozen=True)
class Prediction:
    """The model's prediction at x_t, float32 [B, C, H, W]; fixed variances broadcast to this shape."""

    eps: Tensor  # the noise, consistent with pred_x_start
    pred_x_start: Tensor
    mean: Tensor  # of p(x_{t-1} | x_t)
    variance: Tensor  # of p(x_{t-1} | x_t)
    log_variance: Tensor  # logarithm of the variance; also finite at t = 0, where a fixed variance is 0


Denoise = Callable[[Tensor, Timestep], Prediction]


class Diffusion:
    """The diffusion process, possibly respaced, with its float64 tables [T'].

    `num_timesteps` is T', the number of steps of this chain. `timestep_map`, int64 [T'], has the original timestep of
    each step.

    Raises:
        ValueError: the respacing is impossible, a beta is outside (0, 1], or the chain has fewer than two steps.
    """

    def __init__(self, config: DiffusionConfig, respacing: str | Sequence[int] = "") -> None:
        self.config = config
        betas = betas_for(config.schedule, config.num_timesteps)
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"schedule={config.schedule!r} with num_timesteps={config.num_timesteps} has betas outside "
                "(0, 1]; use more timesteps"
            )
        if respacing == "":
            self.timestep_map = np.arange(config.num_timesteps, dtype=np.int64)
        else:
            self.timestep_map = space_timesteps(config.num_timesteps, respacing)
            alphas_cumprod = np.cumprod(1.0 - betas)[self.timestep_map]
            betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        self.num_timesteps = len(betas)
        if self.num_timesteps < 2:
            raise ValueError(f"respacing {respacing!r} keeps {self.num_timesteps} steps; a chain needs at least 2")
        scale = 1000.0 / config.num_timesteps if config.rescale_timesteps else 1.0
        self.model_timestep_map = np.float64(scale) * self.timestep_map  # what the network receives, float64 [T']
        self._make_tables(betas)
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}  # cache of `at`

    def _make_tables(self, betas: NDArray[np.float64]) -> None:
        self.betas = betas
        self.adds_noise = np.arange(len(betas)) > 0  # whether the reverse step at t adds noise
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.one_minus_alphas_cumprod_prev = 1.0 - self.alphas_cumprod_prev
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):  # beta = 1 at the last step is allowed
            self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
            self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
            self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)
            # q(x_{t-1} | x_t, x_0), DDPM eqs. 6-7
            self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
            # The variance is 0 at t = 0, so the published code takes the logarithm of the value at t = 1 there.
            self.posterior_log_variance_clipped = np.log(
                np.append(self.posterior_variance[1], self.posterior_variance[1:])
            )
            self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
            self.posterior_mean_coef2 = (
                (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - betas) / (1.0 - self.alphas_cumprod)
            )
            self.previous_x_coef1 = 1.0 / self.posterior_mean_coef1
            self.previous_x_coef2 = self.posterior_mean_coef2 / self.posterior_mean_coef1
            self.log_betas = np.log(betas)
            self.fixed_large_log_variance = np.log(np.append(self.posterior_variance[1], betas[1:]))

    def at(self, table: str, t: Timestep, like: Tensor) -> Tensor:
        """Return entries of a table, float32 on the device of `like`: 0-dim for an int t, [B, 1, ...] for t [B].

        The first call copies the whole table to the device, so later calls do not synchronise with the host.
        """
        key = (table, like.device)
        if key not in self._tensors:
            with torch.inference_mode(False):  # a later backward pass may need this cached tensor
                self._tensors[key] = torch.tensor(getattr(self, table), dtype=torch.float32, device=like.device)
        entries = self._tensors[key][t]
        return entries if isinstance(t, int) else entries.view(-1, *[1] * (like.ndim - 1))

    def model_timesteps(self, t: Timestep, like: Tensor) -> Tensor:
        """Return the timesteps that the network receives at chain indices t, float32 [B]."""
        timesteps = self.at("model_timestep_map", t, like)
        return timesteps.expand(len(like)) if isinstance(t, int) else timesteps.view(-1)

    def q_sample(self, x_start: Tensor, t: Timestep, noise: Tensor) -> Tensor:
        """Return x_t ~ q(x_t | x_0) from standard normal `noise` (DDPM eq. 4)."""
        return (
            self.at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Timestep) -> Tensor:
        """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        return self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t

    def x_start_from_eps(self, x_t: Tensor, t: Timestep, eps: Tensor) -> Tensor:
        """Return x_0 from x_t and the noise (DDPM eq. 4)."""
        return self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def eps_from_x_start(self, x_t: Tensor, t: Timestep, x_start: Tensor) -> Tensor:
        """Return the noise from x_t and x_0 (DDPM eq. 4)."""
        recip = self.at("sqrt_recip_alphas_cumprod", t, x_t)
        return (recip * x_t - x_start) / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def variance(self, values: Tensor | None, t: Timestep, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the variance of p(x_{t-1} | x_t) and its logarithm.

        Args:
            values: the second half of the network's output; None = the variance is fixed, and the results are 0-dim
                for an int t and [B, 1, 1, 1] otherwise.
        """
        if values is None and self.config.variance == "fixed_small":
            # These differ at t = 0, where the variance is 0 (see posterior_log_variance_clipped).
            return self.at("posterior_variance", t, like), self.at("posterior_log_variance_clipped", t, like)
        if values is None:
            log_variance = self.at("fixed_large_log_variance", t, like)
        elif self.config.variance == "learned":
            log_variance = values
        else:
            low = self.at("posterior_log_variance_clipped", t, like)
            high = self.at("log_betas", t, like)
            fraction = (values + 1) / 2  # IDDPM eq. 15; not clamped
            log_variance = fraction * high + (1 - fraction) * low
        return torch.exp(log_variance), log_variance

    def split_output(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """Split the network's output into the prediction and the variance values (None if not learned), float32.

        Raises:
            ValueError: the number of output channels does not fit the configured variance.
        """
        expected = channels * (2 if self.config.learns_variance else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"the network has {output.shape[1]} output channels; variance={self.config.variance!r} with "
                f"{channels} image channels needs {expected}"
            )
        output = output.float()
        if not self.config.learns_variance:
            return output, None
        return output[:, :channels], output[:, channels:]

    def predict(self, output: Tensor, x_t: Tensor, t: Timestep, clip: bool = True) -> Prediction:
        """Convert the network's `output` [B, C or 2C, H, W] at x_t to a prediction.

        `clip` clamps pred_x_start to [-1, 1], and eps is then the noise that is consistent with it.
        """
        predicted, variance_values = self.split_output(output, x_t.shape[1])
        match self.config.prediction:
            case "eps":
                x_start = self.x_start_from_eps(x_t, t, predicted)
            case "x_start":
                x_start = predicted
            case "previous_x":
                x_start = self.at("previous_x_coef1", t, x_t) * predicted - self.at("previous_x_coef2", t, x_t) * x_t
        if clip:
            x_start = x_start.clamp(-1, 1)
        predicts_mean = self.config.prediction == "previous_x"
        variance, log_variance = self.variance(variance_values, t, x_t)
        return Prediction(
            eps=self.eps_from_x_start(x_t, t, x_start),
            pred_x_start=x_start,
            mean=predicted if predicts_mean else self.q_posterior_mean(x_start, x_t, t),
            variance=variance,
            log_variance=log_variance,
        )

    def with_eps(self, prediction: Prediction, x_t: Tensor, t: Timestep, eps: Tensor, clip: bool = False) -> Prediction:
        """Return `prediction` at x_t with its noise replaced by `eps`, and the pred_x_start and mean of this noise.

        `clip` clamps pred_x_start to [-1, 1], and changes the noise to be consistent with it.
        """
        x_start = self.x_start_from_eps(x_t, t, eps)
        if clip:
            x_start = x_start.clamp(-1, 1)
            eps = self.eps_from_x_start(x_t, t, x_start)
        mean = self.q_posterior_mean(x_start, x_t, t)
        return replace(prediction, eps=eps, pred_x_start=x_start, mean=mean)

    def on_chain(self, model: Model) -> Model:
        """Return a function (x_t, t, **kwargs) that calls `model` with the timestep of chain index t.

        Samplers pass an int t. Then, if the model has `embed_timesteps`, the time embeddings of the whole chain are
        computed once, at the first call and without gradients.
        """
        embed = getattr(model, "embed_timesteps", None)
        embeddings: Tensor | None = None

        def call(x_t: Tensor, t: Timestep, **kwargs: Any) -> Tensor:
            nonlocal embeddings
            timesteps = self.model_timesteps(t, x_t)
            if isinstance(t, int) and embed is not None:
                if embeddings is None:
                    with torch.inference_mode(False), torch.no_grad():
                        indices = torch.arange(self.num_timesteps, device=x_t.device)
                        embeddings = embed(self.model_timesteps(indices, like=indices))
                kwargs["time_embedding"] = embeddings[t].expand(len(x_t), -1)
            return model(x_t, timesteps, **kwargs)

        return call

    def denoiser(
        self, model: Model, y: Tensor | None = None, low_res: Tensor | None = None, clip: bool = True
    ) -> Denoise:
        """Return the function (x_t, t) -> Prediction that samplers take.

        Args:
            y: labels int64 [B] of a conditional model.
            low_res: images float32 [B, C, h, w] in [-1, 1] for an upsampler.
            clip: clamp pred_x_start to [-1, 1].
        """
        network = self.on_chain(model)
        inputs = {"y": y, "low_res": low_res}
        kwargs = {name: value for name, value in inputs.items() if value is not None}

        def denoise(x_t: Tensor, t: Timestep) -> Prediction:
            return self.predict(network(x_t, t, **kwargs), x_t, t, clip)

        return denoise

    # Losses

    def vb_term(self, x_start: Tensor, x_t: Tensor, t: Timestep, prediction: Prediction) -> Tensor:
        """Return a term of the variational bound in bits per dimension [B] (DDPM eq. 5, IDDPM eqs. 4-6).

        It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the decoder's negative log-likelihood.
        """
        kl = normal_kl(
            self.q_posterior_mean(x_start, x_t, t),
            self.at("posterior_log_variance_clipped", t, x_t),
            prediction.mean,
            prediction.log_variance,
        )
        nll = -discretized_gaussian_log_likelihood(x_start, prediction.mean, 0.5 * prediction.log_variance)
        if isinstance(t, int):
            return mean_flat(nll if t == 0 else kl) / math.log(2)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)

    def losses(self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor, **model_kwargs: Any) -> dict[str, Tensor]:
        """Return loss terms [B] at chain indices t int64 [B]: "loss" and, if it has parts, "mse" and "vb".

        "simple" is DDPM eq. 14; with a learned variance it is IDDPM eq. 16, where the mean in the bound is detached, so
        that the bound trains only the variance. "rescaled_simple" multiplies this bound by T / 1000. "kl" is the
        bound's term in bits per dimension, and "rescaled_kl" is T times that. T is the length of this chain.
        """
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t, x_t), **model_kwargs)
        if self.config.loss in ("kl", "rescaled_kl"):
            vb = self.vb_term(x_start, x_t, t, self.predict(output, x_t, t, clip=False))
            return {"loss": vb * self.num_timesteps if self.config.loss == "rescaled_kl" else vb}
        predicted, variance_values = self.split_output(output, x_t.shape[1])
        match self.config.prediction:
            case "eps":
                target = noise
            case "x_start":
                target = x_start
            case "previous_x":
                target = self.q_posterior_mean(x_start, x_t, t)
        mse = mean_flat((target - predicted) ** 2)
        if variance_values is None:
            return {"loss": mse, "mse": mse}
        mean_detached = torch.cat([predicted.detach(), variance_values], dim=1)
        vb = self.vb_term(x_start, x_t, t, self.predict(mean_detached, x_t, t, clip=False))
        if self.config.loss == "rescaled_simple":
            vb = vb * (self.num_timesteps / 1000.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}


def mean_flat(x: Tensor) -> Tensor:
    """Return the mean over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise; arguments broadcast."""
    return 0.5 * (
        -1.0
        + log_variance2
        - log_variance1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the standard normal CDF that the published likelihoods use."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Return the log-probability in nats, elementwise, of 8-bit images x in [-1, 1] under a Gaussian (DDPM eq. 13).

    The bin of a grey level is +-1/255 around it; the bins of 0 and 255 extend to infinity. Probabilities are at least
    1e-12.
    """
    centred = x - means
    inverse_scale = torch.exp(-log_scales)
    upper = approx_standard_normal_cdf(inverse_scale * (centred + 1.0 / 255.0))
    lower = approx_standard_normal_cdf(inverse_scale * (centred - 1.0 / 255.0))
    log_upper = upper.clamp(min=1e-12).log()
    log_one_minus_lower = (1.0 - lower).clamp(min=1e-12).log()
    log_between = (upper - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_one_minus_lower, log_between))


# Timestep sampling


class UniformTimesteps:
    """Samples all timesteps with equal probability, so that all loss weights are 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def weights(self) -> NDArray[np.float64]:
        """Return unnormalised probabilities, float64 [T]."""
        return np.ones(self.num_timesteps)

    def draw(self, u: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return timesteps [B] for uniform u [B] in [0, 1) by the inverse CDF, and loss weights 1 / (T p(t)) [B]."""
        weights = self.weights()
        probabilities = weights / weights.sum()
        cdf = np.cumsum(probabilities)
        t = np.searchsorted(cdf / cdf[-1], u, side="right").astype(np.int64)
        return t, (1.0 / (self.num_timesteps * probabilities[t])).astype(np.float32)

    def update(self, t: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Do nothing; the probabilities do not depend on the losses."""


class LossSecondMomentTimesteps(UniformTimesteps):
    """Samples timesteps with p(t) proportional to sqrt(E[L_t^2]) over the latest losses (IDDPM eq. 18).

    Sampling is uniform until every timestep has `history_per_term` losses. After that, a fraction `uniform_prob` of the
    probability stays uniform. If there are several workers, each has a copy of this object. To keep the copies equal,
    gather the losses of all workers in a fixed order and pass all of them to each `update`.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(num_timesteps)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self.history = np.zeros((num_timesteps, history_per_term), dtype=np.float64)  # oldest first
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def weights(self) -> NDArray[np.float64]:
        """Return unnormalised probabilities, float64 [T]; ones until the history is full."""
        if (self.counts < self.history_per_term).any():
            return super().weights()
        root_mean_squares = np.sqrt(np.mean(self.history**2, axis=1))
        probabilities = root_mean_squares / root_mean_squares.sum()
        return probabilities * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update(self, t: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Add unweighted losses [N] at timesteps [N] to the history, in the order given."""
        for step, loss in zip(t, losses, strict=True):
            if self.counts[step] == self.history_per_term:
                self.history[step, :-1] = self.history[step, 1:]
                self.history[step, -1] = loss
            else:
                self.history[step, self.counts[step]] = loss
                self.counts[step] += 1


TimestepSampler = UniformTimesteps | LossSecondMomentTimesteps
