"""The zoo: counts of parameters, tensors and multiply-adds against the published ones.

Names and shapes of four checkpoints are compared by tests/reference.py.
"""

import pytest
import torch

from models.costs import count_parameters, forward_multiply_adds
from models.samplers import respacing_for
from models.unet import ClassifierConfig, UNetConfig
from models.zoo import ZOO, describe, entry

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

# giga multiply-adds of a forward pass; papers that say 1120 "GFLOPs" for adm-256 mean these
GMAC = {"adm-64": 109.7, "adm-256": 1119.8, "classifier-64": 19.1, "classifier-256": 73.3}
MORE_GMAC = {"adm-128": 306.9, "adm-512": 1982.3, "classifier-128": 21.0, "classifier-512": 112.8}


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
def test_older_models_have_about_the_size_that_papers_round(name: str, millions: float) -> None:
    assert count_parameters(ZOO[name].network) / 1e6 == pytest.approx(millions, rel=0.06)


@pytest.mark.parametrize("name", GMAC)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    assert forward_multiply_adds(ZOO[name].network) / 1e9 == pytest.approx(GMAC[name], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_GMAC)
def test_multiply_adds_of_the_others_are_the_published_ones(name: str) -> None:
    assert forward_multiply_adds(ZOO[name].network) / 1e9 == pytest.approx(MORE_GMAC[name], abs=0.1)


def test_multiply_adds_of_one_convolution_are_counted_by_hand() -> None:
    config = UNetConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_heads=1
    )
    wider = config.model_copy(update={"in_channels": 4})
    added = forward_multiply_adds(wider) - forward_multiply_adds(config)
    assert added == 8 * 8 * 3 * 3 * 32  # one more input channel of the first convolution


@pytest.mark.parametrize("name", ZOO)
def test_entries_are_valid(name: str) -> None:
    model = ZOO[name]
    type(model.network).model_validate(model.network.model_dump())
    type(model.diffusion).model_validate(model.diffusion.model_dump())
    if isinstance(model.network, UNetConfig):
        image_channels = model.network.in_channels
        assert model.network.out_channels == image_channels * (2 if model.diffusion.learns_variance else 1)
    for recipe in model.recipes:
        assert respacing_for(recipe.sampler, model.diffusion.num_timesteps)
        assert (recipe.guidance.scale > 0) == (recipe.classifier is not None)
        if recipe.classifier is not None:
            classifier = ZOO[recipe.classifier]
            assert isinstance(classifier.network, ClassifierConfig)
            assert classifier.network.image_size == model.network.image_size
            assert classifier.diffusion.schedule == model.diffusion.schedule
    assert all(score.source for score in model.scores)


def test_describe_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    text = describe("classifier-64")
    assert capsys.readouterr().out == text + "\n"
    for fact in ("64x64_classifier.pt", "65,438,568", "19.0 G", "num_res_blocks=4", "schedule=cosine"):
        assert fact in text
    with pytest.raises(ValueError, match="no model 'adm-1024'; it has adm-64"):
        entry("adm-1024")
