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

Adm = tuple[str, AdmConfig]
Classifier = tuple[str, NoisyClassifierConfig]
AnyTraining = TypeVar("AnyTraining", AdmConfig, NoisyClassifierConfig)


def adm_presets() -> dict[str, Adm]:
    """Diffusion models to train."""
    lsun: dict[str, Any] = {"batch_size": 256, "learning_rate": 1e-4, "dtype": "float16", "at_once": 16}
    presets = {
        "digits": (DIGITS, _digits_diffusion()),
        "images": (f"{IMAGES}: ADM at 64 pixels, on one GPU", _images_diffusion()),
        "images_cpu": (f"{IMAGES_CPU}: a small ADM", _images_cpu_diffusion()),
        "imagenet64": _published("adm-64", 540_000, 2048, 3e-4, dtype="float16", at_once=64),
        "imagenet64_1024": _for_1024_workers(),
        "imagenet128": _published("adm-128", 4_360_000, 256, 1e-4, dtype="float16"),
        "imagenet256": _published("adm-256", 1_980_000, 256, 1e-4, dtype="float16"),
        "imagenet256_uncond": _published("adm-256-uncond", 1_980_000, 256, 1e-4, dtype="float16"),
        "imagenet512": _published("adm-512", 1_940_000, 256, 1e-4, at_once=8),
        "lsun_bedroom": _published("lsun-bedroom", 500_000, dataset="lsun_bedroom", **lsun),
        "lsun_cat": _published("lsun-cat", 200_000, dataset="lsun_cat", **lsun),
        "lsun_horse": _published("lsun-horse", 250_000, dataset="lsun_horse", **lsun),
        "iddpm_imagenet64": _iddpm("iddpm-imagenet64", 1_500_000, 128, 1e-4),
        "iddpm_imagenet64_vlb": _iddpm("iddpm-imagenet64-vlb", 1_500_000, 128, 1e-4),
        "iddpm_imagenet64_cond": _iddpm("iddpm-imagenet64-cond", 250_000, 2048, 3e-4, at_once=64),
        "iddpm_cifar10": _iddpm("iddpm-cifar10", 500_000, 128, 1e-4, dataset="cifar10", num_workers=1),
        "iddpm_cifar10_vlb": _iddpm("iddpm-cifar10-vlb", 500_000, 128, 1e-4, dataset="cifar10", num_workers=1),
        "iddpm_lsun_bedroom": _iddpm("iddpm-lsun-bedroom", 1_200_000, 128, 1e-4, dataset="lsun_bedroom"),
        "ddpm_cifar10": _ddpm_cifar10(),
    }
    return {name: (about, _in_folder(config, name, "diffusion")) for name, (about, config) in presets.items()}


def classifier_presets() -> dict[str, Classifier]:
    """Return the noisy classifiers to train."""
    presets = {
        "digits": (DIGITS, _digits_classifier()),
        "images": (f"{IMAGES}: ADM's classifier at 64 pixels, on one GPU", _images_classifier()),
        "images_cpu": (f"{IMAGES_CPU}: a small classifier", _images_cpu_classifier()),
        "imagenet64": _published_classifier("classifier-64", 300_000, 1024, 6e-4, weight_decay=0.2),
        "imagenet128": _published_classifier("classifier-128", 300_000, 256, 3e-4),
        "imagenet256": _published_classifier("classifier-256", 500_000, 256, 3e-4),
        "imagenet512": _published_classifier("classifier-512", 500_000, 256, 3e-4, at_once=16),
    }
    return {name: (about, _in_folder(config, name, "classifier")) for name, (about, config) in presets.items()}


def upsampler_presets() -> dict[str, Adm]:
    """Return the upsamplers to train: the second stages of a cascade."""
    presets = {
        "digits": (f"{DIGITS}: from 8 to 16 pixels", _digits_upsampler()),
        "images": (f"{IMAGES}: from 64 to 256 pixels, on one GPU", _images_upsampler()),
        "imagenet64_256": _published("upsampler-64-256", 500_000, 256, 1e-4, dtype="float16", at_once=16),
        "imagenet128_512": _published("upsampler-128-512", 1_050_000, 256, 1e-4, dtype="float16", at_once=8),
        "iddpm_imagenet64_256": _iddpm("iddpm-upsampler-64-256", 500_000, 256, 3e-4, at_once=16),
    }
    return {name: (about, _in_folder(config, name, "upsampler")) for name, (about, config) in presets.items()}


def _in_folder(config: AnyTraining, preset: str, kind: str) -> AnyTraining:
    """Return the config with the output PRESET/KIND, where the same preset of the other jobs looks for it."""
    return config.model_copy(update={"output": f"{preset}/{kind}"})


def trained_networks() -> dict[str, tuple[Architecture, DiffusionConfig]]:
    """Return the network and the diffusion process of each preset by its output."""
    configs = [found for presets in (adm_presets(), classifier_presets(), upsampler_presets())
               for _, found in presets.values()]  # fmt: skip
    return {config.output: (config.model, config.diffusion) for config in configs}


