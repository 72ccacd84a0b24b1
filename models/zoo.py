"""The released models: architecture, diffusion process and recommended sampling.

Sources: ADM is Dhariwal & Nichol 2021 (arXiv 2105.05233), whose README of July 2021 states the flags of every
checkpoint. IDDPM is Nichol & Dhariwal 2021 (arXiv 2102.09672), README of March 2021. DDPM is Ho et al. 2020 (arXiv
2006.11239); only its architecture is here. docs/reproducing.md has the published scores.
"""

import difflib
from dataclasses import dataclass, replace
from functools import partial

from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig


@dataclass(frozen=True)
class Recipe:
    """A recommended way to sample."""

    sampler: SamplerConfig
    guidance: GuidanceConfig
    classifier: str | None  # a name in the zoo; None = unguided


@dataclass(frozen=True)
class Entry:
    """A released model."""

    checkpoint: str | None  # file name of the released weights; None = no weights were released
    network: Architecture
    diffusion: DiffusionConfig  # for a classifier, the process whose noise it was trained on
    recipe: Recipe | None = None


def _ddpm(num_steps: int, scale: float = 0.0, classifier: str | None = None) -> Recipe:
    return Recipe(SamplerConfig(name="ddpm", num_steps=num_steps), GuidanceConfig(scale=scale), classifier)


LINEAR = DiffusionConfig(schedule="linear")
COSINE = DiffusionConfig(schedule="cosine")
MULT_64 = (1, 2, 3, 4)
MULT_128 = (1, 1, 2, 3, 4)
MULT_256 = (1, 1, 2, 2, 4, 4)
MULT_512 = (0.5, 1, 1, 2, 2, 4, 4)

_UNET = partial(UNetConfig, num_res_blocks=2, num_classes=1000)
_UNET_256 = _UNET(image_size=256, model_channels=256, channel_mult=MULT_256, num_head_channels=64, num_classes=None)
_LSUN = _UNET_256.model_copy(update={"dropout": 0.1})
_CLASSIFIER = partial(ClassifierConfig, model_channels=128, num_res_blocks=2, num_head_channels=64)

_ADM: dict[str, Entry] = {
    "adm-64": Entry(
        "64x64_diffusion.pt",
        _UNET(
            image_size=64,
            model_channels=192,
            num_res_blocks=3,
            channel_mult=MULT_64,
            num_head_channels=64,
            use_new_attention_order=True,
            dropout=0.1,
        ),
        COSINE,
        _ddpm(250, 1.0, "classifier-64"),
    ),
    "adm-128": Entry(
        "128x128_diffusion.pt",
        _UNET(image_size=128, model_channels=256, channel_mult=MULT_128, num_heads=4),
        LINEAR,
        _ddpm(250, 0.5, "classifier-128"),
    ),
    "adm-256": Entry(
        "256x256_diffusion.pt",
        _UNET_256.model_copy(update={"num_classes": 1000}),
        LINEAR,
        _ddpm(250, 1.0, "classifier-256"),
    ),
    "adm-256-uncond": Entry("256x256_diffusion_uncond.pt", _UNET_256, LINEAR, _ddpm(250, 10.0, "classifier-256")),
    "adm-512": Entry(
        "512x512_diffusion.pt",
        _UNET(image_size=512, model_channels=256, channel_mult=MULT_512, num_head_channels=64),
        LINEAR,
        _ddpm(250, 4.0, "classifier-512"),
    ),
    "upsampler-64-256": Entry(
        "64_256_upsampler.pt",
        _UNET(image_size=256, low_res_size=64, model_channels=192, channel_mult=MULT_256, num_heads=4),
        LINEAR,
        _ddpm(250),
    ),
    "upsampler-128-512": Entry(
        "128_512_upsampler.pt",
        _UNET(
            image_size=512,
            low_res_size=128,
            model_channels=192,
            channel_mult=MULT_256,
            attention_resolutions=(32, 16),
            num_head_channels=64,
        ),
        LINEAR,
        _ddpm(250),
    ),
    "lsun-bedroom": Entry("lsun_bedroom.pt", _LSUN, LINEAR, _ddpm(1000)),
    "lsun-cat": Entry("lsun_cat.pt", _LSUN, LINEAR, _ddpm(1000)),
    "lsun-horse": Entry("lsun_horse.pt", _LSUN, LINEAR, _ddpm(1000)),
    "lsun-horse-nodropout": Entry("lsun_horse_nodropout.pt", _UNET_256, LINEAR, _ddpm(1000)),
    "classifier-64": Entry(
        "64x64_classifier.pt", _CLASSIFIER(image_size=64, channel_mult=MULT_64, num_res_blocks=4), COSINE
    ),
    "classifier-128": Entry("128x128_classifier.pt", _CLASSIFIER(image_size=128, channel_mult=MULT_128), LINEAR),
    "classifier-256": Entry("256x256_classifier.pt", _CLASSIFIER(image_size=256, channel_mult=MULT_256), LINEAR),
    "classifier-512": Entry("512x512_classifier.pt", _CLASSIFIER(image_size=512, channel_mult=MULT_512), LINEAR),
}

