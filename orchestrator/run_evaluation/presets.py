"""Presets of evaluations of training runs."""

from models.samplers import SamplerConfig
from orchestrator.config import DIGITS, IMAGES
from orchestrator.run_evaluation.config import RunEvaluationConfig


def run_evaluation_presets() -> dict[str, tuple[str, RunEvaluationConfig]]:
    """Return the presets, with their descriptions."""
    digits = RunEvaluationConfig(
        weights="digits/diffusion",
        classifier="digits/classifier",
        reference="datasets/digits",
        output="digits/quality",
        num_workers=2,
    )
    images = RunEvaluationConfig(
        weights="images/diffusion",
        classifier="images/classifier",
        reference="datasets/images",
        output="images/quality",
        objective=("fd_efficientnet_lite0",),
        extractor="efficientnet",
        dtype="bfloat16",
        num_gpus=1,
    )
    imagenet64 = RunEvaluationConfig(
        weights="imagenet64/diffusion",
        classifier="imagenet64/classifier",
        reference="datasets/imagenet",
        output="imagenet64/quality",
        objective=("fid",),
        sampler=SamplerConfig(name="ddim", num_steps=50),
        labels="uniform",
        extractor="inception",
        dtype="bfloat16",
        num_gpus=1,
    )
    return {
        "digits": (DIGITS, digits),
        "images": (IMAGES, images),
        "imagenet64": ("a training of ImageNet at 64x64", imagenet64),
    }
