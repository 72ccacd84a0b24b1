"""Presets of searches."""

from orchestrator.config import DIGITS, IMAGENET, IMAGES, IMAGES_CPU, SIZES, TWO_CORES
from orchestrator.search.config import SearchConfig
from orchestrator.search.space import SpaceConfig


def search_presets() -> dict[str, tuple[str, SearchConfig]]:
    """Return the presets, with their descriptions."""
    digits = SearchConfig(
        weights=("digits/diffusion",),
        classifier="digits/classifier",
        reference="datasets/digits",
        output="digits/search",
        space=SpaceConfig(num_steps=(5, 10, 20, 40), samplers=("ddpm", "ddim")),
        rungs=(64, 128, 256, 512, 1024),
        num_workers=2,
    )
    released = SearchConfig(
        weights=("256x256_diffusion.pt", "256x256_diffusion_uncond.pt"),
        classifier="256x256_classifier.pt",
        reference="VIRTUAL_imagenet256_labeled.npz",
        output="adm256/search",
        space=SpaceConfig(
            scales=(0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 12.0),
            num_steps=(10, 15, 25, 50, 100, 250),
            samplers=("ddpm", "ddim", "dpm_solver"),
        ),
        objective=("fid",),
        rungs=(250, 500, 1_000, 2_000, 5_000, 10_000, 50_000),
        trials=40,
        budget="10%",
        labels="uniform",
        extractor="inception",
        dtype="bfloat16",
        num_gpus=1,
    )
    return {
        "digits": (DIGITS, digits),
        "images": (IMAGES, _images()),
        "images_cpu": (IMAGES_CPU, _images_cpu()),
        **{
            f"imagenet{size}": (f"{IMAGENET} at {size}x{size}, by FID at 25 and 50 steps", _imagenet(size))
            for size in SIZES
        },
        "released": ("the released ADM-G on ImageNet 256x256", released),
    }


def _images() -> SearchConfig:
    return SearchConfig(
        weights=("images/diffusion",),
        classifier="images/classifier",
        reference="datasets/images",
        output="images/search",
        space=SpaceConfig(num_steps=(10, 25, 50), samplers=("ddpm", "ddim")),
        objective=("fd_efficientnet_lite0",),
        rungs=(125, 250, 500, 1_000, 2_500, 5_000),
        budget="25%",
        extractor="efficientnet",
        dtype="bfloat16",
        num_gpus=1,
    )


def _images_cpu() -> SearchConfig:
    changes = {
        "weights": ("images_cpu/diffusion",),
        "classifier": "images_cpu/classifier",
        "output": "images_cpu/search",
        "space": SpaceConfig(scales=(0.0, 0.5, 1.0, 2.0, 4.0), continuous=False, num_steps=(25,)),
        "rungs": (64, 128, 256),
        "trials": 5,
        "budget": "60%",
        "dtype": "float32",
        **TWO_CORES,
    }
    return _images().model_copy(update=changes)


def _imagenet(size: int) -> SearchConfig:
    """Return the search over scales for the models that the same preset trains."""
    return SearchConfig(
        weights=(f"imagenet{size}/diffusion",),
        classifier=f"imagenet{size}/classifier",
        reference="datasets/imagenet",
        output=f"imagenet{size}/search",
        space=SpaceConfig(num_steps=(25, 50), samplers=("ddim",)),
        objective=("fid",),
        rungs=(1_000, 5_000, 10_000),
        trials=16,
        labels="uniform",
        extractor="inception",
        dtype="bfloat16",
        num_gpus=1,
    )
