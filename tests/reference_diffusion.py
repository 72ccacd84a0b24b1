"""Comparison of networks, diffusion, samplers, guidance, losses and likelihoods with golden data.

A folder of this kind has cases.json with its networks, the diffusion process of its files and the tolerance of every
array. The arrays in a file determine its check, and their names determine what the check computes.
"""

import copy
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from models.diffusion import (
    Denoise,
    Diffusion,
    DiffusionConfig,
    LossSecondMomentTimesteps,
    Prediction,
    Timestep,
    ddpm_betas,
    discretized_gaussian_log_likelihood,
    normal_kl,
    space_timesteps,
)
from models.guidance import classifier_gradient, log_prob_gradient, mean_shift, score_shift
from models.likelihood import bits_per_dim, interpolate, interpolated_latent, progressive_coding
from models.samplers import (
    Noise,
    SamplerConfig,
    Step,
    ddim,
    ddim_reverse,
    ddim_reverse_step,
    ddim_step,
    ddpm,
    ddpm_step,
    sample,
)
from models.unet import ClassifierConfig, NoisyClassifier, UNet, UNetConfig, timestep_embedding
from orchestrator.weights.flags import parse_flags
from orchestrator.weights.shapes import shapes_of
from tests.comparison import Compute, GoldenFile, Row

LOSSES = {"MSE": "simple", "RESCALED_MSE": "rescaled_simple", "KL": "kl", "RESCALED_KL": "rescaled_kl"}
EDM_SETTINGS = {"rho", "sigma_min", "sigma_max", "S_churn", "S_min", "S_max", "S_noise"}
PREDICTIONS = {"EPSILON": "eps", "START_X": "x_start", "PREVIOUS_X": "previous_x"}


def recognises(folder: Path) -> bool:
    """Return whether the folder describes networks and a diffusion process."""
    cases = folder / "cases.json"
    return cases.is_file() and {"networks", "diffusion"} <= set(json.loads(cases.read_text()))


# Published names of settings -> our configs


