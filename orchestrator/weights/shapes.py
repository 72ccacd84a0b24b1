"""Infer a network's settings from the names and shapes of its tensors, and explain why they do not fit another one."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from models.unet import Architecture, ClassifierConfig

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["diffusion model", "upsampler", "classifier"]

_FIRST_WEIGHT = "input_blocks.0.0.weight"
NUM_ROWS = 5  # most mismatched tensors that a message lists
_POOLS = (  # the tensor with the logits' weights, its number of dimensions, and the pool of the classifier
    ("out.2.c_proj.weight", 3, "attention"),
    ("out.3.weight", 4, "adaptive"),
    ("out.3.weight", 2, "spatial_v2"),
    ("out.2.weight", 2, "spatial"),
)
_UNET_FLAGS = {  # field -> the published flag, where it has another name
    "model_channels": "num_channels",
    "out_channels": "learn_sigma",
    "num_classes": "class_cond",
    "low_res_size": "large_size and small_size",
    "channel_mult": "channel_mult, or the image_size that sets it",
}
_CLASSIFIER_FLAGS = {
    "model_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "num_classes": "out_channels",
    "channel_mult": _UNET_FLAGS["channel_mult"],
    **{field: f"classifier_{field}" for field in ("attention_resolutions", "use_scale_shift_norm", "resblock_updown")},
    "pool": "classifier_pool",
}


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def network_kind(shapes: Shapes) -> Kind | None:
    """Return the kind of published network that has tensors of these names and shapes; None if there is none."""
    if _FIRST_WEIGHT not in shapes:
        return None
    if not any(name.startswith("output_blocks.") for name in shapes):
        return "classifier"
    return "upsampler" if shapes[_FIRST_WEIGHT][1:2] == (6,) else "diffusion model"  # x, and an RGB image to enlarge


def num_classes_of(shapes: Shapes) -> int | None:
    """Return the number of classes of a network with these tensors; None if it is not conditioned on classes."""
    names = ["label_emb.weight"]
    if network_kind(shapes) == "classifier":
        names = [name for name, _, _ in _POOLS]
    return next((shapes[name][0] for name in names if name in shapes), None)


def with_classes_of(shapes: Shapes, architecture: Architecture) -> Architecture:
    """Return the architecture with the number of classes of these tensors.

    A classifier keeps its number of classes if the tensors do not determine it. A diffusion model then has none.
    """
    num_classes = num_classes_of(shapes)
    if num_classes is None and isinstance(architecture, ClassifierConfig):
        return architecture
    return architecture.model_copy(update={"num_classes": num_classes})


def describe_mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], architecture: Architecture) -> str:
    """Return which tensors differ in name or shape, and which options explain it; an empty string if none differs.

    tensors: the tensors of the file.
    expected: the tensors of `architecture`.
    """
    file_shapes, expected_shapes = shapes_of(tensors), shapes_of(expected)
    names = _differing_names(file_shapes, expected_shapes)
    if not names:
        return ""
    rows = [
        f"{name}: {file_shapes.get(name, 'missing')} / {expected_shapes.get(name, 'missing')}"
        for name in names[:NUM_ROWS]
    ]
    rows += [f"and {len(names) - NUM_ROWS} more"] if len(names) > NUM_ROWS else []
    total = len(file_shapes.keys() | expected_shapes.keys())
    return (
        f"{total - len(names)} of {total} tensors fit. Mismatched tensors, as name: shape in the file / shape here: "
        f"{'; '.join(rows)}. {_explanation(file_shapes, expected_shapes, architecture)}"
    )


def invisible_settings(architecture: Architecture) -> dict[str, Any]:
    """Return the settings that change what a network computes, but not the name or shape of a tensor."""
    has_fixed_heads = bool(architecture.num_head_channels)
    invisible = {
        # the pool "attention" has an embedding for each position
        "image_size": not (isinstance(architecture, ClassifierConfig) and architecture.pool == "attention"),
        "low_res_size": bool(architecture.low_res_size),
        "num_head_channels": has_fixed_heads,
        "num_heads": not has_fixed_heads,
        "num_heads_upsample": not has_fixed_heads and bool(getattr(architecture, "num_heads_upsample", None)),
        "use_new_attention_order": True,
        "dropout": True,
    }
    return {field: getattr(architecture, field) for field, is_invisible in invisible.items() if is_invisible}


def _differing_names(file_shapes: Shapes, expected_shapes: Shapes) -> list[str]:
    """Return the names of tensors that differ, in the order of the expected network."""
    names = dict.fromkeys([*expected_shapes, *file_shapes])
    return [name for name in names if file_shapes.get(name) != expected_shapes.get(name)]


def _explanation(file_shapes: Shapes, expected_shapes: Shapes, architecture: Architecture) -> str:
    """Return a sentence with the options that differ from the settings in the file, if these explain the mismatch."""
    unexplained = "No option explains this: the file holds another kind of network, or was modified."
    kind = network_kind(file_shapes)
    if kind is None:
        return unexplained
    if (kind == "classifier") != (architecture.kind == "classifier"):
        expected = "a classifier" if architecture.kind == "classifier" else "a diffusion model"
        return f"The file holds {'an' if kind == 'upsampler' else 'a'} {kind}, but {expected} is expected."
    try:
        inferred = type(architecture).model_validate(
            architecture.model_dump() | _visible_settings(file_shapes, architecture)
        )
        with torch.device("meta"):
            remaining = len(_differing_names(file_shapes, shapes_of(inferred.build().state_dict())))
    except (LookupError, ValueError):  # tensors are missing, or no network has these settings
        return unexplained
    if remaining >= len(_differing_names(file_shapes, expected_shapes)):
        return unexplained
    changed = [field for field, value in inferred if value != getattr(architecture, field)]
    changes = "; ".join(_describe_change(field, inferred, architecture) for field in changed)
    rest = f"{remaining} mismatches remain." if remaining else "This explains all mismatches."
    return f"Closest explanation: {changes}. {rest}"


def _describe_change(field: str, inferred: Architecture, architecture: Architecture) -> str:
    """Return the published flag and our option for a field, with the value in the file and the value given."""
    flag = (_CLASSIFIER_FLAGS if architecture.kind == "classifier" else _UNET_FLAGS).get(field, field)
    in_file, given = getattr(inferred, field), getattr(architecture, field)
    if field == "low_res_size" and in_file:
        in_file = "set"  # the tensors do not determine its value
    option = f"--model.{field.replace('_', '-')}"
    return f"{flag} ({option}) is {_format_value(in_file)} in the file, {_format_value(given)} here"


def _format_value(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) or "empty" if isinstance(value, tuple) else str(value)


def _visible_settings(shapes: Shapes, architecture: Architecture) -> dict[str, Any]:
    """Return the fields that the tensors of a network of this kind determine. Raise LookupError if tensors are missing.

    Where a field depends on a setting that they do not determine, such as the image size, use that of `architecture`.
    """
    model_channels, in_channels = shapes["time_embed.0.weight"][1], shapes[_FIRST_WEIGHT][1]
    depth, resampling = _depth(shapes, architecture)
    first_blocks = range(1, _last_block(shapes) + 1, depth + 1)  # the first block of each resolution
    widths = [_width(shapes, block) for block in first_blocks]
    settings: dict[str, Any] = {
        "model_channels": model_channels,
        "num_classes": num_classes_of(shapes),
        "num_res_blocks": depth,
        "channel_mult": tuple(width / model_channels for width in widths),
        "use_scale_shift_norm": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        **resampling,
    }
    image_size = architecture.image_size
    if isinstance(architecture, ClassifierConfig):
        settings["in_channels"] = in_channels
        pools = [pool for name, dims, pool in _POOLS if len(shapes.get(name, ())) == dims]
        settings["pool"] = pools[0]
        if positions := shapes.get("out.2.positional_embedding"):  # [C, 1 + height * width of the last feature map]
            image_size = math.isqrt(positions[1] - 1) << (len(widths) - 1)
            settings["image_size"] = image_size
    else:
        is_upsampler = in_channels == 2 * architecture.in_channels
        settings["in_channels"] = in_channels // 2 if is_upsampler else in_channels
        settings["low_res_size"] = (architecture.low_res_size or max(image_size // 4, 1)) if is_upsampler else None
        settings["out_channels"] = shapes["out.2.weight"][0]
    settings["attention_resolutions"] = tuple(
        image_size >> level
        for level, block in enumerate(first_blocks)
        if f"input_blocks.{block}.1.qkv.weight" in shapes
    )
    return settings


def _last_block(shapes: Shapes) -> int:
    """Return the number of the last of the input_blocks."""
    matches = (re.match(r"input_blocks\.(\d+)\.", name) for name in shapes)
    return max(int(match[1]) for match in matches if match)


def _width(shapes: Shapes, block: int) -> int:
    """Return the output channels of a residual block."""
    return shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0]


def _depth(shapes: Shapes, architecture: Architecture) -> tuple[int, dict[str, bool]]:
    """Return the residual blocks per resolution, and the fields that say how the resolution changes.

    A block with a convolution or without tensors shows where the resolution changes. If residual blocks change it, the
    decoder has a second residual block there. A classifier has no decoder, but all blocks of a resolution have the same
    width. If several depths fit, prefer that of `architecture`, then the one that gives its number of resolutions.
    """
    last = _last_block(shapes)
    for block in range(1, last):
        is_convolution = f"input_blocks.{block}.0.op.weight" in shapes
        if is_convolution or f"input_blocks.{block}.0.out_layers.3.weight" not in shapes:
            return block - 1, {"resblock_updown": False, "conv_resample": is_convolution}
    for depth in range(1, last + 1):
        if any(f"output_blocks.{depth}.{part}.in_layers.0.weight" in shapes for part in (1, 2)):
            return depth, {"resblock_updown": True}
    widths = [_width(shapes, block) for block in range(1, last + 1)]
    preferred = (architecture.num_res_blocks, (last + 1) // len(architecture.channel_mult) - 1)
    for depth in (*preferred, *range(1, last + 1)):
        if depth < 1 or (last + 1) % (depth + 1):
            continue
        levels = [set(widths[begin : begin + depth + 1]) for begin in range(0, last, depth + 1)]
        if all(len(level) == 1 for level in levels):
            return depth, {"resblock_updown": True} if len(levels) > 1 else {}
    raise LookupError("the widths of the blocks fit no depth")
