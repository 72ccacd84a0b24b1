"""Presets of evaluations of training runs."""

from models.samplers import SamplerConfig
from orchestrator.config import DIGITS, IMAGENET, IMAGES, IMAGES_CPU, SIZES, TWO_CORES
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
    images_cpu = images.model_copy(
        update={
            "weights": "images_cpu/diffusion",
            "classifier": "images_cpu/classifier",
            "output": "images_cpu/quality",
            "dtype": "float32",
            **TWO_CORES,
        }
    )
    return {
        "digits": (DIGITS, digits),
        "images": (IMAGES, images),
        "images_cpu": (IMAGES_CPU, images_cpu),
        **{f"imagenet{size}": (f"{IMAGENET} at {size}x{size}", _imagenet(size)) for size in SIZES},
    }


def _imagenet(size: int) -> RunEvaluationConfig:
    """Return the evaluation of the snapshots of a training by the same preset."""
    return RunEvaluationConfig(
        weights=f"imagenet{size}/diffusion",
        classifier=f"imagenet{size}/classifier",
        reference="datasets/imagenet",
        output=f"imagenet{size}/quality",
        objective=("fid",),
        sampler=SamplerConfig(name="ddim", num_steps=50),
        labels="uniform",
        extractor="inception",
        dtype="bfloat16",
        num_gpus=1,
    )
