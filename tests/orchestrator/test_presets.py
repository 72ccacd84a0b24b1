"""Test that presets of the same name fit each other: each job reads what the previous job writes."""

from orchestrator.data.presets import dataset_presets
from orchestrator.data.shards import ROW_GROUP_IMAGES
from orchestrator.order import OPEN_BYTES_LIMIT
from orchestrator.training.presets import adm_presets, classifier_presets, upsampler_presets


def test_trainings_that_validate_have_a_dataset_that_holds_images_out() -> None:
    prepared = {config.output: config for _, config in dataset_presets().values()}
    validating = 0
    for presets in (adm_presets, classifier_presets, upsampler_presets):
        for name, (_, config) in presets().items():
            if config.eval_every:
                held_out = prepared[config.dataset].validation_fraction
                assert held_out > 0, f"{name}: {config.dataset} holds nothing out"
                validating += 1
    assert validating >= 6


def test_a_worker_of_every_training_can_hold_its_open_images() -> None:
    for presets in (adm_presets, classifier_presets, upsampler_presets):
        for name, (_, config) in presets().items():
            rows = (
                config.order.num_streams
                // max(config.num_workers, 1)
                * config.order.shuffle_row_groups
                * ROW_GROUP_IMAGES
            )
            assert rows * config.model.image_size**2 * 3 <= OPEN_BYTES_LIMIT, name
