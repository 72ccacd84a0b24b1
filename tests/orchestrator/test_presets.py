"""Test that presets of the same name fit each other: each job reads what the previous job writes."""

import pytest

from orchestrator.config import SIZES
from orchestrator.data.presets import dataset_presets
from orchestrator.data.shards import ROW_GROUP_IMAGES
from orchestrator.evaluation.presets import evaluation_presets
from orchestrator.generation.presets import generation_presets
from orchestrator.order import OPEN_BYTES_LIMIT
from orchestrator.run_evaluation.presets import run_evaluation_presets
from orchestrator.search.presets import search_presets
from orchestrator.training.presets import adm_presets, classifier_presets, upsampler_presets


@pytest.mark.parametrize("preset", ["digits", "images", "images_cpu", *(f"imagenet{size}" for size in SIZES)])
def test_presets_of_one_name_use_each_others_outputs(preset: str) -> None:
    model, classifier = adm_presets()[preset][1], classifier_presets()[preset][1]
    search, generation = search_presets()[preset][1], generation_presets()[preset][1]
    run_evaluation, evaluation = run_evaluation_presets()[preset][1], evaluation_presets()[preset][1]
    assert model.output in search.weights and generation.weights == run_evaluation.weights == model.output
    assert search.classifier == generation.classifier == run_evaluation.classifier == classifier.output
    assert evaluation.samples == generation.output
    datasets = {model.dataset, classifier.dataset, search.reference, run_evaluation.reference, evaluation.reference}
    assert datasets <= {config.output for _, config in dataset_presets().values()} and len(datasets) == 1


def test_trainings_that_validate_have_a_dataset_that_holds_images_out() -> None:
    prepared = {config.output: config for _, config in dataset_presets().values()}
    validating = 0
    for presets in (adm_presets, classifier_presets, upsampler_presets):
        for name, (_, config) in presets().items():
            if config.eval_every:
                held_out = prepared[config.dataset].validation_fraction
                assert held_out > 0, f"{name}: {config.dataset} has no validation images"
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
