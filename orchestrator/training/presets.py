"""Presets of trainings: published models with their published hyper-parameters, the quickstart, and your own images.

Sources: ADM is Dhariwal & Nichol 2021 (arXiv 2105.05233), the appendix's tables and the flags in its code's README;
IDDPM is Nichol & Dhariwal 2021 (arXiv 2102.09672), README; DDPM is Ho et al. 2020 (arXiv 2006.11239), appendix B.
Architectures are those of the zoo. Not published are `microbatch_size`, an estimate for GPUs with 80 GB; `compile`;
and bfloat16 where float32 was published: it is two to four times as fast on tensor cores, and weights, sums and
normalisation stay in float32. --dtype float32 gives the published precision.
"""

from typing import Any, TypeVar

from models import zoo
from models.diffusion import DiffusionConfig
from models.samplers import SamplerConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig
from orchestrator.config import DIGITS, IMAGES, IMAGES_CPU, TWO_CORES
from orchestrator.order import OrderConfig
from orchestrator.training.config import AdmConfig, AverageConfig, NoisyClassifierConfig

Settings = dict[str, Any]  # values by field of a config, without `output`
AnyTraining = TypeVar("AnyTraining", AdmConfig, NoisyClassifierConfig)


def adm_presets() -> dict[str, tuple[str, AdmConfig]]:
    """Return the diffusion models to train."""
    lsun: Settings = {"dtype": "float16", "microbatch_size": 16}
    many_workers = {"order": OrderConfig(num_streams=1024, shuffle_row_groups=8), "num_workers": 256}
    presets = {
        "digits": (DIGITS, _digits_diffusion()),
        "images": (f"{IMAGES}: ADM at 64 pixels, on one GPU", _images_diffusion()),
        "images_cpu": (f"{IMAGES_CPU}: a small ADM", _images_cpu_diffusion()),
        "imagenet64": _published("adm-64", 540_000, 2048, 3e-4, dtype="float16", microbatch_size=64),
        "imagenet64_1024": _published(
            "adm-64", 540_000, 2048, 3e-4, "; for up to 1,024 workers",
            dtype="float16", microbatch_size=8, **many_workers,
        ),
        "imagenet128": _published("adm-128", 4_360_000, 256, 1e-4, dtype="float16"),
        "imagenet256": _published("adm-256", 1_980_000, 256, 1e-4, dtype="float16"),
        "imagenet256_uncond": _published("adm-256-uncond", 1_980_000, 256, 1e-4, dtype="float16"),
        "imagenet512": _published("adm-512", 1_940_000, 256, 1e-4, microbatch_size=8),
        "lsun_bedroom": _published("lsun-bedroom", 500_000, 256, 1e-4, dataset="datasets/lsun_bedroom", **lsun),
        "lsun_cat": _published("lsun-cat", 200_000, 256, 1e-4, dataset="datasets/lsun_cat", **lsun),
        "lsun_horse": _published("lsun-horse", 250_000, 256, 1e-4, dataset="datasets/lsun_horse", **lsun),
        "iddpm_imagenet64": _iddpm("iddpm-imagenet64", 1_500_000, 128, 1e-4),
        "iddpm_imagenet64_vlb": _iddpm("iddpm-imagenet64-vlb", 1_500_000, 128, 1e-4),
        "iddpm_imagenet64_cond": _iddpm("iddpm-imagenet64-cond", 250_000, 2048, 3e-4, microbatch_size=64),
        "iddpm_cifar10": _iddpm("iddpm-cifar10", 500_000, 128, 1e-4, **_CIFAR10),
        "iddpm_cifar10_vlb": _iddpm("iddpm-cifar10-vlb", 500_000, 128, 1e-4, **_CIFAR10),
        "iddpm_lsun_bedroom": _iddpm("iddpm-lsun-bedroom", 1_200_000, 128, 1e-4, dataset="datasets/lsun_bedroom"),
        "ddpm_cifar10": _published(
            "ddpm-cifar10", 800_000, 128, 2e-4, warmup_images=5_000 * 128, max_grad_norm=1.0, **_CIFAR10
        ),
    }  # fmt: skip
    return _configs(AdmConfig, "diffusion", presets)


def classifier_presets() -> dict[str, tuple[str, NoisyClassifierConfig]]:
    """Return the noisy classifiers to train."""
    presets = {
        "digits": (DIGITS, _digits_classifier()),
        "images": (f"{IMAGES}: ADM's classifier at 64 pixels, on one GPU", _images_classifier()),
        "images_cpu": (f"{IMAGES_CPU}: a small classifier", _images_cpu_classifier()),
        "imagenet64": _published_classifier("classifier-64", 300_000, 1024, 6e-4, weight_decay=0.2),
        "imagenet128": _published_classifier("classifier-128", 300_000, 256, 3e-4),
        "imagenet256": _published_classifier("classifier-256", 500_000, 256, 3e-4),
        "imagenet512": _published_classifier("classifier-512", 500_000, 256, 3e-4, microbatch_size=16),
    }
    return _configs(NoisyClassifierConfig, "classifier", presets)


