"""The released models: architecture, diffusion process, recommended sampling and published scores.

`ZOO` maps names to entries. Sources: ADM is Dhariwal & Nichol 2021 (arXiv 2105.05233), whose README of July 2021
states the flags of every checkpoint. IDDPM is Nichol & Dhariwal 2021 (arXiv 2102.09672), README of March 2021. DDPM is
Ho et al. 2020 (arXiv 2006.11239); only its architecture is here. Papers that state "1120 GFLOPs" for ADM-256 count
multiply-adds, which are 2 floating-point operations each.
"""

import difflib
from dataclasses import dataclass, replace

from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig

ADM_PAPER = "arXiv 2105.05233"
EDM_PAPER = "arXiv 2206.00364"
ADM_README = "guided-diffusion README"
DIT_TABLES = "arXiv 2212.09748, tables 2 and 3"


@dataclass(frozen=True)
class Recipe:
    """A recommended way to sample."""

    sampler: SamplerConfig
    guidance: GuidanceConfig
    classifier: str | None  # a name in the zoo; None = unguided
    source: str


@dataclass(frozen=True)
class Score:
    """Published scores of 50,000 samples; None = the source does not state this number."""

    setting: str
    fid: float
    sfid: float | None
    precision: float | None
    recall: float | None
    source: str


@dataclass(frozen=True)
class Entry:
    """A released model."""

    checkpoint: str | None  # file name of the released weights; None = no weights were released
    network: Architecture
    diffusion: DiffusionConfig  # for a classifier, the process whose noise it was trained on
    recipes: tuple[Recipe, ...] = ()
    scores: tuple[Score, ...] = ()


def _ddpm(steps: int, source: str, scale: float = 0.0, classifier: str | None = None) -> Recipe:
    sampler = SamplerConfig(name="ddpm", num_steps=steps)
    return Recipe(sampler, GuidanceConfig(scale=scale), classifier, source)


def _ddim25(scale: float, classifier: str) -> Recipe:
    sampler = SamplerConfig(name="ddim", num_steps=25)
    return Recipe(sampler, GuidanceConfig(scale=scale), classifier, f"{ADM_PAPER}, 25-step DDIM")


LINEAR = DiffusionConfig(schedule="linear")
COSINE = DiffusionConfig(schedule="cosine")
MULT_64 = (1, 2, 3, 4)
MULT_128 = (1, 1, 2, 3, 4)
MULT_256 = (1, 1, 2, 2, 4, 4)
MULT_512 = (0.5, 1, 1, 2, 2, 4, 4)

_UNET_256 = UNetConfig(
    image_size=256, model_channels=256, num_res_blocks=2, channel_mult=MULT_256, num_head_channels=64
)
_LSUN = _UNET_256.model_copy(update={"dropout": 0.1})
_LSUN_RECIPES = (
    _ddpm(1000, ADM_README),
    Recipe(SamplerConfig(name="ddpm", num_steps=250, respacing="90,60,60,20,20"), GuidanceConfig(), None, ADM_PAPER),
)


def _classifier(image_size: int, channel_mult: tuple[float, ...], num_res_blocks: int = 2) -> ClassifierConfig:
    return ClassifierConfig(
        image_size=image_size,
        model_channels=128,
        num_res_blocks=num_res_blocks,
        channel_mult=channel_mult,
        num_head_channels=64,
    )


