"""Named configs for generating samples."""

from models import zoo
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.config import DIGITS, IMAGENET, IMAGES, IMAGES_CPU, SIZES, TWO_CORES
from orchestrator.generation.config import GenerationConfig


def generation_presets() -> dict[str, tuple[str, GenerationConfig]]:
    """Return (description, config) of every generation by name."""
    digits = GenerationConfig(
        weights="digits/diffusion",
        classifier="digits/classifier",
        output="digits/samples",
        num_samples=1_000,
        sampler=SamplerConfig(name="ddpm", num_steps=25),
        upsampling=SamplerConfig(name="ddpm", num_steps=25),
        guidance=GuidanceConfig(scale=1.0),
        num_workers=2,
    )
    released = GenerationConfig(
        weights="64x64_diffusion.pt",
        classifier="64x64_classifier.pt",
        output="adm64/samples",
        sampler=SamplerConfig(name="ddpm", num_steps=250),
        guidance=GuidanceConfig(scale=1.0),
        labels="uniform",
        dtype="float16",
        compile=True,
        num_gpus=1,
    )
    cascade = released.model_copy(
        update={
            "upsampler": "64_256_upsampler.pt",
            "upsampling": SamplerConfig(name="ddpm", num_steps=250),
            "output": "adm64-256/samples",
        }
    )
    return {
        "digits": (DIGITS, digits),
        "images": (IMAGES, _images()),
        "images_cpu": (IMAGES_CPU, _images_cpu()),
        **{f"imagenet{size}": (f"{IMAGENET} at {size}x{size}, as published", _imagenet(size)) for size in SIZES},
        "released": ("the released ADM-G on ImageNet 64x64, as recommended", released),
        "cascade": ("the same, enlarged to 256x256 by the released upsampler (ADM-G + ADM-U)", cascade),
    }


def _images() -> GenerationConfig:
    return GenerationConfig(
        weights="images/diffusion",
        classifier="images/classifier",
        output="images/samples",
        num_samples=10_000,
        sampler=SamplerConfig(name="ddim", num_steps=50),
        guidance=GuidanceConfig(scale=1.0),
        dtype="bfloat16",
        compile=True,
        num_gpus=1,
    )


def _images_cpu() -> GenerationConfig:
    changes = {
        "weights": "images_cpu/diffusion",
        "classifier": "images_cpu/classifier",
        "output": "images_cpu/samples",
        "num_samples": 1_000,
        "dtype": "float32",
        "compile": False,
        **TWO_CORES,
    }
    return _images().model_copy(update=changes)


def _imagenet(size: int) -> GenerationConfig:
    """Return the generation by the models that the same preset trains, with the published sampler and scale."""
    recipe = zoo.entry(f"adm-{size}").recipe
    assert recipe is not None
    return GenerationConfig(
        weights=f"imagenet{size}/diffusion",
        classifier=f"imagenet{size}/classifier",
        output=f"imagenet{size}/samples",
        sampler=recipe.sampler,
        guidance=recipe.guidance,
        labels="uniform",
        dtype="float16",
        compile=True,
        num_gpus=1,
    )