def average_presets() -> dict[str, tuple[str, AverageConfig]]:
    """Post-hoc averages of weights."""
    return {
        "digits": (DIGITS, AverageConfig(weights="digits/diffusion")),
        "images": (IMAGES, AverageConfig(weights="images/diffusion")),
    }


def _published(
    name: str,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    dataset: str = "imagenet",
    at_once: int | None = None,
    **changes: Any,
) -> Adm:
    """Return the published training of a model of the zoo: AdamW without weight decay, EMA 0.9999, random flips.

    at_once: the microbatch size. Without a `dtype` the model was trained in float32, and the preset uses bfloat16.
    """
    entry = zoo.entry(name)
    settings: dict[str, Any] = {
        "dataset": f"datasets/{dataset}",
        "output": name,
        "model": entry.network,
        "diffusion": entry.diffusion,
        "order": _published_order(entry.network.image_size),
        "total_images": iterations * batch_size,
        "batch_size": batch_size,
        "microbatch_size": at_once,
        "learning_rate": learning_rate,
        "ema_rates": (0.9999,),
        "dtype": "bfloat16",
        "compile": True,
        "num_workers": 8,
        "num_gpus": 1,
    }
    return _summary(name, iterations, batch_size, "dtype" not in changes), AdmConfig(**settings | changes)


def _for_1024_workers() -> Adm:
    """Return the training of `imagenet64` with the largest number of streams, for large clusters.

    The order of the images depends on the number of streams, so it differs from that of `imagenet64`. A worker holds at
    most as many open images as there.
    """
    order = OrderConfig(num_streams=1024, shuffle_row_groups=8)
    about, config = _published("adm-64", 540_000, 2048, 3e-4, dtype="float16", at_once=8, num_workers=256, order=order)
    return f"{about}; for up to 1,024 workers", config


def _iddpm(name: str, iterations: int, batch_size: int, learning_rate: float, **changes: Any) -> Adm:
    """Return a training of IDDPM: no flips; models that are trained on the bound sample timesteps by their losses."""
    timesteps = "loss_second_moment" if name.endswith("-vlb") else "uniform"
    return _published(name, iterations, batch_size, learning_rate, random_flip=False, timesteps=timesteps, **changes)


def _ddpm_cifar10() -> Adm:
    """Return DDPM on CIFAR-10: 800K steps of 128, learning rate 2e-4 after 5,000 warm-up steps, gradient norm 1."""
    changes: dict[str, Any] = {
        "dataset": "cifar10",
        "warmup_images": 5_000 * 128,
        "max_grad_norm": 1.0,
    }
    return _published("ddpm-cifar10", 800_000, 128, 2e-4, num_workers=1, **changes)


def _published_classifier(
    name: str,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    at_once: int | None = None,
) -> Classifier:
    """Return the published training of a noisy classifier: random crops, a learning rate that falls to zero."""
    entry = zoo.entry(name)
    config = NoisyClassifierConfig(
        dataset="datasets/imagenet",
        output=name,
        model=entry.network,
        diffusion=entry.diffusion,
        order=_published_order(entry.network.image_size),
        total_images=iterations * batch_size,
        batch_size=batch_size,
        microbatch_size=at_once,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lr_schedule="linear",
        eval_every=1_000_000,
        eval_images=5_000,
        dtype="bfloat16",
        compile=True,
        num_workers=8,
        num_gpus=1,
    )
    return _summary(name, iterations, batch_size, True), config


def _published_order(image_size: int) -> OrderConfig:
    """Return an order for up to 64 workers; each of 8 workers then holds 1.5 GiB of images at 256 pixels, 3 at 512."""
    return OrderConfig(num_streams=64, shuffle_row_groups=8 if image_size <= 256 else 4)


def _summary(name: str, iterations: int, batch_size: int, was_float32: bool) -> str:
    but = ", but in bfloat16 instead of float32" if was_float32 else ""
    return f"the zoo's {name} as published: {iterations:,} steps of {batch_size}{but}"


# ------------------------------------------------------------------------------------------------ your own images


def _images_diffusion() -> AdmConfig:
    """Return ADM at 64 pixels with two thirds of its width, classes of the dataset, and averages for post-hoc EMA."""
    return AdmConfig(
        dataset="datasets/images",
        output="images/diffusion",
        model=zoo.entry("adm-64").network.model_copy(update={"model_channels": 128}),
        diffusion=zoo.COSINE,
        classes="dataset",
        order=OrderConfig(num_streams=8),
        total_images=5_000_000,
        batch_size=128,
        dtype="bfloat16",
        compile=True,
        learning_rate=2e-4,
        warmup_images=128_000,
        max_grad_norm=1.0,
        ema_rates=(0.999, 0.9999),
        power_emas=(0.05, 0.10),
        snapshot_every=250_000,
        checkpoint_every=100_000,
        eval_every=250_000,
        preview_every=250_000,
        num_gpus=1,
    )


