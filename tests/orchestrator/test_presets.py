"""Presets fit each other: what one job leaves by its preset, the next one takes by its own."""

from orchestrator.presets import dataset_presets
from orchestrator.training.presets import adm_presets, classifier_presets, upsampler_presets


def test_trainings_that_validate_have_a_dataset_that_holds_images_out() -> None:
    prepared = {config.output: config for _, config in dataset_presets().values()}
    validating = 0
    for presets in (adm_presets, classifier_presets, upsampler_presets):
        for name, (_, config) in presets().items():
            if config.validation_images:
                held_out = prepared[config.dataset].validation_fraction
                assert held_out > 0, f"{name}: {config.dataset} holds nothing out"
                validating += 1
    assert validating >= 6