def network_config(kind: str, arguments: dict[str, Any]) -> UNetConfig | ClassifierConfig:
    """Return the config for arguments of the published constructors, whose defaults differ from ours."""
    fields: dict[str, Any] = {
        "num_heads": 1,
        "channel_mult": (1, 2, 4, 8),
        "use_scale_shift_norm": False,
        "resblock_updown": False,
    }
    fields |= arguments
    factors = fields.pop("attention_resolutions")
    effective = [factor for factor in factors if factor < 2 ** len(fields["channel_mult"])]  # others have no effect
    fields["attention_resolutions"] = tuple(fields["image_size"] // factor for factor in effective)
    for name in ("num_head_channels", "num_heads_upsample"):
        if fields.get(name) == -1:
            del fields[name]
    fields["gradient_checkpointing"] = fields.pop("use_checkpoint", False)
    if fields.pop("use_fp16", False) or fields.pop("dims", 2) != 2:
        raise ValueError(f"cannot compare a network with use_fp16 or dims other than 2: {arguments}")
    if kind == "classifier":
        fields["num_classes"] = fields.pop("out_channels")
        return ClassifierConfig(**{"pool": "adaptive", **fields})
    if kind == "super_resolution_unet":
        fields["low_res_size"] = fields["image_size"] // 2  # any size: the images are upsampled to image_size
    elif kind != "unet":
        raise ValueError(f"unknown kind of network {kind!r}")
    return UNetConfig(**fields)


class Folder:
    """The settings, networks and processes of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: dict[str, Any] = json.loads((path / "cases.json").read_text())
        self.networks: dict[str, dict[str, Any]] = self.cases["networks"]
        self.network = cache(self._load_network)

    def _load_network(self, name: str) -> UNet | NoisyClassifier:
        entry = self.networks[name]
        config = network_config(entry["kind"], entry["arguments"])
        network = config.build()
        weights = load_file(self.path / entry["weights"])
        network.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
        return network.eval()

    def settings(self, stem: str) -> dict[str, Any]:
        """Return the diffusion settings of the folder, with the changes that cases.json states for this file."""
        own = self.cases.get(stem, {})
        return {**self.cases["diffusion"], **(own if isinstance(own, dict) else {})}

    def diffusion(self, stem: str, respacing: str = "", **changes: Any) -> Diffusion:
        """Return the diffusion process of a file. `changes` overrides fields of its config."""
        fields = {k: v for k, v in self.settings(stem).items() if k in DiffusionConfig.model_fields}
        return Diffusion(DiffusionConfig(**{**fields, **changes}), respacing)

    def unet(self, stem: str, role: str = "model") -> UNet:
        """Return the U-Net with this role in a file."""
        network = self.network(self.settings(stem)[role])
        assert isinstance(network, UNet)
        return network

    def classifier(self, stem: str) -> NoisyClassifier:
        """Return the classifier of a file."""
        network = self.network(self.settings(stem)["classifier"])
        assert isinstance(network, NoisyClassifier)
        return network


def labels(network: UNet, y: Tensor | None) -> Tensor | None:
    """Return labels for networks that take them; golden files also have labels for their classifiers."""
    return None if network.config.num_classes is None else y


# The kinds of files: each function returns a function that computes the expected value of an array by its name


def of_network(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare a network's output at stored inputs, and its gradients."""
    network = folder.network(golden.path.stem)
    if isinstance(network, NoisyClassifier):
        return of_classifier(golden, network)
    x = golden.tensor("x").requires_grad_()
    y, low_res = golden.optional("y"), golden.optional("low_res")
    extra = {} if low_res is None else {"low_res": low_res}

    @cache
    def forward(timesteps: str) -> Tensor:
        return network(x, golden.tensor(timesteps), y, **extra)

    @cache
    def gradients() -> dict[str, Tensor]:
        x.grad = None
        network.zero_grad()
        (network(x, golden.tensor("t"), y, **extra) * golden.tensor("grad_w")).sum().backward()
        parameters = {f"grad_param.{k}": p.grad for k, p in network.named_parameters() if p.grad is not None}
        norm = torch.stack([grad.double().norm() for grad in parameters.values()]).norm()
        return {"grad_norm_all_params": norm, **parameters, **({} if x.grad is None else {"grad_x": x.grad})}

    def upsampled_low_res() -> Tensor:
        inputs: list[Tensor] = []
        hook = network.input_blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with hook:
            network(x, golden.tensor("t"), y, **extra)
        return inputs[0][:, x.shape[1] :]

    def compute(name: str) -> Any:
        if name == "out":
            return forward("t")
        if name.startswith("out_"):
            return forward(name.removeprefix("out_"))
        if name == "upsampled_low_res":
            return upsampled_low_res()
        return gradients().get(name) if name.startswith("grad_") and name != "grad_w" else None

    return compute


def of_classifier(golden: GoldenFile, classifier: NoisyClassifier) -> Compute:
    """Compare logits, the label's log-probability and its gradient with respect to the image."""
    x, t = golden.tensor("x"), golden.tensor("t")

    @torch.no_grad()
    def compute(name: str) -> Any:
        if name == "logits":
            return classifier(x, t)
        if name == "log_prob_y":
            return classifier(x, t).log_softmax(dim=1).gather(1, golden.tensor("y")[:, None])[:, 0]
        if name == "grad_log_prob_x":
            return log_prob_gradient(classifier, x, t, golden.tensor("y"))
        return None

    return compute


def of_schedules(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare the tables of whole processes."""

    @cache
    def process(schedule: str, num_timesteps: int) -> Diffusion:
        return Diffusion(DiffusionConfig.model_validate({"schedule": schedule, "num_timesteps": num_timesteps}))

    def compute(name: str) -> Any:
        if match := re.fullmatch(r"ddpm_(\w+)_([\d.e+-]+)_([\d.e+-]+)_(\d+)\.betas", name):
            return ddpm_betas(match[1], float(match[2]), float(match[3]), int(match[4]))
        if match := re.fullmatch(r"(\w+)_(\d+)\.(\w+)", name):
            return getattr(process(match[1], int(match[2])), match[3], None)
        return None

    return compute


def of_respacing(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare timesteps and tables of the cases in respacing_cases.json."""
    cases = {case["id"]: case for case in respacing_cases(folder)["cases"]}

    @cache
    def process(case_id: str) -> Diffusion:
        case = cases[case_id]
        fields = {"schedule": case["schedule"], "num_timesteps": case["num_timesteps"]}
        return Diffusion(DiffusionConfig.model_validate(fields), case["spec"])

    def compute(name: str) -> Any:
        case_id, _, table = name.rpartition(".")
        return getattr(process(case_id), table, None) if case_id in cases else None

    return compute


def of_timestep_embedding(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare sinusoidal embeddings of several sizes."""

    def compute(name: str) -> Any:
        match = re.fullmatch(r"emb_dim(\d+)_max([\d.]+)", name)
        return match and timestep_embedding(golden.tensor("t"), int(match[1]), float(match[2]))

    return compute


STEP = re.compile(
    r"step\.clip(?P<clip>[01])\.(?:"
    r"p_mean_variance\.(?P<field>mean|variance|log_variance|pred_xstart)"
    r"|condition_mean_s(?P<mean_scale>[\d.]+)"
    r"|condition_score_s(?P<score_scale>[\d.]+)\.(?P<score_field>mean|pred_xstart)"
    r"|p_sample(?:_guided_s(?P<ddpm_scale>[\d.]+))?\.sample"
    r"|ddim(?:_guided_s(?P<ddim_scale>[\d.]+))?_eta(?P<eta>[\d.]+)\.sample"
    r"|(?P<reverse>ddim_reverse)\.sample)"
)


def of_sampler_steps(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare one step of each sampler, guided or not, with a different timestep for each element of the batch."""
    stem = golden.path.stem
    settings = folder.settings(stem)
    diffusion = folder.diffusion(stem, settings["respacing_ddpm"])
    unet, classifier = folder.unet(stem), folder.classifier(stem)
    x, t, y = golden.tensor("step.x"), golden.tensor("step.t"), golden.tensor("y")

    def denoiser(clip: bool, mean_scale: float = 0.0, score_scale: float = 0.0) -> Denoise:
        denoise = diffusion.denoiser(unet, labels(unet, y), clip=clip)
        if mean_scale:
            return mean_shift(denoise, classifier_gradient(classifier, diffusion, y, mean_scale))
        if score_scale:
            return score_shift(denoise, classifier_gradient(classifier, diffusion, y, score_scale), diffusion)
        return denoise

    @torch.no_grad()
    def compute(name: str) -> Any:
        if name == "timestep_map":
            return diffusion.timestep_map
        if name in ("step.model_t", "step.classifier_t"):
            return diffusion.model_timesteps(t, x)
        if match := re.fullmatch(r"step\.grad_s([\d.]+)", name):
            return classifier_gradient(classifier, diffusion, y, float(match[1]))(x, t)
        match = STEP.fullmatch(name)
        if match is None:
            return None
        groups = {key: value for key, value in match.groupdict().items() if value is not None}
        mean_scale = float(groups.get("mean_scale", groups.get("ddpm_scale", 0)))
        score_scale = float(groups.get("score_scale", groups.get("ddim_scale", 0)))
        prediction = denoiser(groups["clip"] == "1", mean_scale, score_scale)(x, t)
        if "field" in groups or "score_field" in groups:
            return prediction_field(prediction, groups.get("field") or groups["score_field"])
        if "mean_scale" in groups:
            return prediction.mean
        if "reverse" in groups:
            return ddim_reverse_step(diffusion, prediction, x, t)
        noise = golden.tensor("step.noise")
        if "eta" in groups:
            return ddim_step(diffusion, prediction, x, t, noise, float(groups["eta"]))
        return ddpm_step(diffusion, prediction, x, t, noise)

    return compute


def prediction_field(prediction: Prediction, name: str) -> Tensor:
    """Return a field by its published name; fixed variances are [B] there."""
    value: Tensor = getattr(prediction, "pred_x_start" if name == "pred_xstart" else name)
    return value.flatten() if value.shape[1:].numel() == 1 else value


def of_sampler_trajectories(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare whole chains, guided or not, the deterministic encoding, and an interpolation."""
    stem = golden.path.stem
    settings = folder.settings(stem)
    chains = {name: folder.diffusion(stem, settings[f"respacing_{name}"]) for name in ("ddpm", "ddim")}
    unet, classifier = folder.unet(stem), folder.classifier(stem)
    y = golden.tensor("y")

    def stored_noise(diffusion: Diffusion, noises: Tensor, first_is_last: bool) -> Noise:
        chain = diffusion.timestep_map.tolist()
        order = chain[::-1] if first_is_last else chain
        return lambda original: noises[order.index(original)]

    @cache
    def run(sampler: str, scale: float, eta: float) -> list[Step]:
        diffusion = chains[sampler]
        denoise = diffusion.denoiser(unet, labels(unet, y))
        noise = stored_noise(diffusion, golden.tensor("noise"), first_is_last=True)
        x_T = golden.tensor("x_T")
        if sampler == "ddpm":
            if scale:
                denoise = mean_shift(denoise, classifier_gradient(classifier, diffusion, y, scale))
            return list(ddpm(denoise, diffusion, x_T, noise))
        if scale:
            denoise = score_shift(denoise, classifier_gradient(classifier, diffusion, y, scale), diffusion)
        return list(ddim(denoise, diffusion, x_T, noise, eta=eta))

    @cache
    def encoded() -> list[Step]:
        diffusion = chains["ddim"]
        denoise = diffusion.denoiser(unet, labels(unet, y), clip=False)
        return list(ddim_reverse(denoise, diffusion, golden.tensor("reverse.x0")))

    def interpolation(name: str) -> Any:
        if name not in ("x_t", "out"):
            return None
        first, second, noise1, noise2 = (golden.tensor(f"interpolate.{k}") for k in ("x1", "x2", "noise1", "noise2"))
        t, lam = int(golden.array("interpolate.t")), float(golden.array("interpolate.lam"))
        diffusion = chains["ddpm"]
        if name == "x_t":
            return interpolated_latent(diffusion, (first, second), (noise1, noise2), lam, t)
        # the reverse process used noise[0] in its first step, at index t
        noise = stored_noise(diffusion, golden.tensor("noise")[: t + 1].flip(0), first_is_last=False)
        denoise = diffusion.denoiser(unet, labels(unet, y))
        return interpolate(denoise, diffusion, (first, second), (noise1, noise2), lam, t, noise)

    @torch.no_grad()
    def compute(name: str) -> Any:
        group, _, array = name.rpartition(".")
        if array == "timestep_map" and group in chains:
            return chains[group].timestep_map
        if group == "interpolate":
            return interpolation(array)
        if group == "reverse":
            after = re.fullmatch(r"after_(\d+)_steps?", array)
            if after:
                return encoded()[int(after[1]) - 1].x
            return encoded()[-1].x if array == "final" else None
        match = re.fullmatch(r"(ddpm|ddim)(?:_guided_s([\d.]+))?(?:_eta([\d.]+))?", group)
        if match is None or array not in ("samples", "pred_xstart", "final"):
            return None
        steps = run(match[1], float(match[2] or 0), float(match[3] or 0))
        if array == "final":
            return steps[-1].x
        return torch.stack([step.x if array == "samples" else step.pred_x_start for step in steps])

    return compute


def of_edm_sampler(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare EDM's sampler for the folder's U-Nets; settings and tolerances are in the .json of the same name."""
    cases: dict[str, dict[str, Any]] = json.loads(golden.path.with_suffix(".json").read_text())
    golden.tolerances = {}
    for name, case in cases.items():
        golden.tolerances[f"{name}.sample"] = {"tol": case["tolerance_of_sample"]}
        for levels in ("u", "sigmas_in_call_order"):  # computed in float32
            golden.tolerances[f"{name}.{levels}"] = {"tol": 1e-6 * float(golden.arrays[f"{name}.{levels}"].max())}

    @cache
    def run(name: str) -> tuple[Tensor, list[float]]:
        case = cases[name]
        settings = {key.lower(): case[key] for key in case.keys() & EDM_SETTINGS}
        sampler = SamplerConfig(name="edm", num_steps=case["num_steps"], **settings)
        network = folder.network(case["model"])
        assert isinstance(network, UNet)
        learned = network.config.out_channels > network.config.in_channels
        diffusion = folder.diffusion(
            golden.path.stem, schedule=case["schedule"], num_timesteps=case["num_timesteps"],
            variance="learned_range" if learned else "fixed_large",
        )  # fmt: skip
        y, noises = golden.tensor(f"{name}.y"), golden.tensor(f"{name}.noise_in_call_order")
        plain_denoise, levels = diffusion.denoiser(network, labels(network, y), clip=False), list[float]()

        def denoise(x_t: Tensor, t: Timestep) -> Prediction:
            levels.append(float(noise_levels(diffusion)[t]))
            return plain_denoise(x_t, t)

        steps = list(sample(sampler, denoise, diffusion, golden.tensor(f"{name}.latents"), lambda step: noises[step]))
        if len(levels) != case["network_evaluations"]:
            raise ValueError(f"{len(levels)} network evaluations, golden {case['network_evaluations']}")
        return steps[-1].x, levels

    @torch.no_grad()
    def compute(array: str) -> Any:
        name, _, kind = array.partition(".")
        if kind == "sample":
            return run(name)[0]
        if kind == "sigmas_in_call_order":
            return np.array(run(name)[1])
        if kind == "u":
            case = cases[name]
            changes = {key: case[key] for key in ("schedule", "num_timesteps")}
            return np.append(noise_levels(folder.diffusion(golden.path.stem, **changes))[::-1], 0.0)
        return None

    return compute


def noise_levels(diffusion: Diffusion) -> NDArray[np.float64]:
    """Return sigma = sqrt((1 - abar) / abar) of every timestep."""
    return diffusion.sqrt_one_minus_alphas_cumprod / diffusion.sqrt_alphas_cumprod


def of_parameterisations(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare means and variances of p for every meaning of a network's output, without rescaled timesteps."""
    stem = golden.path.stem
    t = golden.tensor("t")

    def predict(prediction: str, variance: str) -> Prediction:
        learned = variance.startswith("LEARNED")
        unet = folder.unet(stem, "learned_model" if learned else "model")
        x = golden.tensor("LEARNED.x" if learned else "x")
        y = golden.optional("LEARNED.y" if learned else "y")
        diffusion = folder.diffusion(
            stem, prediction=PREDICTIONS[prediction], variance=variance.lower(), rescale_timesteps=False
        )
        return diffusion.denoiser(unet, labels(unet, y))(x, t)

    @torch.no_grad()
    def compute(name: str) -> Any:
        if name == "model_out":
            unet = folder.unet(stem)
            return unet(golden.tensor("x"), t, labels(unet, golden.optional("y")))
        match = re.fullmatch(
            rf"(?:({'|'.join(PREDICTIONS)})\.)?(?:(FIXED_SMALL|FIXED_LARGE|LEARNED|LEARNED_RANGE)\.)?"
            r"(mean|variance|log_variance|pred_xstart)",
            name,
        )
        if match is None or not (match[1] or match[2]):
            return None
        return prediction_field(predict(match[1] or "EPSILON", match[2] or "FIXED_LARGE"), match[3])

    return compute


def of_losses(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare loss terms of every objective and their gradients, on the whole chain and on a respaced one."""
    stem = golden.path.stem
    settings = folder.settings(stem)
    unet = folder.unet(stem)
    loss_names = "|".join(sorted(LOSSES, key=len, reverse=True))

    @cache
    def terms(loss: str, respaced: bool) -> dict[str, Tensor]:
        diffusion = folder.diffusion(stem, settings["respacing_ddpm"] if respaced else "", loss=LOSSES[loss])
        x_start, noise = golden.tensor("x_start"), golden.tensor("noise")
        t = golden.tensor("respaced.t" if respaced else "t")
        return diffusion.losses(unet, x_start, t, noise, **label_kwargs(unet, golden.optional("y")))

    @cache
    def gradients(loss: str, term: str) -> dict[str, Tensor]:
        unet.zero_grad()
        terms(loss, False)[term].mean().backward(retain_graph=True)
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    def fixed(prediction: str, variance: str, loss: str, term: str) -> Tensor:
        network = folder.unet("sampler_parameterisations")
        diffusion = folder.diffusion(
            stem,
            prediction=PREDICTIONS[prediction],
            variance=variance.lower(),
            loss=LOSSES[loss],
            rescale_timesteps=False,
        )
        kwargs = label_kwargs(network, golden.optional("fixed.y"))
        x_start, noise = golden.tensor("fixed.x_start"), golden.tensor("fixed.noise")
        t = golden.tensor("fixed.t" if "fixed.t" in golden else "t")
        with torch.no_grad():
            return diffusion.losses(network, x_start, t, noise, **kwargs)[term]

    def compute(name: str) -> Any:
        pattern = rf"fixed\.({'|'.join(PREDICTIONS)})\.(FIXED_SMALL|FIXED_LARGE)\.({loss_names})\.(loss|mse|vb)"
        if match := re.fullmatch(pattern, name):
            return fixed(match[1], match[2], match[3], match[4])
        if match := re.fullmatch(rf"(respaced\.)?({loss_names})\.(loss|mse|vb)", name):
            return terms(match[2], match[1] is not None)[match[3]]
        if match := re.fullmatch(rf"({loss_names})\.grad_norm", name):
            return torch.stack([g.double().norm() for g in gradients(match[1], "loss").values()]).norm()
        if match := re.fullmatch(rf"({loss_names})\.grad(?:_of_(vb)_only)?\.(.+)", name):
            return gradients(match[1], match[2] or "loss")[match[3]]
        return None

    return compute


def label_kwargs(network: UNet, y: Tensor | None) -> dict[str, Tensor]:
    """Return the keyword arguments with a network's labels."""
    y = labels(network, y)
    return {} if y is None else {"y": y}


def of_likelihood(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare the decoder's log-likelihood and divergences of Gaussians, elementwise in nats."""

    def compute(name: str) -> Any:
        if name == "dgll.log_probs":
            x, means, log_scales = (golden.tensor(f"dgll.{k}") for k in ("x", "means", "log_scales"))
            return discretized_gaussian_log_likelihood(x, means, log_scales)
        if name in ("kl.out", "kl.out_vs_standard"):
            mean1, logvar1 = golden.tensor("kl.mean1"), golden.tensor("kl.logvar1")
            if name == "kl.out":
                return normal_kl(mean1, logvar1, golden.tensor("kl.mean2"), golden.tensor("kl.logvar2"))
            return normal_kl(mean1, logvar1, torch.zeros(()), torch.zeros(()))
        return None

    return compute


def of_bits_per_dim(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare the terms of the bound, and the progressive coding curve."""
    stem = golden.path.stem
    unet = folder.unet(stem)
    timestep_map = golden.array("timestep_map")
    settings = folder.settings(stem)
    # the file states its chain by the timesteps that it keeps
    stated = [spec for key, spec in settings.items() if key.startswith("respacing")]
    specs = [str(len(timestep_map)), f"ddim{len(timestep_map)}", *stated]
    num_timesteps = settings["num_timesteps"]
    spec = next((s for s in specs if np.array_equal(possible_timesteps(num_timesteps, s), timestep_map)), specs[0])
    diffusion = folder.diffusion(stem, spec)

    @cache
    def arrays(clip: bool) -> dict[str, Tensor]:
        noises, chain = golden.tensor("noise_in_call_order"), diffusion.timestep_map.tolist()[::-1]
        denoise = diffusion.denoiser(unet, labels(unet, golden.optional("y")), clip=clip)
        bits = bits_per_dim(denoise, diffusion, golden.tensor("x_start"), lambda t: noises[chain.index(t)])
        rate, distortion = progressive_coding(bits)
        return {
            "total_bpd": bits.total,
            "prior_bpd": bits.prior,
            "vb": bits.vb,
            "xstart_mse": bits.x_start_mse,
            "mse": bits.mse,
            "progressive.rate_bpd": rate,
            "progressive.rmse_255": distortion,
        }

    @torch.no_grad()
    def compute(name: str) -> Any:
        if name == "timestep_map":
            return diffusion.timestep_map
        match = re.fullmatch(r"clip([01])\.(.+)", name)
        return match and arrays(match[1] == "1").get(match[2])

    return compute


def possible_timesteps(num_timesteps: int, spec: str) -> Any:
    """Return the timesteps that `spec` keeps, or None if it is impossible."""
    try:
        return space_timesteps(num_timesteps, spec)
    except ValueError:
        return None


def of_resampler(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare the loss-aware timestep sampler after each of many updates."""
    num_timesteps = int(golden.array("num_timesteps"))
    sampler = LossSecondMomentTimesteps(
        num_timesteps, int(golden.array("history_per_term")), float(golden.array("uniform_prob"))
    )
    weights = []
    for t, loss in zip(golden.array("ts"), golden.array("losses"), strict=True):
        sampler.update(np.array([t]), np.array([loss]))
        weights.append(sampler.weights())
    probabilities = weights[-1] / weights[-1].sum()
    middles = np.cumsum(probabilities) - probabilities / 2  # uniforms that draw every timestep once
    drawn, importance = sampler.draw(middles)
    values = {
        "weights_after_each_update": np.stack(weights),
        "final_history": sampler.history,
        "final_counts": sampler.counts,
        "importance_weight_per_timestep": importance[np.argsort(drawn)],
    }
    return values.get


def of_training(folder: Folder, golden: GoldenFile) -> Compute:
    """Compare a few steps of AdamW with the published learning rates, and the moving averages."""
    stem = golden.path.stem
    network = folder.unet(stem)
    diffusion = folder.diffusion(stem, loss="rescaled_simple")
    weights = copy.deepcopy(network.state_dict())
    rates = golden.array("ema_rates").tolist()
    first_lr, anneal_steps = float(golden.array("lr")), int(golden.array("lr_anneal_steps"))
    weight_decay = float(golden.array("weight_decay"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=first_lr, weight_decay=weight_decay)
    emas = {rate: {name: p.detach().clone() for name, p in network.named_parameters()} for rate in rates}
    values: dict[str, Any] = {"loss": [], "grad_norm": [], "param_norm": [], "lr_used": []}
    x_start, noise, t = golden.tensor("x_start"), golden.tensor("noise"), golden.tensor("t")
    y = golden.optional("y")
    for step in range(len(x_start)):
        kwargs = label_kwargs(network, None if y is None else y[step])
        loss = diffusion.losses(network, x_start[step], t[step], noise[step], **kwargs)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        values["loss"].append(loss.item())
        values["lr_used"].append(optimizer.param_groups[0]["lr"])
        grads = [p.grad.double().norm() for p in network.parameters() if p.grad is not None]
        values["grad_norm"].append(torch.stack(grads).norm().item())
        values["param_norm"].append(torch.stack([p.double().norm() for p in network.parameters()]).norm().item())
        optimizer.step()
        for rate, ema in emas.items():
            for name, parameter in network.named_parameters():
                ema[name].mul_(rate).add_(parameter.detach(), alpha=1 - rate)
        if anneal_steps:
            optimizer.param_groups[0]["lr"] = first_lr * (1 - step / anneal_steps)
    for name, parameter in network.named_parameters():
        values[f"final.{name}"] = parameter.detach().clone()
        for rate, ema in emas.items():
            values[f"ema{rate}.{name}"] = ema[name]
    for name in values.keys() & golden.arrays.keys():
        if name.startswith(("final.", "ema")):  # Adam turns rounding errors of tiny gradients into full steps
            golden.floors[name] = 2e-4 * sum(values["lr_used"])
    network.load_state_dict(weights)
    return values.get


# Pattern of an array's name -> the kind of a file that has such an array; networks are named in cases.json instead
Kind = Callable[[Folder, GoldenFile], Compute]
KINDS: list[tuple[str, Kind]] = [
    (r"emb_dim\d+_max.*", of_timestep_embedding),
    (r"step\.x", of_sampler_steps),
    (r"x_T", of_sampler_trajectories),
    (r"\w+\.sigmas_in_call_order", of_edm_sampler),
    (rf"({'|'.join(PREDICTIONS)})\.(mean|pred_xstart)", of_parameterisations),
    (r"lr_used", of_training),
    (r"(RESCALED_)?(MSE|KL)\.loss", of_losses),
    (r"(dgll|kl)\..*", of_likelihood),
    (r"noise_in_call_order", of_bits_per_dim),
    (r"weights_after_each_update", of_resampler),
    (r"\w+\.timestep_map", of_respacing),
    (r"[\w.]+\.betas", of_schedules),
]


def compare_arrays(folder: Folder, path: Path) -> list[Row]:
    """Return all rows of one .npz file."""
    golden = GoldenFile(path, folder.cases["tolerances"].get(path.name))
    kind: Kind | None = of_network if path.stem in folder.networks else None
    for pattern, candidate in KINDS:
        if kind is None and any(re.fullmatch(pattern, name) for name in golden.arrays):
            kind = candidate
    if kind is None:
        return golden.compare(lambda name: None)
    try:
        compute = kind(folder, golden)
    except Exception as error:  # noqa: BLE001  # reported as this file's failure
        return [Row(path.name, "*", "FAIL", note=f"{type(error).__name__}: {error}")]
    return golden.compare(compute)


# Files that contain no arrays


def respacing_cases(folder: Folder) -> dict[str, Any]:
    """Return the content of respacing_cases.json, or an empty one if the folder has none."""
    path = folder.path / "respacing_cases.json"
    return json.loads(path.read_text()) if path.is_file() else {"cases": []}


def exact_row(file: str, case: str, value: Any, expected: Any) -> Row:
    """Return a row for two values that must be equal."""
    if value == expected:
        return Row(file, case, "pass", 0.0, 0.0)
    return Row(file, case, "FAIL", note=f"{value!r}, golden {expected!r}"[:200])


def compare_respacing_cases(folder: Folder) -> list[Row]:
    """Compare the lengths of valid chains, and the refusals (ValueError) of invalid ones."""
    file = "respacing_cases.json"
    content = respacing_cases(folder)
    rows = []
    for case in content["cases"]:
        spec, num_timesteps = case["spec"], case["num_timesteps"]
        name = f"{case['id']} {case['schedule']} {num_timesteps} {spec!r}"
        if case["raises"] is None:
            outcome = attempt(case["schedule"], num_timesteps, spec)
            rows.append(exact_row(file, name, outcome, f"{case['num_kept']} steps"))
        else:
            parse = case["stage"] == "parse"
            outcome = attempt(case["schedule"], num_timesteps, spec, parse_only=parse)
            rows.append(exact_row(file, f"{name} is refused", outcome, "refused"))
    for case in content.get("schedule_errors", []):
        outcome = attempt(case["schedule"], case["num_timesteps"], None)
        expected = "refused" if case["raises"] else f"{case['num_timesteps']} steps"
        name = f"schedule {case['schedule']} {case['num_timesteps']} -> {expected}"
        rows.append(exact_row(file, name, outcome, expected))
    return rows


def attempt(schedule: str, num_timesteps: int, spec: Any, parse_only: bool = False) -> str:
    """Return the result of a schedule and a respacing (None = the whole chain): "N steps" or "refused"."""
    try:
        if spec is not None and parse_only:
            return f"{len(space_timesteps(num_timesteps, spec))} steps"
        config = DiffusionConfig.model_validate({"schedule": schedule, "num_timesteps": num_timesteps})
        return f"{Diffusion(config, '' if spec is None else spec).num_timesteps} steps"
    except ValueError:
        return "refused"


def compare_checkpoint(path: Path) -> list[Row]:
    """Compare names and shapes of a published checkpoint with the network that its flags describe."""
    content = json.loads(path.read_text())
    file = f"checkpoints/{path.name}"
    try:
        flags = " ".join(f"--{flag}={value}" for flag, value in content["all_flags"].items())
        published = {name: tuple(shape) for name, shape in content["shapes"].items()}
        config, _ = parse_flags(flags, "guided-diffusion").describe(published)
        with torch.device("meta"):
            network = config.build()
    except Exception as error:  # noqa: BLE001  # reported as this file's failure
        return [Row(file, "*", "FAIL", note=f"{type(error).__name__}: {error}")]
    shapes = shapes_of(network.state_dict())
    names = shapes.keys() | published.keys()
    wrong = {name: (shapes.get(name), published.get(name)) for name in names if shapes.get(name) != published.get(name)}
    return [
        exact_row(file, "names and shapes", wrong, {}),
        exact_row(file, "num_tensors", len(shapes), content["num_tensors"]),
        exact_row(file, "num_parameters", count_parameters(network), content["num_parameters"]),
    ]


def count_parameters(network: torch.nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def compare_weights(folder: Folder, name: str) -> Row:
    """Load a network's weights strictly, and compare its number of parameters."""
    entry = folder.networks[name]
    try:
        return exact_row(
            entry["weights"], "num_parameters", count_parameters(folder.network(name)), entry["num_parameters"]
        )
    except Exception as error:  # noqa: BLE001  # reported as this network's failure
        return Row(entry.get("weights", name), "num_parameters", "FAIL", note=f"{type(error).__name__}: {error}")


def compare(path: Path) -> list[Row]:
    """Return all rows of a folder; unused files are "not covered", and missing files fail."""
    folder = Folder(path)
    rows = [compare_weights(folder, name) for name in folder.networks]
    rows += compare_respacing_cases(folder)
    known_files = {"README.md", "cases.json", "respacing_cases.json", "edm_sampler.json"}
    known_files |= {entry["weights"] for entry in folder.networks.values()}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if file.suffix == ".npz":
            rows += compare_arrays(folder, file)
        elif name.startswith("checkpoints/") and file.suffix == ".json":
            rows += compare_checkpoint(file)
        elif name not in known_files:
            rows.append(Row(name, "*", "not covered"))
    for name in folder.cases["tolerances"]:
        if not (path / name).is_file():
            rows.append(Row(name, "*", "FAIL", note="has tolerances but is not in the folder"))
    return rows
