"""Networks in the format of the diffusers library: config.json and tensors of a `UNet2DModel` folder.

The format is public (checked against version 0.42), so diffusers is not imported. A network that it cannot express is
an error that names the field. The folder holds only the network: code that uses it must pass the timesteps of
`Diffusion.model_timesteps`, and split the output into mean and variance.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from models.unet import NORM_GROUPS, Architecture, UNetConfig

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# Our name of a layer -> its name in diffusers: layers outside of blocks, and layers within a block.
_OUTER_LAYERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_INNER_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "op": "conv",
    "conv": "conv",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}


def diffusers_config(architecture: Architecture) -> dict[str, Any]:
    """Return the config.json of the `UNet2DModel` that is equivalent to this architecture.

    Raises:
        ValueError: no UNet2DModel is equivalent; the message names the field.
    """
    if architecture.kind == "classifier":
        raise ValueError("--format diffusers cannot express a classifier; UNet2DModel is a diffusion model")
    _refuse_inexpressible(architecture)
    has_attention = [size in architecture.attention_resolutions for size in architecture.sizes]
    resample, plain_down, plain_up = "conv", "DownBlock2D", "UpBlock2D"
    if architecture.resblock_updown:
        resample, plain_down, plain_up = "resnet", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    return {
        "_class_name": "UNet2DModel",
        "sample_size": architecture.image_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.out_channels,
        "time_embedding_type": "positional",
        "freq_shift": 0,  # frequencies fall from 1 towards 1 / 10,000, exclusive
        "flip_sin_to_cos": True,  # cosines first
        "block_out_channels": list(architecture.widths),
        "layers_per_block": architecture.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if attends else plain_down for attends in has_attention],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnUpBlock2D" if attends else plain_up for attends in reversed(has_attention)],
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 1,
        "dropout": architecture.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_channels(architecture),
        "norm_num_groups": NORM_GROUPS,
        "attn_norm_num_groups": NORM_GROUPS,  # without it, attention in the middle block has no norm with AdaGN
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if architecture.use_scale_shift_norm else "default",
        "add_attention": True,
        "class_embed_type": None,  # a table of embeddings
        "num_class_embeds": architecture.label_rows or None,
    }


def diffusers_tensors(architecture: Architecture, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under their names in diffusers, with q, k and v in separate tensors."""
    assert architecture.kind == "unet", "diffusers_config has refused a classifier"
    blocks = dict(_blocks(architecture))
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, kind = name.rsplit(".", 1)  # weight or bias
        if layer in _OUTER_LAYERS:
            tensors[f"{_OUTER_LAYERS[layer]}.{kind}"] = tensor
            continue
        match = re.fullmatch(r"(middle_block\.\d+|(?:in|out)put_blocks\.\d+\.\d+)\.(.+)", layer)
        assert match, name
        block, inner = blocks[match[1]], match[2]
        if inner == "qkv":
            for projection, part in zip("qkv", _split_qkv(architecture, tensor), strict=True):
                tensors[f"{block}.to_{projection}.{kind}"] = part
        else:
            is_pointwise = tensor.ndim == 3  # a 1x1 convolution, which is a linear layer in diffusers
            tensors[f"{block}.{_INNER_LAYERS[inner]}.{kind}"] = tensor.squeeze(-1) if is_pointwise else tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _refuse_inexpressible(architecture: UNetConfig) -> None:
    """Raise a ValueError that names the field, if UNet2DModel has no equivalent of it."""
    reason = None
    if architecture.low_res_size is not None:
        reason = f"low_res_size={architecture.low_res_size}: it has no second input image"
    elif architecture.rescale_residual:
        reason = "rescale_residual=True: only its middle block can scale residual sums"
    elif architecture.widths[0] != architecture.model_channels:
        reason = f"channel_mult={architecture.channel_mult}: its time embedding is as wide as the first resolution"
    elif not (architecture.resblock_updown or architecture.conv_resample) and len(architecture.channel_mult) > 1:
        reason = "conv_resample=False: its upsampling and downsampling always have a convolution"
    if reason:
        raise ValueError(f"diffusers' UNet2DModel cannot express {reason}")


def _head_channels(architecture: UNetConfig) -> int | None:
    """Return the channels per attention head, which are equal in all blocks; None = one head in each block.

    Raises:
        ValueError: blocks differ in the channels per head, which UNet2DModel cannot express.
    """
    if architecture.num_head_channels:
        return architecture.num_head_channels
    resolutions = zip(architecture.widths, architecture.sizes, strict=True)
    attended_widths = {width for width, size in resolutions if size in architecture.attention_resolutions}
    heads, decoder_heads = architecture.num_heads, architecture.num_heads_upsample or architecture.num_heads
    # The encoder and the middle block, which always has attention at the last width, then the decoder.
    channels = {width // heads for width in {*attended_widths, architecture.widths[-1]}}
    channels |= {width // decoder_heads for width in attended_widths}
    if len(channels) == 1:
        return channels.pop()
    if heads == decoder_heads == 1:
        return None
    raise ValueError(
        f"diffusers' UNet2DModel cannot express num_heads={heads}, num_heads_upsample="
        f"{architecture.num_heads_upsample}: heads have {sorted(channels)} channels, and it has one number for all"
    )


def _blocks(architecture: UNetConfig) -> Iterator[tuple[str, str]]:
    """Yield the released name and the diffusers name of each residual block, attention block and resampler."""
    depth, levels = architecture.num_res_blocks, len(architecture.channel_mult)
    number = 1  # input_blocks.0 is the first convolution
    for level in range(levels):
        for index in range(depth):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{index}"
            yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{index}"
            number += 1
        yield f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"  # the last level has none
        number += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    for number in range(levels * (depth + 1)):
        level, index = divmod(number, depth + 1)  # coarsest first
        has_attention = architecture.sizes[levels - 1 - level] in architecture.attention_resolutions
        yield f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{index}"
        if has_attention:
            yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{index}"
        if index == depth:  # the last level has no upsampler
            yield f"output_blocks.{number}.{1 + has_attention}", f"up_blocks.{level}.upsamplers.0"


def _split_qkv(architecture: UNetConfig, packed: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v, [C, C] or [C], from packed [3C, C, 1] or [3C] in the order of `models.unet.attend`."""
    packed = packed.squeeze(-1) if packed.ndim == 3 else packed
    head_channels = _head_channels(architecture) or len(packed) // 3
    if architecture.use_new_attention_order:
        parts = packed.unflatten(0, (3, -1, head_channels)).unbind(0)
    else:
        parts = packed.unflatten(0, (-1, 3, head_channels)).unbind(1)
    return tuple(part.flatten(0, 1) for part in parts)
