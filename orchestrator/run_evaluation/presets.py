"""Presets of evaluations of training runs."""

from typing import Any

from models.samplers import SamplerConfig
from orchestrator.config import DIGITS, IMAGENET, IMAGES, IMAGES_CPU, SIZES, TWO_CORES
from orchestrator.run_evaluation.config import RunEvaluationConfig


def run_evaluation_presets() -> dict[str, tuple[str, RunEvaluationConfig]]:
    """Return the presets, with their descriptions; each evaluates the training by the preset of the same name."""

    def preset(name: str, dataset: str, **settings: Any) -> RunEvaluationConfig:
        return RunEvaluationConfig(
            weights=f"{name}/diffusion",
            classifier=f"{name}/classifier",
            reference=f"datasets/{dataset}",
            output=f"{name}/quality",
            **settings,
        )

    on_gpu = {"dtype": "bfloat16", "num_gpus": 1}
    efficientnet = {"extractor": "efficientnet", "objective": ("fd_efficientnet_lite0",)}
    inception = {"extractor": "inception", "objective": ("fid",)}
    sampling = {"sampler": SamplerConfig(name="ddim", num_steps=50), "labels": "uniform"}
    return {
        "digits": (DIGITS, preset("digits", "digits", num_workers=2)),
        "images": (IMAGES, preset("images", "images", **efficientnet, **on_gpu)),
        "images_cpu": (IMAGES_CPU, preset("images_cpu", "images", **efficientnet, **TWO_CORES)),
        **{
            f"imagenet{size}": (
                f"{IMAGENET} at {size}x{size}",
                preset(f"imagenet{size}", "imagenet", **inception, **sampling, **on_gpu),
            )
            for size in SIZES
        },
    }
