"""Test that the estimated cost of a generation agrees with published numbers."""

import pytest

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.generation.config import GenerationConfig, recommended
from orchestrator.generation.cost import cost_lines, costs, outline
from orchestrator.generation.presets import generation_presets


def adm_256(**changes: object) -> GenerationConfig:
    settings: dict = {
        "weights": "256x256_diffusion.pt", "classifier": "256x256_classifier.pt", "output": "samples",
        "sampler": SamplerConfig(num_steps=250), "guidance": GuidanceConfig(scale=1.0), "num_gpus": 1,
    }  # fmt: skip
    return GenerationConfig(**settings | changes)


def work(config: GenerationConfig) -> float:
    assert config.classifier
    upsampler = outline(config, config.upsampler) if config.upsampler else None
    base, classifier = outline(config, config.weights), outline(config, config.classifier)
    weak = outline(config, config.guidance.weak_weights) if config.guidance.weak_weights else None
    stages = costs(config, 1, base, {"classifier": classifier, "classifier_free": base, "auto": weak}, upsampler)
    return sum(cost.flops for cost in stages)


def test_a_guided_step_costs_what_the_architecture_says() -> None:
    assert work(adm_256()) / 250 == pytest.approx(2.53e12, rel=0.01)


def test_skipped_evaluations_cost_nothing() -> None:
    unguided = work(adm_256(guidance=GuidanceConfig()))
    half = work(adm_256(guidance=GuidanceConfig(scale=1.0, interval=(0.25, 0.75))))
    assert unguided == pytest.approx(250 * 2 * 1119.8e9, rel=0.01)
    assert half - unguided == pytest.approx((work(adm_256()) - unguided) / 2, rel=0.01)
    heun = work(adm_256(sampler=SamplerConfig(name="heun", num_steps=50)))
    assert heun / work(adm_256()) == pytest.approx(99 / 250)


def test_other_guides_cost_their_forward_pass() -> None:
    unguided = work(adm_256(guidance=GuidanceConfig()))
    free = GuidanceConfig(kind="classifier_free", scale=1.0)
    assert work(adm_256(guidance=free)) == pytest.approx(2 * unguided)
    assert work(adm_256(guidance=free.model_copy(update={"interval": (0.25, 0.75)}))) == pytest.approx(
        1.5 * unguided, rel=0.01
    )
    weak = GuidanceConfig(kind="auto", scale=1.0, weak_weights="64x64_diffusion.pt")  # as cheap as a small model is
    assert work(adm_256(guidance=weak)) - unguided == pytest.approx(250 * 2 * 109.7e9, rel=0.01)


def test_a_cascade_pays_for_both_stages() -> None:
    def base(**changes: object) -> float:
        return work(adm_256(weights="64x64_diffusion.pt", classifier="64x64_classifier.pt", **changes))

    upsampler = {"upsampler": "64_256_upsampler.pt", "upsampling": SamplerConfig(num_steps=27)}
    assert base(**upsampler) > base() + 27 * 2 * 5e11


def test_a_released_model_has_a_cost_before_its_weights_exist() -> None:
    lines = "\n".join(cost_lines(adm_256(store="/nowhere", dtype="bfloat16"), 50_000, {}))
    assert "not there yet: /nowhere/256x256_diffusion.pt" in lines and "9.83 GB at most" in lines
    assert "50,000 images x 633 TFLOPs" in lines and "14% of 989 TFLOP/s" in lines


def test_the_default_batch_size_fits_the_gpu() -> None:
    _, preset = generation_presets()["released"]
    large = preset.model_copy(update=recommended("adm-512"))
    lines = "\n".join(cost_lines(large, 50_000, {}))
    assert "activations of 64 images" not in lines and "TOO MUCH" not in lines
    assert "TOO MUCH" in "\n".join(cost_lines(large.model_copy(update={"batch_size": 64}), 50_000, {}))