def upsampler_presets() -> dict[str, tuple[str, AdmConfig]]:
    """Return the upsamplers to train: the second stages of a cascade."""
    presets = {
        "digits": (f"{DIGITS}: from 8 to 16 pixels", _digits_upsampler()),
        "images": (f"{IMAGES}: from 64 to 256 pixels, on one GPU", _images_upsampler()),
        "imagenet64_256": _published("upsampler-64-256", 500_000, 256, 1e-4, dtype="float16", microbatch_size=16),
        "imagenet128_512": _published("upsampler-128-512", 1_050_000, 256, 1e-4, dtype="float16", microbatch_size=8),
        "iddpm_imagenet64_256": _iddpm("iddpm-upsampler-64-256", 500_000, 256, 3e-4, microbatch_size=16),
    }
    return _configs(AdmConfig, "upsampler", presets)


def _configs(
    make: type[AnyTraining], kind: str, presets: dict[str, tuple[str, Settings]]
) -> dict[str, tuple[str, AnyTraining]]:
    """Return the configs with the output PRESET/KIND, from which the other jobs' presets of this name read it."""
    return {name: (about, make(output=f"{name}/{kind}", **settings)) for name, (about, settings) in presets.items()}


def trained_networks() -> dict[str, tuple[Architecture, DiffusionConfig]]:
    """Return the network and the diffusion process of each preset by its output."""
    jobs = (adm_presets(), classifier_presets(), upsampler_presets())
    configs = [config for presets in jobs for _, config in presets.values()]
    return {config.output: (config.model, config.diffusion) for config in configs}


def average_presets() -> dict[str, tuple[str, AverageConfig]]:
    """Return the post-hoc averages of weights to compute."""
    return {
        "digits": (DIGITS, AverageConfig(weights="digits/diffusion")),
        "images": (IMAGES, AverageConfig(weights="images/diffusion")),
    }


# ------------------------------------------------------------------------------------------------ published


_CIFAR10: Settings = {"dataset": "datasets/cifar10", "num_workers": 1}


def _published(
    name: str, iterations: int, batch_size: int, learning_rate: float, remark: str = "", **changes: Any
) -> tuple[str, Settings]:
    """Return the published training of a model of the zoo: AdamW without weight decay, EMA 0.9999, random flips.

    remark: is appended to the description.
    changes: fields that differ. Without `dtype`, the model was trained in float32, and the preset uses bfloat16.

    The order allows up to 64 workers. Each of 8 workers holds 1.5 GiB of images at 256 pixels, and 3 GiB at 512.
    """
    entry = zoo.entry(name)
    settings = {
        "dataset": "datasets/imagenet",
        "model": entry.network,
        "diffusion": entry.diffusion,
        "order": OrderConfig(num_streams=64, shuffle_row_groups=8 if entry.network.image_size <= 256 else 4),
        "total_images": iterations * batch_size,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dtype": "bfloat16",
        "compile": True,
        "num_workers": 8,
        "num_gpus": 1,
    }
    precision = "" if "dtype" in changes else ", but in bfloat16 instead of float32"
    about = f"the zoo's {name} as published: {iterations:,} steps of {batch_size}{precision}{remark}"
    return about, settings | changes


def _iddpm(name: str, *published: Any, **changes: Any) -> tuple[str, Settings]:
    """Return a published training of IDDPM: no flips; importance sampling of timesteps for the variational bound."""
    timesteps = "loss_second_moment" if name.endswith("-vlb") else "uniform"
    return _published(name, *published, random_flip=False, timesteps=timesteps, **changes)


def _published_classifier(name: str, *published: Any, **changes: Any) -> tuple[str, Settings]:
    """Return the published training of a noisy classifier, whose learning rate falls to zero."""
    return _published(name, *published, lr_schedule="linear", eval_every=1_000_000, eval_images=5_000, **changes)


# ------------------------------------------------------------------------------------------------ your own images


_IMAGES: Settings = {
    "dataset": "datasets/images",
    "diffusion": zoo.COSINE,
    "classes": "dataset",
    "order": OrderConfig(num_streams=8),
    "batch_size": 128,
    "dtype": "bfloat16",
    "compile": True,
    "checkpoint_every": 100_000,
    "num_gpus": 1,
}
_SMALL_NETWORK = {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2, 2),
                  "attention_resolutions": (8, 4), "num_head_channels": 16}  # fmt: skip
_SMALL_TRAINING: Settings = {"order": OrderConfig(), "batch_size": 64, "learning_rate": 1e-3, "dtype": "float32",
                             "compile": False, **TWO_CORES}  # fmt: skip


