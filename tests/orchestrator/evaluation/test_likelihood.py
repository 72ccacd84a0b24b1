"""The likelihood job: it can be resumed, and its result does not depend on the workers."""

import numpy as np
import pytest
import torch

from models.diffusion import DiffusionConfig
from models.unet import UNetConfig
from orchestrator import storage
from orchestrator.data.config import PrepareConfig
from orchestrator.data.job import prepare
from orchestrator.evaluation.likelihood import LikelihoodConfig, estimate, plan
from orchestrator.weights.network import save_weights

UNET = UNetConfig(
    image_size=8, in_channels=1, out_channels=2, model_channels=32, num_res_blocks=1, channel_mult=(1,),
    attention_resolutions=(), num_classes=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with the digits and an untrained network."""
    folder = str(tmp_path_factory.mktemp("store"))
    prepare(PrepareConfig(store=folder, source="digits", output="digits", name="digits", validation_fraction=0.2))
    torch.manual_seed(0)
    weights = UNET.build().state_dict()
    save_weights(storage.join(folder, "w.safetensors"), weights, UNET, DiffusionConfig(), tuple("0123456789"))
    return folder


def config(store: str, output: str, **changes: object) -> LikelihoodConfig:
    settings: dict = {
        "store": store, "weights": "w.safetensors", "dataset": "digits", "output": output, "num_samples": 20,
        "respacing": "6", "batch_size": 8, "num_strips": 2, "interpolation_depths": (3,), "num_workers": 0,
    }  # fmt: skip
    return LikelihoodConfig(**settings | changes)


def test_the_page_has_consistent_numbers_and_all_pictures(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = estimate(config(store, "whole"))
    result = storage.read_json(uri)
    bits = result["bits_per_dim"]
    assert bits["n"] == 20 and bits["interval"][0] < bits["value"] < bits["interval"][1]
    assert bits["value"] == pytest.approx(result["prior_bits_per_dim"] + sum(result["vb"]), rel=1e-5)
    assert result["rate_bits_per_dim"][0] == pytest.approx(result["prior_bits_per_dim"], rel=1e-5)
    assert result["rate_bits_per_dim"][-1] == pytest.approx(bits["value"] - result["vb"][-1], rel=1e-5)
    assert np.all(np.diff(result["rate_bits_per_dim"]) >= 0), "bits received can only grow"
    names = storage.list_names(uri.removesuffix("/likelihood.json"))
    assert {"rate-distortion.png", "progressive-generation.png", "interpolation-0003.png"} <= set(names)
    capsys.readouterr()
    estimate(config(store, "whole"))
    assert "is complete" in capsys.readouterr().out


def test_a_resumed_estimate_is_the_same(store: str) -> None:
    uri = estimate(config(store, "resumed"))
    first = storage.read_json(uri)
    folder = uri.removesuffix("/likelihood.json")
    storage.delete(uri)
    storage.delete(storage.join(folder, "terms", "00000008-00000016.safetensors"))
    assert storage.read_json(estimate(config(store, "resumed"))) == first


def test_an_impossible_depth_is_refused(store: str) -> None:
    with pytest.raises(ValueError, match=r"interpolation_depths contains 6; .* 0 to 5"):
        plan(config(store, "depth", interpolation_depths=(6,)))


def test_a_split_that_cannot_be_estimated_is_refused_before_the_work(store: str) -> None:
    with pytest.raises(ValueError, match="would use 1 of its images"):
        plan(config(store, "one", num_samples=1))
    folder = prepare(
        PrepareConfig(store=store, source="digits", output="others", name="others", validation_fraction=0.2)
    ).folder
    manifest = storage.read_json(f"{folder}/manifest.json")
    storage.write_json(f"{folder}/manifest.json", manifest | {"unlabelled": ["validation"]})
    with pytest.raises(ValueError, match="no labels"):
        plan(config(store, "unlabelled", dataset="others"))


def test_a_split_with_fewer_images_than_strips_has_fewer_strips(store: str) -> None:
    prepare(PrepareConfig(store=store, source="digits", output="few", name="few", validation_fraction=0.002))
    uri = estimate(config(store, "few-images", dataset="few", num_samples=None, num_strips=10))
    assert storage.read_json(uri)["bits_per_dim"]["n"] == 4


def test_a_newer_snapshot_between_two_attempts_changes_nothing(store: str) -> None:
    for images in (512, 1024):
        torch.manual_seed(images)
        uri = storage.join(store, "run", "weights", f"images-{images:012d}-raw.safetensors")
        save_weights(uri, UNET.build().state_dict(), UNET, DiffusionConfig(), tuple("0123456789"))
        first = estimate(config(store, "attempts", weights="run"))
        if images == 512:
            value = storage.read_json(first)
        storage.delete(first)
    assert storage.read_json(estimate(config(store, "attempts", weights="run"))) == value