# IDDPM: an earlier version of the code, without BigGAN residual blocks, and with 4-head attention at 16 and 8 pixels

_IDDPM_HYBRID = DiffusionConfig(schedule="cosine", num_timesteps=4000, loss="rescaled_simple", rescale_timesteps=True)
_IDDPM_VLB = _IDDPM_HYBRID.model_copy(update={"loss": "rescaled_kl"})
_IDDPM_64 = UNetConfig(
    image_size=64,
    model_channels=128,
    num_res_blocks=3,
    channel_mult=MULT_64,
    attention_resolutions=(16, 8),
    resblock_updown=False,
)
_IDDPM_CIFAR10 = _IDDPM_64.model_copy(update={"image_size": 32, "channel_mult": (1, 2, 2, 2), "dropout": 0.3})
_IDDPM_LSUN = UNetConfig(
    image_size=256,
    model_channels=128,
    num_res_blocks=2,
    channel_mult=MULT_256,
    attention_resolutions=(16,),
    num_heads=1,
    use_scale_shift_norm=False,
    resblock_updown=False,
)

_IDDPM: dict[str, Entry] = {
    "iddpm-imagenet64": Entry("imagenet64_uncond_100M_1500K.pt", _IDDPM_64, _IDDPM_HYBRID),
    "iddpm-imagenet64-vlb": Entry("imagenet64_uncond_vlb_100M_1500K.pt", _IDDPM_64, _IDDPM_VLB),
    "iddpm-imagenet64-cond": Entry(
        "imagenet64_cond_270M_250K.pt",
        _IDDPM_64.model_copy(update={"model_channels": 192, "num_classes": 1000}),
        DiffusionConfig(schedule="cosine", num_timesteps=4000),
    ),
    "iddpm-upsampler-64-256": Entry(
        "upsample_cond_500K.pt",
        UNetConfig(
            image_size=256,
            low_res_size=64,
            model_channels=192,
            num_res_blocks=2,
            channel_mult=MULT_256,
            attention_resolutions=(16, 8),
            num_classes=1000,
            resblock_updown=False,
        ),
        DiffusionConfig(schedule="linear", num_timesteps=4000),
    ),
    "iddpm-cifar10": Entry("cifar10_uncond_50M_500K.pt", _IDDPM_CIFAR10, _IDDPM_HYBRID),
    "iddpm-cifar10-vlb": Entry("cifar10_uncond_vlb_50M_500K.pt", _IDDPM_CIFAR10, _IDDPM_VLB),
    "iddpm-lsun-bedroom": Entry("lsun_uncond_100M_1200K_bs128.pt", _IDDPM_LSUN, LINEAR),
    "iddpm-lsun-bedroom-lr2e-5": Entry("lsun_uncond_100M_2400K_bs64.pt", _IDDPM_LSUN, LINEAR),
}

# DDPM: single-head attention at 16 pixels, additive embeddings, and a fixed variance

_DDPM_CIFAR10 = UNetConfig(
    image_size=32,
    model_channels=128,
    num_res_blocks=2,
    channel_mult=(1, 2, 2, 2),
    attention_resolutions=(16,),
    num_heads=1,
    out_channels=3,
    use_scale_shift_norm=False,
    resblock_updown=False,
    dropout=0.1,
)

_DDPM: dict[str, Entry] = {
    "ddpm-cifar10": Entry(
        None,
        _DDPM_CIFAR10,
        DiffusionConfig(schedule="linear", variance="fixed_large"),
        _ddpm(1000),
    ),
    "ddpm-256": Entry(
        None,
        _DDPM_CIFAR10.model_copy(update={"image_size": 256, "channel_mult": MULT_256, "dropout": 0.0}),
        DiffusionConfig(schedule="linear", variance="fixed_small"),
        _ddpm(1000),
    ),
}

ZOO: dict[str, Entry] = {**_ADM, **_IDDPM, **_DDPM}

# The same weights with the sampler of Karras et al. (arXiv 2206.00364, table 2 and appendix E), which evaluates the
# network 511 times for each image.
ZOO["adm-64-edm"] = replace(
    ZOO["adm-64"],
    recipe=Recipe(
        SamplerConfig(name="edm", num_steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
        GuidanceConfig(),
        classifier=None,
    ),
)


def entry(name: str) -> Entry:
    """Return the entry of a model; ValueError if there is no such model."""
    if name not in ZOO:
        closest = difflib.get_close_matches(name, ZOO, 1)
        advice = f"did you mean {closest[0]}?" if closest else f"the models are {', '.join(ZOO)}"
        raise ValueError(f"there is no released model {name!r}; {advice}")
    return ZOO[name]
