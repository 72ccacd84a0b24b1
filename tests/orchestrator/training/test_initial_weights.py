"""Test that a training starts from any `.pt` file of its architecture, also with other classes or another name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.collectives import Group
from models.diffusion import DiffusionConfig
from models.unet import Architecture
from models.zoo import ZOO, Entry
from orchestrator.order import OrderConfig
from orchestrator.training.config import AdmConfig, NoisyClassifierConfig
from orchestrator.training.initial_weights import load_initial_weights
from orchestrator.training.state import TrainingState
from orchestrator.weights.network import save_weights
from tests.orchestrator.networks import CLASSIFIER, UNET

SETTINGS: dict[str, Any] = {
    "dataset": "none", "output": "none", "order": OrderConfig(num_streams=1), "total_images": 16, "batch_size": 16,
    "num_workers": 0, "init_from": "ema_0.9999_100000.pt",
}  # fmt: skip


def write(folder: Path, architecture: Architecture, name: str = "ema_0.9999_100000.pt") -> dict[str, Tensor]:
    torch.manual_seed(1)
    weights = {key: torch.randn_like(tensor) for key, tensor in architecture.build().state_dict().items()}
    if name.endswith(".pt"):
        torch.save(weights, folder / name)
    else:
        save_weights(str(folder / name), weights, architecture, DiffusionConfig(), ())
    return weights


def config(folder: Path, **changes: Any) -> AdmConfig:
    settings = SETTINGS | {"store": str(folder), "model": UNET, "diffusion": DiffusionConfig()} | changes
    return AdmConfig.model_validate(settings)


def weights_at_start(training: AdmConfig | NoisyClassifierConfig) -> dict[str, Tensor]:
    state = TrainingState(training, torch.device("cpu"))
    load_initial_weights(training, state, Group(0, 1))
    weights = dict(state.model.state_dict())
    for average in state.averages.values():
        assert all(torch.equal(tensor, weights[name]) for name, tensor in average.items())
    return weights


def test_a_foreign_file_is_read_as_the_trainings_own_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = write(tmp_path, UNET)
    started = weights_at_start(config(tmp_path))
    assert all(torch.equal(started[name], tensor) for name, tensor in weights.items())
    for field in ("ema_0.9999_100000.pt", "num_heads=4", "--diffusion.*"):
        assert field in caplog.text


@pytest.mark.parametrize("file_classes", [None, 7])
@pytest.mark.parametrize("file", ["ema_0.9999_100000.pt", "images-000000000096-ema-0.9.safetensors"])
def test_class_dependent_tensors_are_reinitialised_for_other_classes(
    tmp_path: Path, file_classes: int | None, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = write(tmp_path, UNET.model_copy(update={"num_classes": file_classes}), file)
    started = weights_at_start(config(tmp_path, init_from=file))
    fresh = TrainingState(config(tmp_path), torch.device("cpu")).model.state_dict()
    assert torch.equal(started["label_emb.weight"], fresh["label_emb.weight"])
    for name in weights.keys() - {"label_emb.weight"}:
        assert torch.equal(started[name], weights[name])
    assert f"has {file_classes or 'no'} classes and this model 10: label_emb.weight is re-initialised" in caplog.text


@pytest.mark.parametrize(
    ("file_classes", "own_classes"),
    [
        ({"num_classes": 7}, {"null_class": True}),
        ({"num_classes": None}, {"null_class": True}),
        ({"num_classes": 11}, {"null_class": True}),  # both have eleven rows
        ({"num_classes": 9, "null_class": True}, {}),  # both have ten rows
    ],
)
def test_a_null_class_is_no_class_of_the_file(
    tmp_path: Path, file_classes: dict[str, Any], own_classes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = "images-000000000096-ema-0.9.safetensors"
    write(tmp_path, UNET.model_copy(update=file_classes), file)
    own = config(tmp_path, init_from=file, model=UNET.model_copy(update=own_classes))
    fresh = TrainingState(own, torch.device("cpu")).model.state_dict()
    assert torch.equal(weights_at_start(own)["label_emb.weight"], fresh["label_emb.weight"])
    assert "label_emb.weight is re-initialised" in caplog.text


def test_fine_tuning_for_classifier_free_guidance_adds_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = write(tmp_path, UNET)
    started = weights_at_start(config(tmp_path, model=UNET.model_copy(update={"null_class": True})))
    assert torch.equal(started["label_emb.weight"][:10], weights["label_emb.weight"])
    assert started["label_emb.weight"].shape[0] == 11 and not started["label_emb.weight"][10].any()
    assert all(torch.equal(started[name], weights[name]) for name in weights if name != "label_emb.weight")
    assert "null class" in caplog.text


def test_a_model_without_classes_omits_the_label_embedding_of_the_file(tmp_path: Path) -> None:
    weights = write(tmp_path, UNET)
    started = weights_at_start(config(tmp_path, model=UNET.model_copy(update={"num_classes": None})))
    assert weights.keys() - started.keys() == {"label_emb.weight"}


def test_a_classifier_starts_from_one_with_other_classes(tmp_path: Path) -> None:
    weights = write(tmp_path, CLASSIFIER.model_copy(update={"num_classes": 3}))
    settings = SETTINGS | {"store": str(tmp_path), "model": CLASSIFIER, "diffusion": DiffusionConfig()}
    started = weights_at_start(NoisyClassifierConfig.model_validate(settings))
    fresh = {"out.2.c_proj.weight", "out.2.c_proj.bias"}
    assert all(torch.equal(started[name], weights[name]) for name in weights.keys() - fresh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 64}, r"num_channels \(--model.model-channels\) is 64 in the file, 32 here"),
        ({"out_channels": 3}, r"learn_sigma \(--model.out-channels\) is 3 in the file, 6 here"),
        ({"num_res_blocks": 2}, r"num_res_blocks \(--model.num-res-blocks\) is 2 in the file, 1 here"),
    ],
)
def test_another_network_is_refused_by_option(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, UNET.model_copy(update={**changes, "num_classes": 7}))
    with pytest.raises(ValueError, match=message):
        weights_at_start(config(tmp_path))


def test_a_released_name_still_gives_the_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(ZOO, "tiny", Entry("tiny.pt", UNET, DiffusionConfig(schedule="cosine")))
    weights = write(tmp_path, UNET, "tiny.pt")
    started = weights_at_start(config(tmp_path, init_from="tiny.pt"))
    assert torch.equal(started["out.2.weight"], weights["out.2.weight"])
    assert "trained for another diffusion" in caplog.text and "does not tell" not in caplog.text
