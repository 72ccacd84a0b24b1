"""Presets of evaluations and likelihood estimates."""

from orchestrator.config import DIGITS, IMAGENET, IMAGES, IMAGES_CPU, SIZES, TWO_CORES
from orchestrator.evaluation.config import EvaluationConfig
from orchestrator.evaluation.likelihood import LikelihoodConfig


def evaluation_presets() -> dict[str, tuple[str, EvaluationConfig]]:
    """Return the presets of evaluations, with their descriptions."""
    digits = EvaluationConfig(
        samples="digits/samples",
        reference="datasets/digits",
        output="digits/evaluation",
        num_workers=2,
    )
    released = EvaluationConfig(
        samples="adm64/samples",
        reference="VIRTUAL_imagenet64_labeled.npz",
        output="adm64/evaluation",
        extractor="inception",
        num_gpus=1,
    )
    images = EvaluationConfig(
        samples="images/samples",
        reference="datasets/images",
        output="images/evaluation",
        extractor="efficientnet",
        num_gpus=1,
    )
    images_cpu = images.model_copy(
        update={"samples": "images_cpu/samples", "output": "images_cpu/evaluation", **TWO_CORES}
    )
    efficientnet = "with EfficientNet and its ImageNet weights from a Python package"
    return {
        "digits": (DIGITS, digits),
        "images": (f"{IMAGES}, {efficientnet}", images),
        "images_cpu": (f"{IMAGES_CPU}, {efficientnet}", images_cpu),
        **{
            f"imagenet{size}": (f"{IMAGENET} at {size}x{size}, by the Inception network of FID", _imagenet(size))
            for size in SIZES
        },
        "released": (
            "ImageNet 64x64, compared with the published reference batch by the Inception network of FID",
            released,
        ),
    }


def _imagenet(size: int) -> EvaluationConfig:
    """Return the evaluation of the samples that the same preset generates, against the training images."""
    return EvaluationConfig(
        samples=f"imagenet{size}/samples",
        reference="datasets/imagenet",
        output=f"imagenet{size}/evaluation",
        extractor="inception",
        num_gpus=1,
    )


def likelihood_presets() -> dict[str, tuple[str, LikelihoodConfig]]:
    """Return the presets of likelihood estimates, with their descriptions."""
    digits = LikelihoodConfig(
        weights="digits/diffusion", dataset="datasets/digits", output="digits/likelihood", num_workers=2
    )
    images = LikelihoodConfig(
        weights="images/diffusion",
        dataset="datasets/images",
        output="images/likelihood",
        num_samples=1_000,
        respacing="250",
        interpolation_depths=(60, 125, 190),
        num_gpus=1,
    )
    images_cpu = images.model_copy(
        update={
            "weights": "images_cpu/diffusion",
            "output": "images_cpu/likelihood",
            "num_samples": 100,
            "respacing": "50",
            "interpolation_depths": (10, 25, 40),
            **TWO_CORES,
        }
    )
    return {"digits": (DIGITS, digits), "images": (IMAGES, images), "images_cpu": (IMAGES_CPU, images_cpu)}