_ADM: dict[str, Entry] = {
    "adm-64": Entry(
        "64x64_diffusion.pt",
        UNetConfig(
            image_size=64,
            model_channels=192,
            num_res_blocks=3,
            channel_mult=MULT_64,
            num_head_channels=64,
            use_new_attention_order=True,
            num_classes=1000,
            dropout=0.1,
        ),
        COSINE,
        (_ddpm(250, ADM_README, 1.0, "classifier-64"),),
        (Score("ADM, 250 steps, unguided", 2.07, None, 0.74, 0.63, ADM_README),),
    ),
    "adm-128": Entry(
        "128x128_diffusion.pt",
        UNetConfig(
            image_size=128,
            model_channels=256,
            num_res_blocks=2,
            channel_mult=MULT_128,
            num_heads=4,
            num_classes=1000,
        ),
        LINEAR,
        (_ddpm(250, ADM_README, 0.5, "classifier-128"), _ddim25(1.25, "classifier-128")),
        (
            Score("ADM, 250 steps, unguided", 5.91, None, 0.70, 0.65, ADM_PAPER),
            Score("ADM-G, 25 DDIM steps, scale 1.25", 5.98, None, 0.78, 0.51, ADM_PAPER),
            Score("ADM-G, 250 steps, scale 0.5", 2.97, None, 0.78, 0.59, ADM_README),
        ),
    ),
    "adm-256": Entry(
        "256x256_diffusion.pt",
        _UNET_256.model_copy(update={"num_classes": 1000}),
        LINEAR,
        (_ddpm(250, ADM_README, 1.0, "classifier-256"), _ddim25(2.5, "classifier-256")),
        (
            Score("ADM, 250 steps, unguided", 10.94, 6.02, 0.69, 0.63, ADM_PAPER),
            Score("ADM-G, 25 DDIM steps, scale 2.5", 5.44, 5.32, 0.81, 0.49, ADM_PAPER),
            Score("ADM-G, 250 steps, scale 1", 4.59, 5.25, 0.82, 0.52, ADM_PAPER),
        ),
    ),
    "adm-256-uncond": Entry(
        "256x256_diffusion_uncond.pt",
        _UNET_256,
        LINEAR,
        (_ddpm(250, ADM_README, 10.0, "classifier-256"),),
        (
            Score("250 steps, unguided", 26.21, None, None, None, ADM_PAPER),
            Score("250 steps, scale 1", 33.03, None, None, None, ADM_PAPER),
            Score("250 steps, scale 10", 12.00, None, 0.76, 0.44, ADM_PAPER),
        ),
    ),
    "adm-512": Entry(
        "512x512_diffusion.pt",
        UNetConfig(
            image_size=512,
            model_channels=256,
            num_res_blocks=2,
            channel_mult=MULT_512,
            num_head_channels=64,
            num_classes=1000,
        ),
        LINEAR,
        (_ddpm(250, ADM_README, 4.0, "classifier-512"), _ddim25(9.0, "classifier-512")),
        (
            Score("ADM, 250 steps, unguided", 23.24, 10.19, 0.73, 0.60, DIT_TABLES),
            Score("ADM-G, 25 DDIM steps, scale 9", 8.41, None, 0.83, 0.47, ADM_PAPER),
            Score("ADM-G, 250 steps, scale 4", 7.72, 6.57, 0.87, 0.42, DIT_TABLES),
        ),
    ),
    "upsampler-64-256": Entry(
        "64_256_upsampler.pt",
        UNetConfig(
            image_size=256,
            low_res_size=64,
            model_channels=192,
            num_res_blocks=2,
            channel_mult=MULT_256,
            num_heads=4,
            num_classes=1000,
        ),
        LINEAR,
        (_ddpm(250, ADM_README),),
        (
            Score("ADM-U, base unguided", 7.49, 5.13, 0.72, 0.63, DIT_TABLES),
            Score("ADM-G + ADM-U, base guided", 3.94, 6.14, 0.83, 0.53, "guided-diffusion evaluations README"),
        ),
    ),
    "upsampler-128-512": Entry(
        "128_512_upsampler.pt",
        UNetConfig(
            image_size=512,
            low_res_size=128,
            model_channels=192,
            num_res_blocks=2,
            channel_mult=MULT_256,
            attention_resolutions=(32, 16),
            num_head_channels=64,
            num_classes=1000,
        ),
        LINEAR,
        (_ddpm(250, ADM_README),),
        (
            Score("ADM-U, base unguided", 9.96, 5.62, 0.75, 0.64, DIT_TABLES),
            Score("ADM-G + ADM-U, base guided", 3.85, 5.86, 0.84, 0.53, DIT_TABLES),
        ),
    ),
    "lsun-bedroom": Entry(
        "lsun_bedroom.pt",
        _LSUN,
        LINEAR,
        _LSUN_RECIPES,
        (
            Score("1000 steps", 1.90, None, 0.66, 0.51, ADM_README),
            Score("250 steps as 90,60,60,20,20", 2.02, None, None, None, ADM_PAPER),
            Score("250 uniform steps", 2.31, None, None, None, ADM_PAPER),
        ),
    ),
    "lsun-cat": Entry(
        "lsun_cat.pt",
        _LSUN,
        LINEAR,
        _LSUN_RECIPES,
        (Score("1000 steps", 5.57, None, 0.63, 0.52, ADM_README),),
    ),
    "lsun-horse": Entry(
        "lsun_horse.pt",
        _LSUN,
        LINEAR,
        _LSUN_RECIPES,
        (Score("1000 steps", 2.57, None, 0.71, 0.55, ADM_README),),
    ),
    "lsun-horse-nodropout": Entry("lsun_horse_nodropout.pt", _UNET_256, LINEAR, _LSUN_RECIPES),
    "classifier-64": Entry("64x64_classifier.pt", _classifier(64, MULT_64, num_res_blocks=4), COSINE),
    "classifier-128": Entry("128x128_classifier.pt", _classifier(128, MULT_128), LINEAR),
    "classifier-256": Entry("256x256_classifier.pt", _classifier(256, MULT_256), LINEAR),
    "classifier-512": Entry("512x512_classifier.pt", _classifier(512, MULT_512), LINEAR),
}

# IDDPM: an earlier version of the code, without BigGAN residual blocks; attention at 16 and 8 with 4 heads

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

# DDPM: single-head attention at 16, additive embeddings, a fixed variance

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
        (_ddpm(1000, "arXiv 2006.11239"),),
        (Score("1000 steps", 3.17, None, None, None, "arXiv 2006.11239, table 1"),),
    ),
    "ddpm-256": Entry(
        None,
        _DDPM_CIFAR10.model_copy(update={"image_size": 256, "channel_mult": MULT_256, "dropout": 0.0}),
        DiffusionConfig(schedule="linear", variance="fixed_small"),
        (_ddpm(1000, "arXiv 2006.11239"),),
    ),
}

ZOO: dict[str, Entry] = {**_ADM, **_IDDPM, **_DDPM}

# The same weights with the sampler of Karras et al. (arXiv 2206.00364, table 2 and appendix E), 511 evaluations.
ZOO["adm-64-edm"] = replace(
    ZOO["adm-64"],
    recipes=(
        Recipe(
            SamplerConfig(name="edm", num_steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003),
            GuidanceConfig(),
            None,
            EDM_PAPER,
        ),
    ),
    scores=(Score("ADM, EDM's stochastic sampler, 511 evaluations, unguided", 1.55, None, None, None, EDM_PAPER),),
)


def entry(name: str) -> Entry:
    """Return the entry of a model; ValueError if there is no such model."""
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, 1)
        advice = f"did you mean {near[0]}?" if near else f"the models are {', '.join(ZOO)}"
        raise ValueError(f"there is no released model {name!r}; {advice}")
    return ZOO[name]
