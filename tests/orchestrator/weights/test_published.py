"""`.pt` files: strict loading, no code from pickles, and a clear error for each kind of bad file."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.diffusion import DiffusionConfig
from models.unet import Architecture
from models.zoo import ZOO, Entry
from orchestrator import storage
from orchestrator.weights.network import load_network
from orchestrator.weights.published import encode_state_dict, released_entry
from tests.orchestrator.networks import CLASSES, CLASSIFIER, UNET

COSINE = DiffusionConfig(schedule="cosine")


@pytest.fixture(autouse=True)
def _tiny_models_in_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ZOO, "tiny", Entry("tiny.pt", UNET, COSINE))
    monkeypatch.setitem(ZOO, "tiny-classifier", Entry("tiny_classifier.pt", CLASSIFIER, COSINE))


def random_weights(architecture: Architecture = UNET) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn_like(tensor) for key, tensor in architecture.build().state_dict().items()}


def saved_bytes(value: object, *, as_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "saved from DDP"])
def test_a_released_file_loads_by_its_name(tmp_path: Path, dtype: torch.dtype, as_zip: bool, prefix: str) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in random_weights().items()}
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    (tmp_path / "tiny.pt").write_bytes(saved_bytes(stored, as_zip=as_zip))
    network = load_network(str(tmp_path / "tiny.pt"))
    assert network.architecture == UNET and network.diffusion == COSINE and network.classes == CLASSES
    assert not network.module.training
    for name, tensor in network.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].double().float()), f"{name} was not widened exactly"


@pytest.mark.parametrize("name", ["tiny", "tiny-classifier"])
def test_a_released_model_with_other_classes_has_those_of_the_file(tmp_path: Path, name: str) -> None:
    architecture = ZOO[name].network.model_copy(update={"num_classes": 5})
    torch.save(random_weights(architecture), tmp_path / "tuned.pt")
    network = load_network(str(tmp_path / "tuned.pt"), recipe=name)
    assert network.architecture == architecture and network.classes == CLASSES[:5]


def test_another_file_name_needs_a_recipe(tmp_path: Path) -> None:
    uri = str(tmp_path / "ema_0.9999_540000.pt")
    storage.write_bytes(uri, saved_bytes(random_weights()))
    with pytest.raises(ValueError, match=r"ema_0.9999_540000.pt.*--flags.*--model.*--recipe.*adm-64.*tiny"):
        load_network(uri)
    assert load_network(uri, recipe="tiny").architecture == UNET
    with pytest.raises(ValueError, match="no released model 'huge'"):
        load_network(uri, recipe="huge")
    with pytest.raises(ValueError, match="contains its architecture"):
        load_network(str(tmp_path / "run"), recipe="tiny")


def test_every_released_file_is_known_by_its_name() -> None:
    for entry in ZOO.values():
        if entry.checkpoint:
            assert released_entry(f"s3://bucket/{entry.checkpoint}").network == entry.network


class Code:
    """An object whose pickle calls a shell."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "older format"])
def test_code_in_the_pickle_is_refused_and_not_run(tmp_path: Path, as_zip: bool) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "tiny.pt").write_bytes(saved_bytes({**random_weights(), "evil": Code(marker)}, as_zip=as_zip))
    with pytest.raises(ValueError, match=r"tiny\.pt .* its pickle imports posix\.system"):
        load_network(str(tmp_path / "tiny.pt"))
    assert not marker.exists()


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "older format"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, as_zip: bool) -> None:
    data, uri = saved_bytes({"a": torch.randn(8, 8), "b": torch.zeros(3)}, as_zip=as_zip), tmp_path / "tiny.pt"
    for length in [*range(64), *range(64, len(data), 31), len(data) - 1]:
        uri.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"tiny\.pt is not a file of tensors .* damaged$"):
            load_network(str(uri))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, r"not a flat dictionary of tensors.*\['state_dict'\]"),
        (torch.optim.AdamW([torch.zeros(2)]).state_dict(), r"optimizer.*opt\*\.pt"),
        ({"step": 7}, "'step' is a int"),
    ],
)
def test_anything_but_a_flat_state_dict_is_refused(tmp_path: Path, value: object, expected: str) -> None:
    (tmp_path / "tiny.pt").write_bytes(saved_bytes(value))
    with pytest.raises(ValueError, match=expected):
        load_network(str(tmp_path / "tiny.pt"))


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("out.2.bias", None, r"out\.2\.bias: missing / \(6,\)"),
        ("new.weight", torch.zeros(2), r"new\.weight: \(2,\) / missing"),
        ("out.2.bias", torch.zeros(5), r"out\.2\.bias: \(5,\) / \(6,\)"),
        ("out.2.bias", torch.zeros(6).double(), r"tensor out\.2\.bias is torch\.float64 .*float32 or float16"),
        ("out.2.bias", torch.zeros(6, dtype=torch.int64), r"tensor out\.2\.bias is torch\.int64"),
        ("out.2.bias", torch.zeros(6, device="meta"), r"tensor out\.2\.bias is torch\.float32 on meta"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, name: str, tensor: Tensor | None, expected: str) -> None:
    weights = random_weights()
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    (tmp_path / "tiny.pt").write_bytes(saved_bytes(weights))
    with pytest.raises(ValueError, match=expected):
        load_network(str(tmp_path / "tiny.pt"))


def test_a_network_that_the_published_code_cannot_express_is_not_written() -> None:
    architecture = UNET.model_copy(update={"rescale_residual": True})
    with pytest.raises(ValueError, match="rescale_residual=True"):
        encode_state_dict(random_weights(architecture), architecture)


def test_a_view_is_written_without_the_rest_of_its_storage() -> None:
    weights = {"a": torch.randn(1_000_000)[:10]}
    data = encode_state_dict(weights, UNET)
    assert len(data) < 10_000
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=True)["a"], weights["a"])