def _images_classifier() -> NoisyClassifierConfig:
    """Return ADM's classifier at 64 pixels with dropout, and with validation because small datasets overfit soon."""
    return NoisyClassifierConfig(
        dataset="datasets/images",
        output="images/classifier",
        model=zoo.entry("classifier-64").network.model_copy(update={"num_res_blocks": 2, "dropout": 0.1}),
        diffusion=zoo.COSINE,
        classes="dataset",
        order=OrderConfig(num_streams=8),
        total_images=2_000_000,
        batch_size=128,
        dtype="bfloat16",
        compile=True,
        learning_rate=3e-4,
        lr_schedule="linear",
        checkpoint_every=100_000,
        eval_every=100_000,
        num_gpus=1,
    )


def _images_upsampler() -> AdmConfig:
    """Return ADM's upsampler with two thirds of its width."""
    diffusion = _images_diffusion()
    network = zoo.entry("upsampler-64-256").network
    changes = {
        "output": "images/upsampler",
        "model": network.model_copy(update={"model_channels": 128}),
        "diffusion": zoo.entry("upsampler-64-256").diffusion,
        "order": OrderConfig(num_streams=8),
        "total_images": 2_000_000,
        "batch_size": 64,
        "microbatch_size": 8,
        "learning_rate": 1e-4,
        "power_emas": (),
        "snapshot_every": None,
    }
    return diffusion.model_copy(update=changes)


_SMALL = {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2, 2),
          "attention_resolutions": (8, 4), "num_head_channels": 16}  # fmt: skip
_SMALL_TRAINING = {"order": OrderConfig(), "batch_size": 64, "learning_rate": 1e-3, "dtype": "float32",
                   "compile": False, **TWO_CORES}  # fmt: skip


def _images_cpu_diffusion() -> AdmConfig:
    """Return a small ADM at 16 pixels, which takes half an hour on two cores.

    It predicts x_0: after so few images a network that predicts the noise does not have the colours yet.
    """
    diffusion = _images_diffusion()
    changes = {
        "diffusion": diffusion.diffusion.model_copy(update={"prediction": "x_start"}),
        "model": diffusion.model.model_copy(update=_SMALL),
        **_SMALL_TRAINING,
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
    }
    return diffusion.model_copy(update=changes)


def _images_cpu_classifier() -> NoisyClassifierConfig:
    """Return a small classifier at 16 pixels, which takes a few minutes on two cores."""
    classifier = _images_classifier()
    changes = {
        "model": classifier.model.model_copy(update=_SMALL),
        **_SMALL_TRAINING,
        "total_images": 32_000,
        "checkpoint_every": 16_000,
        "eval_every": 6_400,
        "log_every": 1_600,
    }
    return classifier.model_copy(update=changes)


# ------------------------------------------------------------------------------------------------ the quickstart's


def _digits_diffusion() -> AdmConfig:
    """Return a small ADM at 8x8 pixels, which draws digits after two minutes on two cores."""
    return AdmConfig(
        dataset="datasets/digits",
        output="digits/diffusion",
        model=UNetConfig(
            image_size=8,
            in_channels=1,  # scans are grey
            out_channels=2,
            model_channels=32,
            num_res_blocks=1,
            channel_mult=(1, 2),
            attention_resolutions=(4,),
            num_head_channels=16,
            num_classes=10,
        ),
        diffusion=zoo.COSINE,
        random_flip=False,  # mirrored digits are not digits
        total_images=89_600,
        batch_size=64,
        learning_rate=2e-3,
        warmup_images=3_200,
        lr_schedule="linear",
        max_grad_norm=1.0,
        ema_rates=(0.995,),
        power_emas=(0.05, 0.1),
        snapshot_every=5_600,
        checkpoint_every=32_000,
        log_every=1_600,
        preview_every=32_000,
        preview=SamplerConfig(name="ddpm", num_steps=25),
        num_workers=2,
    )


def _digits_classifier() -> NoisyClassifierConfig:
    return NoisyClassifierConfig(
        dataset="datasets/digits",
        output="digits/classifier",
        model=ClassifierConfig(
            image_size=8,
            in_channels=1,
            model_channels=32,
            num_res_blocks=1,
            channel_mult=(1, 2),
            attention_resolutions=(4,),
            num_head_channels=16,
            num_classes=10,
        ),
        diffusion=zoo.COSINE,
        crop="center",  # the digits fill their scans: a random crop would cut them
        random_flip=False,
        total_images=32_000,
        batch_size=64,
        learning_rate=1e-3,
        lr_schedule="linear",
        checkpoint_every=16_000,
        eval_every=6_400,
        log_every=1_600,
        num_workers=2,
    )


def _digits_upsampler() -> AdmConfig:
    """Return an upsampler from 8 to 16 pixels."""
    digits = _digits_diffusion()
    model = digits.model.model_copy(update={"image_size": 16, "low_res_size": 8, "attention_resolutions": (8,)})
    changes = {
        "output": "digits/upsampler",
        "model": model,
        "total_images": 38_400,
        "learning_rate": 1e-3,
        "ema_rates": (0.98,),  # a longer average would still contain the initial weights
        "power_emas": (),
        "snapshot_every": None,
        "diffusion": zoo.LINEAR,
    }
    return digits.model_copy(update=changes)
