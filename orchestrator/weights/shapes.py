"""What the names and shapes of tensors say about a network, and why they do not fit an architecture."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from models.unet import Architecture, ClassifierConfig

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["diffusion model", "upsampler", "classifier"]

_FIRST = "input_blocks.0.0.weight"
NUM_ROWS = 5  # mismatched tensors that a message lists
_POOLS = (  # a tensor, its number of dimensions, and the pool of the classifiers that have it
    ("out.2.c_proj.weight", 3, "attention"),
    ("out.3.weight", 4, "adaptive"),
    ("out.3.weight", 2, "spatial_v2"),
    ("out.2.weight", 2, "spatial"),
)
_FLAGS = {  # field -> the published flag, where it has another name
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
    "channel_mult": _FLAGS["channel_mult"],
    **{field: f"classifier_{field}" for field in ("attention_resolutions", "use_scale_shift_norm", "resblock_updown")},
    "pool": "classifier_pool",
}


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def network_kind(shapes: Shapes) -> Kind | None:
    """Return the kind of published network that has tensors of these names; None if there is none."""
    if _FIRST not in shapes:
        return None
    if not any(name.startswith("output_blocks.") for name in shapes):
        return "classifier"
    return "upsampler" if shapes[_FIRST][1:2] == (6,) else "diffusion model"  # x, and an RGB image to enlarge


def num_classes_of(shapes: Shapes) -> int | None:
    """Return the number of classes of a network with these tensors; None if it is not conditioned on classes."""
    names = ["label_emb.weight"]
    if network_kind(shapes) == "classifier":
        # pool=attention; pool=adaptive (a convolution) and spatial_v2; pool=spatial
        names = ["out.2.c_proj.weight", "out.3.weight", "out.2.weight"]
    return next((shapes[name][0] for name in names if name in shapes), None)


def with_classes_of(shapes: Shapes, architecture: Architecture) -> Architecture:
    """Return the architecture with the number of classes of these tensors, if they determine it."""
    number = num_classes_of(shapes)
    if number is None and isinstance(architecture, ClassifierConfig):
        return architecture
    return architecture.model_copy(update={"num_classes": number})


def describe_mismatch(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], architecture: Architecture) -> str:
    """Return which tensors differ in name or shape, and which options explain it; an empty string if none differs.

    found: the tensors of the file.
    expected: the tensors of `architecture`.
    """
    file_shapes, own_shapes = shapes_of(found), shapes_of(expected)
    names = _differing(file_shapes, own_shapes)
    if not names:
        return ""
    rows = [
        f"{name}: {file_shapes.get(name, 'missing')} / {own_shapes.get(name, 'missing')}" for name in names[:NUM_ROWS]
    ]
    rows += [f"and {len(names) - NUM_ROWS} more"] if len(names) > NUM_ROWS else []
    total = len(file_shapes.keys() | own_shapes.keys())
    return (
        f"{total - len(names)} of {total} tensors fit. Mismatched tensors, as name: shape in the file / shape here: "
        f"{'; '.join(rows)}. {_explanation(file_shapes, own_shapes, architecture)}"
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


def _differing(theirs: Shapes, ours: Shapes) -> list[str]:
    """Return the names of tensors that differ, in the order of the network."""
    return [name for name in dict.fromkeys([*ours, *theirs]) if theirs.get(name) != ours.get(name)]


def _explanation(file_shapes: Shapes, own_shapes: Shapes, architecture: Architecture) -> str:
    """Return the options that differ from the settings in the file, each with the value there and the one given."""
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
            remaining = len(_differing(file_shapes, shapes_of(inferred.build().state_dict())))
    except (LookupError, ValueError):  # tensors are missing, or there is no such network
        return unexplained
    changes = [
        _change(field, inferred, architecture) for field, value in inferred if value != getattr(architecture, field)
    ]
    if remaining >= len(_differing(file_shapes, own_shapes)):
        return unexplained
    rest = f"{remaining} mismatches remain." if remaining else "This explains all mismatches."
    return f"Closest explanation: {'; '.join(changes)}. {rest}"


def _change(field: str, inferred: Architecture, architecture: Architecture) -> str:
    flag = (_CLASSIFIER_FLAGS if architecture.kind == "classifier" else _FLAGS).get(field, field)
    in_file, given = getattr(inferred, field), getattr(architecture, field)
    if field == "low_res_size" and in_file:
        in_file = "set"  # the tensors do not determine its value
    return f"{flag} (--model.{field.replace('_', '-')}) is {_text(in_file)} in the file, {_text(given)} here"


def _text(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) or "empty" if isinstance(value, tuple) else str(value)


def _visible_settings(shapes: Shapes, architecture: Architecture) -> dict[str, Any]:
    """Return the fields that the tensors of a network of this kind determine. Raises LookupError if some are missing.

    What remains open, such as the image size of a diffusion model, is as in `architecture`.
    """
    unit, inputs = shapes["time_embed.0.weight"][1], shapes[_FIRST][1]
    depth, resampling = _depth(shapes, architecture)
    firsts = range(1, _last_block(shapes) + 1, depth + 1)  # the first block of each resolution
    widths = [_width(shapes, first) for first in firsts]
    settings: dict[str, Any] = {
        "model_channels": unit,
        "num_classes": num_classes_of(shapes),
        "num_res_blocks": depth,
        "channel_mult": tuple(width / unit for width in widths),
        "use_scale_shift_norm": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
        **resampling,
    }
    image_size = architecture.image_size
    if isinstance(architecture, ClassifierConfig):
        settings["in_channels"] = inputs
        pools = [pool for name, dims, pool in _POOLS if len(shapes.get(name, ())) == dims]
        settings["pool"] = pools[0]
        if positions := shapes.get("out.2.positional_embedding"):
            settings["image_size"] = image_size = math.isqrt(positions[1] - 1) << (len(widths) - 1)
    else:
        is_upsampler = inputs == 2 * architecture.in_channels
        settings["in_channels"] = inputs // 2 if is_upsampler else inputs
        settings["low_res_size"] = (architecture.low_res_size or max(image_size // 4, 1)) if is_upsampler else None
        settings["out_channels"] = shapes["out.2.weight"][0]
    settings["attention_resolutions"] = tuple(
        image_size >> level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in shapes
    )
    return settings


def _last_block(shapes: Shapes) -> int:
    return max(int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name)))


def _width(shapes: Shapes, block: int) -> int:
    return shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0]


def _depth(shapes: Shapes, architecture: Architecture) -> tuple[int, dict[str, bool]]:
    """Return the residual blocks per resolution, and the fields that say how the resolution changes.

    A convolution or a gap without tensors shows where the resolution changes. If residual blocks change it, the decoder
    has a second residual block there. A classifier has no decoder, but all blocks of a resolution have the same width;
    if several depths fit, those of `architecture` and of its number of resolutions come first.
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
    as_given = (architecture.num_res_blocks, (last + 1) // len(architecture.channel_mult) - 1)
    for depth in (depth for depth in (*as_given, *range(1, last + 1)) if depth > 0):
        levels = [set(widths[begin : begin + depth + 1]) for begin in range(0, last, depth + 1)]
        if (last + 1) % (depth + 1) == 0 and all(len(level) == 1 for level in levels):
            return depth, {"resblock_updown": True} if len(levels) > 1 else {}
    raise LookupError("the widths of the blocks fit no depth")
