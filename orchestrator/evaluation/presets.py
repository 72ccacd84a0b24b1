"""Evaluations and likelihoods by name."""

from orchestrator.config import DIGITS, IMAGENET, IMAGES, SIZES
from orchestrator.evaluation.config import EvaluationConfig
from orchestrator.evaluation.likelihood import LikelihoodConfig


def evaluation_presets() -> dict[str, tuple[str, EvaluationConfig]]:
    """Samples to measure."""
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
    return {
        "digits": (DIGITS, digits),
        "images": (f"{IMAGES}, by EfficientNet with ImageNet weights, which a package brings", images),
        **{
            f"imagenet{size}": (f"{IMAGENET} at {size}x{size}, by FID's Inception network", _imagenet(size))
            for size in SIZES
        },
        "released": ("ImageNet 64x64 against the published reference batch, by FID's Inception network", released),
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
    """Likelihoods to estimate."""
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
    return {"digits": (DIGITS, digits), "images": (IMAGES, images)}
