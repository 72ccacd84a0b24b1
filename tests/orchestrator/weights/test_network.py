"""Weights files contain their architecture; other files are refused with their name."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.diffusion import DiffusionConfig
from orchestrator.weights.network import load_network, save_weights, weights_about, weights_file
from tests.orchestrator.networks import UNET, save_network


def test_saved_weights_load_with_their_architecture(tmp_path: Path) -> None:
    weights, uri = UNET.build().state_dict(), str(tmp_path / "weights" / "images-64-ema.safetensors")
    save_weights(uri, weights, UNET, DiffusionConfig(schedule="cosine"), ("a", "b", "c"))
    network = load_network(str(tmp_path))
    assert network.architecture == UNET and network.diffusion.schedule == "cosine"
    assert network.classes == ("a", "b", "c")
    for name, tensor in weights.items():
        assert torch.equal(tensor, network.module.state_dict()[name])


@pytest.mark.parametrize(
    ("kind", "at", "expected"),
    [
        (None, None, "images-000000001024-raw"),
        ("ema-0.99", None, "images-000000001024-ema-0.99"),
        ("ema-0.9999", "512", "images-000000000512-ema-0.9999"),
        ("ema-0.99", "512", "images-000000000512-ema-0.99"),  # not ema-0.9999, which has the same prefix
        (None, "512", "images-000000000512-raw"),
    ],
)
def test_a_snapshot_is_found_by_its_average_and_its_number_of_images(
    tmp_path: Path, kind: str | None, at: str | None, expected: str
) -> None:
    for images in (512, 1024):
        for average in ("ema-0.99", "ema-0.9999", "raw"):
            (tmp_path / "weights").mkdir(exist_ok=True)
            (tmp_path / "weights" / f"images-{images:012d}-{average}.safetensors").touch()
    (tmp_path / "weights" / "mine.safetensors").touch()  # a user's own file is no snapshot
    assert weights_file("run", lambda _: str(tmp_path), None, kind, at) == f"run/weights/{expected}.safetensors"
    with pytest.raises(ValueError, match=r"no weights 'ema-0\.5'; it has ema-0\.99, ema-0\.9999, raw"):
        weights_file(str(tmp_path), str, kind="ema-0.5")
    with pytest.raises(ValueError, match=r"--at 51: .* 512, 1024 images"):
        weights_file(str(tmp_path), str, at="51")


def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path) -> None:
    uri = tmp_path / "w.safetensors"
    save_network(str(tmp_path), "w.safetensors", UNET)
    data = uri.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        uri.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"w\.safetensors is not a weights file of Admiral"):
            load_network(str(uri))
    for content in (b"not safetensors at all", b"", b"version https://git-lfs.github.com/spec/v1\n"):
        uri.write_bytes(content)
        for read in (load_network, weights_about):
            with pytest.raises(ValueError, match="is not a weights file"):
                read(str(uri))
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_network(str(tmp_path / "empty"))


def test_a_file_without_architecture_or_of_another_format_is_refused(tmp_path: Path) -> None:
    uri = tmp_path / "w.safetensors"
    uri.write_bytes(safetensors.torch.save(dict(UNET.build().state_dict())))
    with pytest.raises(ValueError, match="its header has no 'admiral'"):
        load_network(str(uri))
    uri.write_bytes(safetensors.torch.save({}, metadata={"admiral": '{"format_version": 99}'}))
    with pytest.raises(ValueError, match="format_version=99"):
        load_network(str(uri))
