"""What the names and shapes of tensors say about a network, and why they do not fit an architecture."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from models.unet import Architecture, ClassifierConfig
from models.zoo import MULT_64, MULT_128, MULT_256, MULT_512

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["diffusion model", "upsampler", "classifier"]

_FIRST = "input_blocks.0.0.weight"
NUM_ROWS = 5  # mismatched tensors that a message lists
MAX_CHANGES = 4  # options in an explanation
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
    there, here = shapes_of(found), shapes_of(expected)
    names = _differing(there, here)
    if not names:
        return ""
    rows = [f"{name}: {there.get(name, 'missing')} / {here.get(name, 'missing')}" for name in names[:NUM_ROWS]]
    rows += [f"and {len(names) - NUM_ROWS} more"] if len(names) > NUM_ROWS else []
    total = len(there.keys() | here.keys())
    return (
        f"{total - len(names)} of {total} tensors fit. Mismatched tensors, as name: shape in the file / shape here: "
        f"{'; '.join(rows)}. {_explanation(there, here, architecture)}"
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


def _differing(there: Shapes, here: Shapes) -> list[str]:
    """Return the names of tensors that differ, in the order of the network."""
    return [name for name in dict.fromkeys([*here, *there]) if there.get(name) != here.get(name)]


def _explanation(there: Shapes, here: Shapes, architecture: Architecture) -> str:
    """Return the options that explain the most mismatches, each with the value in the file and the one given."""
    unexplained = "No option explains this: the file holds another kind of network, or was modified."
    kind = network_kind(there)
    if kind is None:
        return unexplained
    if (kind == "classifier") != (architecture.kind == "classifier"):
        expected = "a classifier" if architecture.kind == "classifier" else "a diffusion model"
        return f"The file holds {'an' if kind == 'upsampler' else 'a'} {kind}, but {expected} is expected."
    changed, left, changes = architecture, len(_differing(there, here)), list[str]()
    while left and len(changes) < MAX_CHANGES:
        tried = [(len(_differing(there, _shapes(other))), field, other) for field, other in _neighbours(changed, there)]
        fewest, field, other = min(tried, key=lambda row: row[0], default=(left, "", changed))
        if fewest >= left:
            break
        changes.append(_change(field, other, changed))
        changed, left = other, fewest
    if not changes:
        return unexplained
    rest = f"{left} mismatches remain." if left else "This explains all mismatches."
    return f"Closest explanation: {'; '.join(changes)}. {rest}"


@lru_cache(maxsize=256)
def _shapes(architecture: Architecture) -> Shapes:
    """Return the shapes of a network's tensors without allocating memory for them."""
    with torch.device("meta"):
        return shapes_of(architecture.build().state_dict())


def _change(field: str, other: Architecture, architecture: Architecture) -> str:
    flag = (_CLASSIFIER_FLAGS if architecture.kind == "classifier" else _FLAGS).get(field, field)
    there, here = getattr(other, field), getattr(architecture, field)
    if field == "low_res_size" and there:
        there = "set"  # the tensors do not determine its value
    return f"{flag} (--model.{field.replace('_', '-')}) is {_text(there)} in the file, {_text(here)} here"


def _text(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) or "empty" if isinstance(value, tuple) else str(value)


def _neighbours(architecture: Architecture, there: Shapes) -> Iterator[tuple[str, Architecture]]:
    """Yield architectures that differ in one field, with the name of the field."""
    for field, value in _candidates(architecture, there):
        changes: dict[str, Any] = {field: value}
        if field not in type(architecture).model_fields or getattr(architecture, field) == value:
            continue
        if field == "channel_mult":  # only feature maps that exist may have attention
            sizes = [architecture.image_size >> level for level in range(len(value))]
            kept = tuple(size for size in architecture.attention_resolutions if size in sizes)
            changes["attention_resolutions"] = kept
        elif field == "image_size":  # keep attention at the same levels
            levels = [architecture.sizes.index(size) for size in architecture.attention_resolutions]
            changes["attention_resolutions"] = tuple(value >> level for level in levels)
        try:
            yield field, type(architecture).model_validate(architecture.model_dump() | changes)
        except ValueError:  # not a valid network
            continue


def _candidates(architecture: Architecture, there: Shapes) -> Iterator[tuple[str, Any]]:
    """Yield fields and values to try: the value that the tensors determine, or all common ones."""
    width = there.get("time_embed.0.weight", ())[1:]
    yield from (("model_channels", value) for value in width)
    yield "num_classes", num_classes_of(there)
    for inputs in there.get(_FIRST, ())[1:2]:
        if architecture.low_res_size:
            yield "low_res_size", None
            inputs //= 2
        elif inputs == 2 * architecture.in_channels:
            yield "low_res_size", max(architecture.image_size // 4, 1)
        yield "in_channels", inputs
    yield from (("out_channels", value) for value in there.get("out.2.weight", ())[:1])
    for field in ("use_scale_shift_norm", "resblock_updown", "conv_resample"):
        yield field, not getattr(architecture, field)
    yield from (("num_res_blocks", value) for value in range(1, 7))
    yield from _levels(architecture, there)
    yield from (("channel_mult", value) for value in (MULT_64, (1, 2, 2, 2), MULT_128, MULT_256, MULT_512))
    yield from (("pool", value) for value in ("attention", "adaptive", "spatial", "spatial_v2"))
    for positions in there.get("out.2.positional_embedding", ())[1:]:
        yield "image_size", math.isqrt(positions - 1) << (len(architecture.channel_mult) - 1)


def _levels(architecture: Architecture, there: Shapes) -> Iterator[tuple[str, Any]]:
    """Yield the file's channel_mult and attention_resolutions, if it has this many blocks per resolution."""
    blocks = [int(match[1]) for name in there if (match := re.match(r"input_blocks\.(\d+)\.", name))]
    stride = architecture.num_res_blocks + 1
    firsts = range(1, max(blocks, default=0) + 1, stride)
    widths = [there.get(f"input_blocks.{first}.0.out_layers.3.weight", ())[:1] for first in firsts]
    if all(widths):
        unit = (there.get("time_embed.0.weight", ())[1:] or (architecture.model_channels,))[0]
        yield "channel_mult", tuple(width / unit for (width,) in widths)
    sizes = enumerate(architecture.sizes[: len(firsts)])
    yield (
        "attention_resolutions",
        tuple(size for level, size in sizes if f"input_blocks.{firsts[level]}.1.qkv.weight" in there),
    )
