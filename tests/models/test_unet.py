"""Networks: options, both attention layouts, precision and gradients. tests/reference.py tests golden values."""

import math
from typing import Any, TypeVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.unet import (
    ClassifierConfig,
    GroupNorm,
    NoisyClassifier,
    ResBlock,
    UNet,
    UNetConfig,
    attend,
    timestep_embedding,
)

N = TypeVar("N", bound=torch.nn.Module)

TINY: dict[str, Any] = {
    "image_size": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (8,),
    "num_heads": 2,
}


def tiny(**changes: Any) -> UNet:
    """Return a small U-Net with no zero tensor, so that every part of it matters."""
    torch.manual_seed(0)
    return add_noise(UNetConfig(**{**TINY, "num_classes": 5, **changes}).build())


def tiny_classifier(**changes: Any) -> NoisyClassifier:
    torch.manual_seed(0)
    config = ClassifierConfig(**{**TINY, "num_head_channels": 16, "num_classes": 5, **changes})
    return add_noise(config.build())


def add_noise(network: N) -> N:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 16, generator=generator)
    return x, torch.tensor([0, 500, 999][:batch]), torch.tensor([0, 3, 4][:batch])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_channels", 48, "multiples of 32"),
        ("image_size", 15, "cannot be halved"),
        ("attention_resolutions", (4,), "feature maps have the sizes"),
        ("num_heads", 5, "num_heads=5 does not divide"),
        ("num_heads_upsample", 3, "num_heads_upsample=3"),
        ("channel_mult", (), "channel_mult"),
        ("num_layers", 2, "num_layers"),
    ],
)
def test_impossible_configs_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**{**TINY, field: value})


def test_attention_pool_needs_head_channels() -> None:
    with pytest.raises(ValidationError, match="num_head_channels"):
        ClassifierConfig(**TINY, pool="attention")


@pytest.mark.parametrize(
    "switch",
    [
        {"use_scale_shift_norm": False, "channel_mult": (2, 2)},
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"use_new_attention_order": True},
        {"num_head_channels": 16},
        {"num_heads_upsample": 4},
        {"rescale_residual": True},
        {"gradient_checkpointing": True},
        {"num_res_blocks": 2, "attention_resolutions": (16, 8)},
        {"out_channels": 3},
        {"num_classes": None},
    ],
    ids=lambda switch: "-".join(switch),
)
def test_every_switch_gives_a_network_whose_parameters_all_matter(switch: dict[str, Any]) -> None:
    network = tiny(**switch)
    x, t, y = inputs()
    out = network(x, t, y if network.config.num_classes else None)
    assert out.shape == (3, network.config.out_channels, 16, 16)
    out.square().sum().backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_every_pool_gives_logits(pool: str) -> None:
    classifier = tiny_classifier(pool=pool)
    x, t, _ = inputs()
    logits = classifier(x, t)
    assert logits.shape == (3, 5)
    assert logits.std(dim=0).min() > 0, "logits do not depend on the image"


def test_a_fresh_network_predicts_zero() -> None:
    x, t, y = inputs()
    assert UNetConfig(**TINY, num_classes=5).build()(x, t, y).abs().max() == 0


def test_fresh_residual_branches_add_nothing_and_rescaling_divides_by_root_two() -> None:
    x, emb = torch.randn(2, 32, 16, 16), torch.randn(2, 128)
    for rescale, factor in ((False, 1.0), (True, math.sqrt(0.5))):
        block = ResBlock(UNetConfig(**TINY, rescale_residual=rescale), 32, 32)
        torch.testing.assert_close(block(x, emb), x * factor)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_the_softmax_formula_in_its_layout(new_order: bool) -> None:
    batch, length, heads, width = 2, 5, 3, 4
    qkv = torch.randn(batch, length, 3 * heads * width)
    packed = qkv.view(batch, length, *((3, heads) if new_order else (heads, 3)), width)
    expected = torch.empty(batch, length, heads, width)
    for head in range(heads):
        q, k, v = (packed[:, :, i, head] if new_order else packed[:, :, head, i] for i in range(3))
        expected[:, :, head] = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width), dim=-1) @ v
    torch.testing.assert_close(attend(qkv, heads, new_order), expected.flatten(2))
    assert not torch.allclose(attend(qkv, heads, not new_order), expected.flatten(2))


def test_timestep_embedding_has_cosines_first_and_takes_fractions() -> None:
    embedding = timestep_embedding(torch.tensor([0.0, 2.5]), 5)
    assert embedding[0].tolist() == [1, 1, 0, 0, 0]
    angles = [2.5, 2.5 * 10000**-0.5]
    expected = [*(math.cos(a) for a in angles), *(math.sin(a) for a in angles), 0.0]
    torch.testing.assert_close(embedding[1], torch.tensor(expected))


def test_conditional_networks_need_labels_and_others_refuse_them() -> None:
    x, t, y = inputs()
    with pytest.raises(ValueError, match="num_classes=5"):
        tiny()(x, t)
    with pytest.raises(ValueError, match="num_classes=None"):
        tiny(num_classes=None)(x, t, y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing_dropout_included(dropout: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = tiny(dropout=dropout, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(5)
        out = network(*inputs())
        out.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_image_gradient_needs_no_parameter_gradients(checkpointing: bool) -> None:
    x, t, _ = inputs()
    gradients = []
    for frozen in (False, True):
        classifier = tiny_classifier(gradient_checkpointing=checkpointing).requires_grad_(not frozen)
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(classifier(image, t).log_softmax(1)[:, 0].sum(), image)[0])
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32_and_returns_float32(dtype: torch.dtype) -> None:
    network = tiny()
    with torch.no_grad():
        exact = network(*inputs())
        with torch.autocast("cpu", dtype=dtype):
            rough = network(*inputs())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.03 * exact.abs().max()


def test_normalisation_is_computed_in_float32() -> None:
    norm = GroupNorm(32)
    x = (300 + torch.randn(2, 32, 16, 16)).bfloat16()  # squares of 300 have no bits left for a variance of 1
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), norm(x.float()), atol=0.05, rtol=0.02)


def test_memory_format_and_batch_do_not_change_the_output() -> None:
    network = tiny()
    x, t, y = inputs()
    with torch.no_grad():
        out = network(x, t, y)
        torch.testing.assert_close(network(x[1:2], t[1:2], y[1:2]), out[1:2])
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last), t, y), out)


def test_a_time_embedding_replaces_the_timesteps() -> None:
    network, classifier = tiny(), tiny_classifier()
    x, t, y = inputs()
    unused = torch.full_like(t, -1)
    with torch.no_grad():
        emb = network.embed_timesteps(t)
        assert torch.equal(network(x, unused, y, time_embedding=emb), network(x, t, y))
        emb = classifier.embed_timesteps(t)
        assert torch.equal(classifier(x, unused, time_embedding=emb), classifier(x, t))


def test_super_resolution_depends_on_the_low_res_image() -> None:
    network = tiny(low_res_size=4)
    x, t, y = inputs()
    with torch.no_grad():
        black, white = (network(x, t, y, low_res=torch.full((3, 3, 4, 4), v)) for v in (-1.0, 1.0))
    assert (black - white).abs().max() > 1e-3
    with pytest.raises(ValueError, match="low_res_size=4"):
        network(x, t, y)
    with pytest.raises(ValueError, match="low_res_size=None"):
        tiny()(x, t, y, low_res=torch.zeros(3, 3, 4, 4))