def _images_diffusion() -> Settings:
    """Return a training of ADM at 64 pixels with two thirds of its width, and with averages for post-hoc EMA."""
    return _IMAGES | {
        "model": zoo.entry("adm-64").network.model_copy(update={"model_channels": 128}),
        "total_images": 5_000_000,
        "learning_rate": 2e-4,
        "warmup_images": 128_000,
        "max_grad_norm": 1.0,
        "ema_rates": (0.999, 0.9999),
        "power_emas": (0.05, 0.10),
        "snapshot_every": 250_000,
        "eval_every": 250_000,
        "preview_every": 250_000,
    }


def _images_classifier() -> Settings:
    """Return a training of ADM's classifier at 64 pixels, with dropout and validation, since small data overfit."""
    return _IMAGES | {
        "model": zoo.entry("classifier-64").network.model_copy(update={"num_res_blocks": 2, "dropout": 0.1}),
        "total_images": 2_000_000,
        "learning_rate": 3e-4,
        "lr_schedule": "linear",
        "eval_every": 100_000,
    }


def _images_upsampler() -> Settings:
    """Return a training of ADM's upsampler with two thirds of its width."""
    entry = zoo.entry("upsampler-64-256")
    return _images_diffusion() | {
        "model": entry.network.model_copy(update={"model_channels": 128}),
        "diffusion": entry.diffusion,
        "total_images": 2_000_000,
        "batch_size": 64,
        "microbatch_size": 8,
        "learning_rate": 1e-4,
        "power_emas": (),
        "snapshot_every": None,
    }


def _images_cpu_diffusion() -> Settings:
    """Return a training of a small ADM at 16 pixels, which takes a quarter of an hour on two idle cores.

    It predicts x_0, because a network that predicts the noise does not reproduce colours after so few images.
    """
    images = _images_diffusion()
    return images | _SMALL_TRAINING | {
        "model": images["model"].model_copy(update=_SMALL_NETWORK),
        "diffusion": images["diffusion"].model_copy(update={"prediction": "x_start"}),
        "total_images": 160_000,
        "lr_schedule": "linear",
        "warmup_images": 6_400,
        "ema_rates": (0.99,),
        "power_emas": (),
        "snapshot_every": None,
        "checkpoint_every": 32_000,
        "eval_every": 32_000,
        "preview_every": 32_000,
        "log_every": 3_200,
    }  # fmt: skip


def _images_cpu_classifier() -> Settings:
    """Return a training of a small classifier at 16 pixels, which takes a few minutes on two cores."""
    images = _images_classifier()
    return images | _SMALL_TRAINING | {
        "model": images["model"].model_copy(update=_SMALL_NETWORK),
        "total_images": 32_000,
        "checkpoint_every": 16_000,
        "eval_every": 6_400,
        "log_every": 1_600,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the quickstart's


_DIGITS_NETWORK: Settings = {
    "image_size": 8,
    "in_channels": 1,  # scans are grey
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (4,),
    "num_head_channels": 16,
    "num_classes": 10,
}
_DIGITS: Settings = {
    "dataset": "datasets/digits",
    "diffusion": zoo.COSINE,
    "random_flip": False,  # mirrored digits are not digits
    "batch_size": 64,
    "lr_schedule": "linear",
    "log_every": 1_600,
    "num_workers": 2,
}


def _digits_diffusion() -> Settings:
    """Return a training of a small ADM at 8x8 pixels, which takes two minutes on two cores."""
    return _DIGITS | {
        "model": UNetConfig(out_channels=2, **_DIGITS_NETWORK),
        "total_images": 89_600,
        "learning_rate": 2e-3,
        "warmup_images": 3_200,
        "max_grad_norm": 1.0,
        "ema_rates": (0.995,),
        "power_emas": (0.05, 0.1),
        "snapshot_every": 5_600,
        "checkpoint_every": 32_000,
        "preview_every": 32_000,
        "preview": SamplerConfig(name="ddpm", num_steps=25),
    }


def _digits_classifier() -> Settings:
    """Return a training of a small classifier at 8x8 pixels."""
    return _DIGITS | {
        "model": ClassifierConfig(**_DIGITS_NETWORK),
        "crop": "center",  # the digits fill their scans: a random crop would cut them
        "total_images": 32_000,
        "learning_rate": 1e-3,
        "checkpoint_every": 16_000,
        "eval_every": 6_400,
    }


def _digits_upsampler() -> Settings:
    """Return a training of an upsampler from 8 to 16 pixels."""
    digits = _digits_diffusion()
    larger = {"image_size": 16, "low_res_size": 8, "attention_resolutions": (8,)}
    return digits | {
        "model": digits["model"].model_copy(update=larger),
        "diffusion": zoo.LINEAR,
        "total_images": 38_400,
        "learning_rate": 1e-3,
        "ema_rates": (0.98,),  # a longer average would still contain the initial weights
        "power_emas": (),
        "snapshot_every": None,
    }
