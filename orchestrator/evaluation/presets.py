"""Presets of evaluations and likelihood estimates."""

from typing import Any

from orchestrator.config import DIGITS, IMAGENET, IMAGES, IMAGES_CPU, SIZES, TWO_CORES
from orchestrator.evaluation.config import EvaluationConfig
from orchestrator.evaluation.likelihood import LikelihoodConfig


def evaluation_presets() -> dict[str, tuple[str, EvaluationConfig]]:
    """Return the presets of evaluations, with their descriptions.

    Each evaluates the samples that the preset of the same name generates.
    """

    def preset(name: str, reference: str, **settings: Any) -> EvaluationConfig:
        return EvaluationConfig(samples=f"{name}/samples", reference=reference, output=f"{name}/evaluation", **settings)

    efficientnet = "with EfficientNet and its ImageNet weights from a Python package"
    inception = "by the Inception network of FID"
    images, imagenet = "datasets/images", "datasets/imagenet"
    return {
        "digits": (DIGITS, preset("digits", "datasets/digits", num_workers=2)),
        "images": (f"{IMAGES}, {efficientnet}", preset("images", images, extractor="efficientnet", num_gpus=1)),
        "images_cpu": (
            f"{IMAGES_CPU}, {efficientnet}",
            preset("images_cpu", images, extractor="efficientnet", **TWO_CORES),
        ),
        **{
            f"imagenet{size}": (
                f"{IMAGENET} at {size}x{size}, {inception}",
                preset(f"imagenet{size}", imagenet, extractor="inception", num_gpus=1),
            )
            for size in SIZES
        },
        "released": (
            f"ImageNet 64x64, compared with the published reference batch {inception}",
            preset("adm64", "VIRTUAL_imagenet64_labeled.npz", extractor="inception", num_gpus=1),
        ),
    }


def likelihood_presets() -> dict[str, tuple[str, LikelihoodConfig]]:
    """Return the presets of likelihood estimates, with their descriptions."""

    def preset(name: str, dataset: str, **settings: Any) -> LikelihoodConfig:
        return LikelihoodConfig(weights=f"{name}/diffusion", dataset=dataset, output=f"{name}/likelihood", **settings)

    images = {"num_samples": 1_000, "respacing": "250", "interpolation_depths": (60, 125, 190), "num_gpus": 1}
    small = {"num_samples": 100, "respacing": "50", "interpolation_depths": (10, 25, 40), **TWO_CORES}
    return {
        "digits": (DIGITS, preset("digits", "datasets/digits", num_workers=2)),
        "images": (IMAGES, preset("images", "datasets/images", **images)),
        "images_cpu": (IMAGES_CPU, preset("images_cpu", "datasets/images", **small)),
    }
