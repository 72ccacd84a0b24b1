"""diffusers loads the written folders strictly and computes the same; other networks are refused by field."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the import below; prevents network access
from diffusers import UNet2DModel

from models.diffusion import DiffusionConfig
from models.unet import ClassifierConfig, UNetConfig
from models.zoo import ZOO
from orchestrator import storage
from orchestrator.weights.config import ConversionConfig
from orchestrator.weights.diffusers_folder import diffusers_config
from orchestrator.weights.job import convert
from orchestrator.weights.network import save_weights

ADM = UNetConfig(
    image_size=16,
    model_channels=64,  # at 32, groups of one channel would cancel additive embeddings
    num_res_blocks=2,
    channel_mult=(1, 2, 3),
    attention_resolutions=(8, 4),
    num_head_channels=32,
    num_classes=5,
    dropout=0.1,
)
PLAIN = {"resblock_updown": False, "num_head_channels": None}
EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "adm": {},
    "new attention order": {"use_new_attention_order": True},
    "unconditional": {"num_classes": None, "out_channels": 3},
    "coarsest without attention": {"attention_resolutions": (8,)},
    "attention everywhere": {"attention_resolutions": (16, 8, 4), "num_res_blocks": 1},
    "attention in the middle only": {"attention_resolutions": (), "num_res_blocks": 1},
    "one resolution": {"channel_mult": (1,), "attention_resolutions": (), "conv_resample": False},
    "broken multipliers": {"channel_mult": (1, 1.5, 2), "num_res_blocks": 1},
    "grey": {"in_channels": 1, "out_channels": 2},
    "ddpm": {**PLAIN, "num_heads": 1, "use_scale_shift_norm": False, "num_classes": None, "out_channels": 3},
    "iddpm": {**PLAIN, "num_heads": 4, "channel_mult": (1, 2, 2)},
    "biggan, additive": {"use_scale_shift_norm": False},
}
INEXPRESSIBLE: dict[str, dict[str, Any]] = {
    "low_res_size=4": {"low_res_size": 4},
    "rescale_residual=True": {"rescale_residual": True},
    "channel_mult=": {"channel_mult": (0.5, 1, 1)},
    "conv_resample=False": {"resblock_updown": False, "conv_resample": False},
    "num_heads=4": {"num_head_channels": None},
    "num_heads_upsample=2": {"num_head_channels": None, "channel_mult": (1, 2, 2), "num_heads_upsample": 2},
}


def adm_with(changes: dict[str, Any]) -> UNetConfig:
    return UNetConfig.model_validate(ADM.model_dump() | changes)


def random_weights(architecture: UNetConfig) -> dict[str, torch.Tensor]:
    """Return weights without zeros, which give outputs of order 1."""
    torch.manual_seed(0)
    return {key: value + 0.05 * torch.randn_like(value) for key, value in architecture.build().state_dict().items()}


@pytest.mark.parametrize("changes", EXPRESSIBLE.values(), ids=EXPRESSIBLE)
def test_diffusers_computes_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    architecture = adm_with(changes)
    weights = random_weights(architecture)
    save_weights(str(tmp_path / "w.safetensors"), weights, architecture, DiffusionConfig(), ())
    convert(ConversionConfig(store=str(tmp_path), weights="w.safetensors", output="folder", format="diffusers"))
    theirs, loading = UNet2DModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(loading.values()), loading
    ours = architecture.build().eval()
    ours.load_state_dict(weights)
    x = torch.randn(4, architecture.in_channels, 16, 16)
    t = torch.tensor([0, 1, 500, 999])
    y = None if architecture.num_classes is None else torch.tensor([0, 1, 2, 4])
    with torch.no_grad():
        expected, actual = ours(x, t, y), theirs(x, t, class_labels=y).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("field", INEXPRESSIBLE)
def test_what_diffusers_cannot_express_is_refused_by_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"cannot express.*{field}"):
        diffusers_config(adm_with(INEXPRESSIBLE[field]))


def test_a_refused_network_leaves_no_folder(tmp_path: Path) -> None:
    architecture = adm_with({"rescale_residual": True})
    save_weights(str(tmp_path / "w.safetensors"), random_weights(architecture), architecture, DiffusionConfig(), ())
    with pytest.raises(ValueError, match="rescale_residual"):
        convert(ConversionConfig(store=str(tmp_path), weights="w.safetensors", output="folder", format="diffusers"))
    assert not storage.exists(str(tmp_path / "folder"))


def test_diffusers_can_express_the_listed_released_models() -> None:
    expressible = set()
    for name, entry in ZOO.items():
        try:
            diffusers_config(entry.network)
        except ValueError as error:
            assert isinstance(entry.network, ClassifierConfig) or "UNet2DModel cannot express" in str(error)
        else:
            expressible.add(name)
    listed = {"adm-64", "adm-64-edm", "adm-256", "adm-256-uncond", "ddpm-cifar10", "ddpm-256"}
    listed |= {name for name in ZOO if name.startswith(("lsun-", "iddpm-lsun-", "iddpm-cifar10"))}
    assert expressible == listed
