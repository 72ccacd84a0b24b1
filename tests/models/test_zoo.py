"""The released models: numbers of parameters and tensors agree with published ones, and entries fit together.

Names and shapes of four checkpoints are compared by tests/reference.py.
"""

import pytest
import torch

from models.costs import count_parameters
from models.samplers import evaluated_timesteps
from models.unet import ClassifierConfig, UNetConfig
from models.zoo import ZOO, entry

# name -> (parameters, tensors) of the released checkpoints
RELEASED = {
    "adm-64": (295_904_454, 541),
    "adm-128": (421_529_606, 493),
    "adm-256": (553_838_086, 567),
    "adm-256-uncond": (552_814_086, 566),
    "adm-512": (558_997_638, 645),
    "upsampler-64-256": (311_795_910, 567),
    "upsampler-128-512": (308_835_270, 537),
    "lsun-bedroom": (552_814_086, 566),
    "lsun-cat": (552_814_086, 566),
    "lsun-horse": (552_814_086, 566),
    "lsun-horse-nodropout": (552_814_086, 566),
    "classifier-64": (65_438_568, 307),
    "classifier-128": (42_568_040, 221),
    "classifier-256": (54_096_360, 249),
    "classifier-512": (54_448_360, 281),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_published_size(name: str) -> None:
    config = ZOO[name].network
    with torch.device("meta"):
        network = config.build()
    sizes = (sum(p.numel() for p in network.parameters()), len(network.state_dict()))
    assert sizes == RELEASED[name]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("ddpm-cifar10", 35.7), ("ddpm-256", 114), ("iddpm-imagenet64-cond", 270), ("iddpm-cifar10", 50)],
)
def test_older_models_have_about_the_size_that_their_papers_state(name: str, millions: float) -> None:
    assert count_parameters(ZOO[name].network) / 1e6 == pytest.approx(millions, rel=0.06)


@pytest.mark.parametrize("name", ZOO)
def test_entries_are_valid(name: str) -> None:
    model = ZOO[name]
    type(model.network).model_validate(model.network.model_dump())
    type(model.diffusion).model_validate(model.diffusion.model_dump())
    if isinstance(model.network, UNetConfig):
        image_channels = model.network.in_channels
        assert model.network.out_channels == image_channels * (2 if model.diffusion.learns_variance else 1)
    if (recipe := model.recipe) is not None:
        assert evaluated_timesteps(recipe.sampler, model.diffusion)
        assert (recipe.guidance.scale > 0) == (recipe.classifier is not None)
        if recipe.classifier is not None:
            classifier = ZOO[recipe.classifier]
            assert isinstance(classifier.network, ClassifierConfig)
            assert classifier.network.image_size == model.network.image_size
            assert classifier.diffusion.schedule == model.diffusion.schedule


def test_an_unknown_model_is_refused_with_a_similar_name() -> None:
    with pytest.raises(ValueError, match="'adm-1024'; did you mean adm-"):
        entry("adm-1024")
