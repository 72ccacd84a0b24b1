"""Test that generation, search and likelihood create their device and networks in the same way."""

import numpy as np
import pytest
import torch

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import load_networks, make_batch
from orchestrator.generation.worker import SamplingWorker, prepare_device
from tests.orchestrator.networks import CLASSIFIER, UNET, save_network


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> GenerationConfig:
    """A guided generation by small networks."""
    folder = str(tmp_path_factory.mktemp("store"))
    save_network(folder, "unet.safetensors", UNET)
    save_network(folder, "classifier.safetensors", CLASSIFIER)
    return GenerationConfig(
        store=folder, weights="unet.safetensors", classifier="classifier.safetensors", output="any", batch_size=4,
        sampler=SamplerConfig(name="ddpm", num_steps=4), guidance=GuidanceConfig(scale=2.0),
    )  # fmt: skip


def test_batches_are_those_of_noise_that_is_not_drawn_ahead(config: GenerationConfig) -> None:
    networks = load_networks(config, "cpu")
    expected = [make_batch(networks, config, number)[0].images for number in (2, 5)]
    found = [batch.images for (batch,) in SamplingWorker(config).batches(config, [2, 5])]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "heun"])
def test_a_worker_samples_by_other_settings_than_its_own(config: GenerationConfig, name: str) -> None:
    """As the trials of a search do: the networks stay, sampler, guidance and seed change."""
    worker = SamplingWorker(config)
    setting = {"sampler": SamplerConfig(name=name, num_steps=3), "guidance": GuidanceConfig(), "seed": 9}
    other = config.model_copy(update=setting)
    ((batch,),) = worker.batches(other, [0])
    np.testing.assert_array_equal(batch.images, make_batch(worker.networks, other, 0)[0].images)
    ((own,),) = worker.batches(config, [0])
    assert not np.array_equal(batch.images, own.images)


def test_gpus_that_are_not_there_are_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="sees no GPU"):
        prepare_device(num_gpus=1.0)
