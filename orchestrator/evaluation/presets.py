"""Evaluations and likelihoods by name."""

from orchestrator.config import DIGITS
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
    photographs = EvaluationConfig(
        samples="samples.npz", reference="reference.npz", output="evaluation", extractor="efficientnet"
    )
    return {
        "digits": (DIGITS, digits),
        "released": ("ImageNet 64x64 against the published reference batch, by FID's Inception network", released),
        "photographs": ("one's own images, by EfficientNet with ImageNet weights, which a package brings", photographs),
    }


def likelihood_presets() -> dict[str, tuple[str, LikelihoodConfig]]:
    """Likelihoods to estimate."""
    digits = LikelihoodConfig(
        weights="digits/diffusion", dataset="datasets/digits", output="digits/likelihood", num_workers=2
    )
    return {"digits": (DIGITS, digits)}
