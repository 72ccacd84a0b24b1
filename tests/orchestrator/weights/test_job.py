"""Round trips of weights are equal to the bit, and conversions can be repeated."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.diffusion import DiffusionConfig
from models.samplers import SamplerConfig
from models.unet import UNetConfig
from models.zoo import ZOO, Entry
from orchestrator import storage
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import load_networks, make_batch
from orchestrator.weights.config import ConversionConfig
from orchestrator.weights.job import convert, plan
from orchestrator.weights.network import load_network, save_weights

TINY = UNetConfig(
    image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=3
)
COSINE = DiffusionConfig(schedule="cosine")


@pytest.fixture(autouse=True)
def _tiny_model_in_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ZOO, "tiny", Entry("tiny.pt", TINY, COSINE))


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    """The tensors of a released file, tiny.pt, in `tmp_path`: every float32 that there is may be among them."""
    torch.manual_seed(0)
    weights = {key: torch.randn_like(tensor) for key, tensor in TINY.build().state_dict().items()}
    weights["out.2.bias"] = torch.tensor([0.0, -0.0, 1e-45, torch.inf, torch.finfo().max, torch.nan])
    torch.save(weights, tmp_path / "tiny.pt")
    return weights


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), f"{name} differs"


def test_pt_to_safetensors_to_pt_is_equal_to_the_bit(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    store = str(tmp_path)
    middle = convert(ConversionConfig(store=store, weights="tiny.pt", output="middle.safetensors"))
    network = load_network(middle)
    assert network.architecture == TINY and network.diffusion == COSINE and network.classes == ("0", "1", "2")
    convert(ConversionConfig(store=store, weights="middle.safetensors", output="back/tiny.pt"))
    assert_same_bits(torch.load(tmp_path / "back" / "tiny.pt", weights_only=True), weights)
    again = convert(ConversionConfig(store=store, weights="back/tiny.pt", output="again.safetensors"))
    assert storage.read_bytes(again) == storage.read_bytes(middle)


def test_a_training_run_is_a_source(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_weights(
        str(tmp_path / "run" / "weights" / "images-64-ema.safetensors"), weights, TINY, COSINE, ("a", "b", "c")
    )
    convert(ConversionConfig(store=str(tmp_path), weights="run", output="run.pt"))
    assert_same_bits(torch.load(tmp_path / "run.pt", weights_only=True), weights)


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt", "out"])
def test_again_is_done_and_another_is_refused(tmp_path: Path, weights: dict[str, Tensor], output: str) -> None:
    config = ConversionConfig(
        store=str(tmp_path), weights="tiny.pt", output=output, format=None if "." in output else "diffusers"
    )
    assert convert(config) == convert(config)
    weights["out.2.bias"][0] = 1.0
    torch.save(weights, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="is there already and holds something else"):
        convert(config)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"output": "folder"}, "output=folder ends neither in .safetensors nor in .pt"),
        ({"output": "w.pt", "format": "diffusers"}, "output=w.pt names a file"),
        ({"weights": "other.pt"}, "no released one is called other.pt"),
        ({"weights": "other.pt", "recipe": "huge"}, "the zoo has no model 'huge'"),
        ({"weights": "run", "recipe": "tiny"}, "recipe='tiny' is for .pt files"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(changes: dict[str, str], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        ConversionConfig.model_validate({"weights": "tiny.pt", "output": "w.safetensors"} | changes)


def test_a_plan_names_both_ends() -> None:
    config = ConversionConfig(store="s3://bucket", weights="any.pt", recipe="tiny", output="w.safetensors")
    assert plan(config).split() == ["reads", "s3://bucket/any.pt", "writes", "s3://bucket/w.safetensors"]


def test_samples_are_the_same_from_either_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({key: 0.1 * torch.randn_like(t) for key, t in TINY.build().state_dict().items()}, tmp_path / "tiny.pt")
    convert(ConversionConfig(store=str(tmp_path), weights="tiny.pt", output="tiny.safetensors"))
    batches = []
    for name in ("tiny.pt", "tiny.safetensors"):
        sampler = SamplerConfig(name="ddim", num_steps=4)
        config = GenerationConfig(store=str(tmp_path), weights=name, output="samples", batch_size=4, sampler=sampler)
        batches.append(make_batch(load_networks(config, "cpu"), config, 0))
    assert batches[0].labels.tolist() == [0, 1, 2, 0]
    assert batches[0].images.std() > 10, "the samples are flat"
    assert (batches[0].images == batches[1].images).all()
