"""Errors about tensors that do not fit: which tensors are listed, and which option explains the mismatch."""

import re
from typing import Any

import pytest
import torch

from models.unet import Architecture, ClassifierConfig, UNetConfig
from orchestrator.weights.shapes import (
    NUM_ROWS,
    describe_mismatch,
    invisible_settings,
    network_kind,
    num_classes_of,
    shapes_of,
)

UNET = UNetConfig(
    image_size=32,
    model_channels=64,
    num_res_blocks=2,
    channel_mult=(1, 2, 2),
    attention_resolutions=(16, 8),
    num_classes=7,
)
SHARED = UNET.model_dump(include=set(ClassifierConfig.model_fields))
CLASSIFIER = ClassifierConfig.model_validate(SHARED | {"num_head_channels": 32})
# change of the architecture in the file -> the option, its value in the file, its value here
UNET_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_channels": 96}, r"num_channels \(--model.model-channels\) is 96 in the file, 64 here"),
    ({"out_channels": 3}, r"learn_sigma \(--model.out-channels\) is 3 in the file, 6 here"),
    ({"num_classes": None}, r"class_cond \(--model.num-classes\) is None in the file, 7 here"),
    ({"num_classes": 9}, r"class_cond \(--model.num-classes\) is 9 in the file, 7 here"),
    ({"resblock_updown": False}, r"resblock_updown \(--model.resblock-updown\) is False in the file"),
    ({"use_scale_shift_norm": False}, r"use_scale_shift_norm .* is False in the file, True here"),
    ({"num_res_blocks": 3}, r"num_res_blocks \(--model.num-res-blocks\) is 3 in the file, 2 here"),
    ({"channel_mult": (1, 2, 2, 4)}, r"channel_mult.* is 1,2,2,4 in the file, 1,2,2 here"),
    ({"channel_mult": (0.5, 1, 3)}, r"channel_mult.* is 0.5,1,3 in the file, 1,2,2 here"),
    ({"attention_resolutions": (8,)}, r"attention_resolutions .* is 8 in the file, 16,8 here"),
    ({"attention_resolutions": (32, 16, 8)}, r"attention_resolutions .* is 32,16,8 in"),
    ({"attention_resolutions": ()}, r"attention_resolutions .* is empty in the file"),
    ({"low_res_size": 8}, r"large_size and small_size \(--model.low-res-size\) is set in the file, None"),
    ({"in_channels": 1}, r"\(--model.in-channels\) is 1 in the file, 3 here"),
]
CLASSIFIER_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_channels": 32}, r"classifier_width \(--model.model-channels\) is 32 in the file, 64 here"),
    ({"num_res_blocks": 4}, r"classifier_depth \(--model.num-res-blocks\) is 4 in the file, 2 here"),
    ({"pool": "spatial"}, r"classifier_pool \(--model.pool\) is spatial in the file, attention here"),
    ({"image_size": 64, "attention_resolutions": (32, 16)}, r"image_size .* is 64 in the file, 32 here"),
    ({"num_classes": 3}, r"\(--model.num-classes\) is 3 in the file, 7 here"),
]


def changed(architecture: Architecture, changes: dict[str, Any]) -> Architecture:
    return type(architecture).model_validate(architecture.model_dump() | changes)


def weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(architecture.build().state_dict())


def mismatch(in_file: Architecture, expected: Architecture) -> str:
    return describe_mismatch(weights(in_file), weights(expected), expected)


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [(UNET, *case) for case in UNET_CHANGES] + [(CLASSIFIER, *case) for case in CLASSIFIER_CHANGES],
)
def test_a_changed_option_is_named(architecture: Architecture, changes: dict[str, Any], expected: str) -> None:
    text = mismatch(changed(architecture, changes), architecture)
    assert re.search(expected, text)
    if architecture is UNET:
        assert text.endswith("This explains all mismatches.") and text.count(" in the file, ") == 1


def test_several_options_are_named_together() -> None:
    text = mismatch(changed(UNET, {"model_channels": 96, "num_classes": None, "num_res_blocks": 1}), UNET)
    for part in ("num_channels", "class_cond", "num_res_blocks", "explains all"):
        assert part in text


def test_few_tensors_are_listed_in_the_order_of_the_network() -> None:
    text = mismatch(changed(UNET, {"model_channels": 96}), UNET)
    rows = text.split("shape here: ")[1].split(". Closest")[0].split("; ")
    assert len(rows) == NUM_ROWS + 1 and rows[-1].endswith("more")
    assert rows[0] == "time_embed.0.weight: (384, 96) / (256, 64)"
    assert rows[4] == "input_blocks.0.0.weight: (96, 3, 3, 3) / (64, 3, 3, 3)"
    rows = mismatch(changed(UNET, {"resblock_updown": False}), UNET).split("; ")
    assert "input_blocks.3.0.in_layers.0.weight: missing / (64,)" in rows[0]


def test_equal_tensors_are_no_mismatch() -> None:
    assert mismatch(UNET, UNET) == ""
    assert mismatch(changed(UNET, {"num_heads": 2, "use_new_attention_order": True}), UNET) == ""


def test_another_kind_of_network_is_named() -> None:
    assert "holds a classifier, but a diffusion model is expected" in mismatch(CLASSIFIER, UNET)
    assert "holds a diffusion model, but a classifier is expected" in mismatch(UNET, CLASSIFIER)
    assert "No option explains" in describe_mismatch({"fc.weight": torch.zeros(2, 2)}, weights(UNET), UNET)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_kinds_and_classes_are_read_from_shapes(pool: str) -> None:
    shapes = shapes_of(weights(changed(CLASSIFIER, {"pool": pool})))
    assert network_kind(shapes) == "classifier" and num_classes_of(shapes) == 7
    shapes = shapes_of(weights(changed(UNET, {"num_classes": None, "low_res_size": 8})))
    assert network_kind(shapes) == "upsampler" and num_classes_of(shapes) is None
    assert network_kind({"fc.weight": (2, 2)}) is None


def test_settings_that_the_tensors_do_not_determine_are_listed() -> None:
    assert invisible_settings(UNET).keys() == {"image_size", "num_heads", "use_new_attention_order", "dropout"}
    assert invisible_settings(CLASSIFIER).keys() == {"num_head_channels", "use_new_attention_order", "dropout"}
    for field, value in invisible_settings(UNET).items():
        other = {"image_size": 64, "num_heads": 8, "use_new_attention_order": True, "dropout": 0.5}[field]
        changes = {field: other} | ({"attention_resolutions": (32, 16)} if field == "image_size" else {})
        assert value != other and mismatch(changed(UNET, changes), UNET) == ""
