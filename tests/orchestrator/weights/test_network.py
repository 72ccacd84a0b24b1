"""Weights files contain their architecture; other files are refused with their name."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.diffusion import DiffusionConfig
from models.unet import UNetConfig
from orchestrator import storage
from orchestrator.weights.network import latest_weights, load_network, save_weights

TINY = UNetConfig(
    image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=3
)


def test_saved_weights_load_with_their_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, uri = TINY.build(), str(tmp_path / "weights" / "images-64-ema.safetensors")
    save_weights(uri, module.state_dict(), TINY, DiffusionConfig(schedule="cosine"), ("a", "b", "c"))
    assert latest_weights(str(tmp_path)) == "images-64-ema.safetensors"
    network = load_network(str(tmp_path))
    assert (
        network.architecture == TINY and network.diffusion.schedule == "cosine" and network.classes == ("a", "b", "c")
    )
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, network.module.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("out.2.bias", None, r"missing / \(6,\)"),
        ("new", torch.zeros(2), r"\(2,\) / missing"),
        ("out.2.bias", torch.zeros(5), r"\(5,\) / \(6,\)"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, name: str, tensor: torch.Tensor | None, expected: str) -> None:
    weights, uri = dict(TINY.build().state_dict()), str(tmp_path / "w.safetensors")
    weights.pop(name, None)
    save_weights(uri, weights if tensor is None else weights | {name: tensor}, TINY, DiffusionConfig(), ())
    with pytest.raises(ValueError, match=f"{name}: {expected}"):
        load_network(uri)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    uri = tmp_path / "w.safetensors"
    save_weights(str(uri), dict(TINY.build().state_dict()), TINY, DiffusionConfig(), ())
    data = uri.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        uri.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"w\.safetensors is not a weights file of Admiral"):
            load_network(str(uri))


def test_a_file_without_architecture_or_of_another_format_is_refused(tmp_path: Path) -> None:
    uri = tmp_path / "w.safetensors"
    uri.write_bytes(safetensors.torch.save(dict(TINY.build().state_dict())))
    with pytest.raises(ValueError, match="its header has no 'admiral'"):
        load_network(str(uri))
    uri.write_bytes(safetensors.torch.save({}, metadata={"admiral": '{"format_version": 99}'}))
    with pytest.raises(ValueError, match="format_version=99"):
        load_network(str(uri))


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "w.safetensors")
    storage.write_bytes(uri, b"not safetensors at all")
    with pytest.raises(ValueError, match="is not a weights file"):
        load_network(uri)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_network(str(tmp_path / "empty"))
