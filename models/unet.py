"""The networks of ADM (Dhariwal & Nichol 2021): U-Net, super-resolution U-Net and the noisy classifier.

Every option of the paper's ablations is a field of a config, and DDPM's and IDDPM's networks are configurations too.
Modules have the names of the released checkpoints, whose state dicts load with `strict=True`.

Parameters are float32. For bf16 or fp16, run the forward pass under `torch.autocast`; normalisation, softmax, the time
embedding and the output layers then stay in float32, as in the published code.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar, Literal, Self, cast

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_SHAPES = 256  # compiled variants of a block, which differ in channels, sizes and whether gradients are needed
NORM_GROUPS = 32  # of group normalisation; every feature map must have a multiple of this number of channels


class EncoderConfig(BaseModel, frozen=True, extra="forbid"):
    """The fields that the U-Net and the noisy classifier share: the downsampling half."""

    image_size: int = Field(64, gt=0)  # height and width of the input, pixels
    in_channels: int = Field(3, gt=0)  # channels of the image
    model_channels: int = Field(128, gt=0)  # base width
    num_res_blocks: int = Field(2, gt=0)  # residual blocks per resolution
    channel_mult: tuple[float, ...] = Field((1, 2, 3, 4), min_length=1)  # width of each resolution / model_channels
    attention_resolutions: tuple[int, ...] = (32, 16, 8)  # feature map sizes with attention, pixels
    num_heads: int = Field(4, gt=0)  # attention heads if num_head_channels is None
    num_head_channels: int | None = Field(None, gt=0)  # channels per attention head; None = num_heads heads
    dropout: float = Field(0.0, ge=0, lt=1)  # dropout rate in residual blocks, in training
    use_scale_shift_norm: bool = True  # AdaGN: embeddings scale and shift feature maps; False = they are added
    resblock_updown: bool = True  # BigGAN residual blocks change the resolution; False = plain layers do
    conv_resample: bool = True  # plain layers use a convolution; False = pooling and nearest neighbour
    use_new_attention_order: bool = False  # qkv channels as [qkv][head][c]; False = [head][qkv][c]
    rescale_residual: bool = False  # scale residual sums by 1/sqrt(2)
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass, to save memory

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Return zeros as arguments of a forward pass: x float32 [B, C, H, W] and timesteps [B], for B = `batch`."""
        x = torch.zeros(batch, self.in_channels, self.image_size, self.image_size)
        return {"x": x, "timesteps": torch.zeros(batch)}

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each resolution, finest first."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the feature map size of each resolution in pixels, finest first."""
        return tuple(self.image_size >> level for level in range(len(self.channel_mult)))

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.image_size % (1 << (len(self.channel_mult) - 1)):
            raise ValueError(
                f"image_size={self.image_size} cannot be halved {len(self.channel_mult) - 1} times "
                f"for the {len(self.channel_mult)} resolutions of channel_mult={self.channel_mult}"
            )
        for width in self.widths:
            if width <= 0 or width % NORM_GROUPS:
                raise ValueError(
                    f"channel_mult={self.channel_mult} x model_channels={self.model_channels} gives {width} "
                    f"channels; widths must be multiples of {NORM_GROUPS}"
                )
        for size in self.attention_resolutions:
            if size not in self.sizes:
                raise ValueError(f"attention_resolutions contains {size}; feature maps have the sizes {self.sizes}")
        field = "num_heads" if self.num_head_channels is None else "num_head_channels"
        divisor = getattr(self, field)
        for width, size in zip(self.widths, self.sizes, strict=True):
            has_attention = size in self.attention_resolutions or size == self.sizes[-1]  # which the middle block has
            if has_attention and width % divisor:
                raise ValueError(f"{field}={divisor} does not divide the {width} channels of an attention layer")
        return self


class UNetConfig(EncoderConfig, frozen=True, extra="forbid"):
    """The ADM U-Net, or with low_res_size the super-resolution U-Net."""

    kind: ClassVar[Literal["unet"]] = "unet"

    out_channels: int = Field(6, gt=0)  # 3 = mean only, 6 = mean and learned variance
    num_classes: int | None = Field(None, gt=0)  # None = not conditioned on classes
    null_class: bool = False  # embed a null class, which classifier-free guidance needs
    num_heads_upsample: int | None = Field(None, gt=0)  # attention heads of the decoder; None = num_heads
    low_res_size: int | None = Field(None, gt=0)  # size of the image to upsample in pixels; None = not an upsampler

    def build(self) -> "UNet":
        """Return the network with new weights."""
        return UNet(self)

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Return the encoder's arguments, and y int64 [B] and low_res float32 [B, C, h, w] if they are needed."""
        inputs = super().example_inputs(batch)
        if self.num_classes is not None:
            inputs["y"] = torch.zeros(batch, dtype=torch.int64)
        if self.low_res_size is not None:
            inputs["low_res"] = torch.zeros(batch, self.in_channels, self.low_res_size, self.low_res_size)
        return inputs

    @property
    def label_rows(self) -> int:
        """Return the number of rows of the label embedding: one for each class and for the null class."""
        return (self.num_classes or 0) + self.null_class

    @model_validator(mode="after")
    def _check_classes_and_heads(self) -> Self:
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class=True needs num_classes, because an unconditional network has no labels")
        if self.num_heads_upsample is not None and self.num_head_channels is None:
            for width, size in zip(self.widths, self.sizes, strict=True):
                if size in self.attention_resolutions and width % self.num_heads_upsample:
                    raise ValueError(
                        f"{width} channels cannot be split into num_heads_upsample={self.num_heads_upsample} heads"
                    )
        return self


class ClassifierConfig(EncoderConfig, frozen=True, extra="forbid"):
    """The noisy classifier: the downsampling half, the middle block and a pool."""

    kind: ClassVar[Literal["classifier"]] = "classifier"
    low_res_size: ClassVar[None] = None  # a classifier takes no low-resolution image

    num_classes: int = Field(1000, gt=0)  # number of logits
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = (
        "attention"  # how logits are pooled from feature maps
    )

    def build(self) -> "NoisyClassifier":
        """Return the network with new weights."""
        return NoisyClassifier(self)

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.pool == "attention" and self.num_head_channels is None:
            raise ValueError("pool='attention' needs num_head_channels (the released classifiers have 64)")
        return self


Architecture = UNetConfig | ClassifierConfig
ARCHITECTURES: dict[str, type[Architecture]] = {UNetConfig.kind: UNetConfig, ClassifierConfig.kind: ClassifierConfig}


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return a context in which convolutions and attention run in `dtype`; "float32" changes nothing."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def halve_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert a frozen network's weights to `dtype` once, so that autocast does not convert them in every forward pass.

    Results are bit-equal. Normalisation, the time embedding and the output layers stay in float32.
    """
    for stage in cast(Encoder, network).stages():
        for layer in stage.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv1d | nn.Linear):
                layer.to(dtype)


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile every residual and attention block with `torch.compile` at its first call; the last bits can change.

    Blocks of the same shape share the compiled code, so this is many times faster than compiling the whole network.
    """
    torch._dynamo.config.recompile_limit = MAX_SHAPES  # by default, blocks after the eighth variant are not compiled
    for stage in cast(Encoder, network).stages():
        for layer in stage.modules():
            if isinstance(layer, ResBlock | AttentionBlock):
                layer.compile(dynamic=False, backend=backend)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return the sinusoidal embedding of `timesteps` [B] (integer or fractional), float32 [B, dim], cosines first.

    The frequencies are those of transformers, max_period^(-i / (dim // 2)). An odd `dim` ends with a zero column.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    # exp is computed in float64, because its last bit in float32 differs between processors and is multiplied by t.
    frequencies = torch.exp((-math.log(max_period) * exponents / half).double()).float()
    angles = timesteps[:, None].float() * frequencies[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class GroupNorm(nn.GroupNorm):
    """Group normalisation with 32 groups, computed in float32 and returned in the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class PointwiseConv(nn.Conv1d):
    """A 1x1 convolution of tokens [B, N, C], computed as a matrix product."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.squeeze(-1), self.bias)


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero, so that its residual branch initially adds nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Apply `module` to `x` in float32, also under autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return module(x.float())
    return module(x.float())


def attend(qkv: Tensor, num_heads: int, new_order: bool) -> Tensor:
    """Compute multi-head self-attention of packed `qkv` [B, N, 3C] -> [B, N, C]; softmax is in float32.

    Channels are packed as [qkv][head][c] in the new order and as [head][qkv][c] in the legacy order. Both have the same
    shape, so the weights do not show which order is right.
    """
    batch, length, channels = qkv.shape
    if new_order:
        q, k, v = qkv.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, c]
    else:
        q, k, v = qkv.view(batch, length, num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, length, channels // 3)


class AttentionBlock(nn.Module):
    """Residual self-attention among the positions of a feature map [B, C, H, W]."""

    def __init__(self, config: EncoderConfig, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = channels // config.num_head_channels if config.num_head_channels else num_heads
        self.new_order = config.use_new_attention_order
        self.residual_scale = math.sqrt(0.5) if config.rescale_residual else 1.0
        self.norm = GroupNorm(channels)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.proj_out = zero_init(PointwiseConv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]; no copy if x is channels_last
        h = self.proj_out(attend(self.qkv(tokens), self.num_heads, self.new_order))
        return _add_residual(x, h.transpose(1, 2).reshape(x.shape), self.residual_scale)


def _add_residual(x: Tensor, h: Tensor, scale: float) -> Tensor:
    return x + h if scale == 1.0 else (x + h) * scale


def upsample(channels: int, use_conv: bool) -> nn.Module:
    """Return a layer that doubles height and width by nearest neighbour, with a 3x3 convolution if `use_conv`."""
    conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def downsample(channels: int, use_conv: bool) -> nn.Module:
    """Return a layer that halves height and width: a strided 3x3 convolution if `use_conv`, otherwise 2x2 means."""
    op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
    return nn.Sequential(OrderedDict(op=op))


class ResBlock(nn.Module):
    """Residual block conditioned on an embedding [B, 4 * model_channels]; it can change the resolution."""

    def __init__(
        self, config: EncoderConfig, in_channels: int, out_channels: int, resample: Literal["up", "down"] | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = config.use_scale_shift_norm
        self.residual_scale = math.sqrt(0.5) if config.rescale_residual else 1.0
        resamplings = {"up": nn.Upsample(scale_factor=2), "down": nn.AvgPool2d(2), None: nn.Identity()}
        self.resample = resamplings[resample]  # no parameters, so no names in the state dict
        self.in_layers = nn.Sequential(
            GroupNorm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * config.model_channels, (1 + self.scale_shift) * out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None].to(h.dtype)
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        for layer in rest:
            h = layer(h)
        return _add_residual(self.skip_connection(self.resample(x)), h, self.residual_scale)


class Stage(nn.Sequential):
    """A sequence of layers in which residual blocks also take the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def _encoder_stages(config: EncoderConfig, in_channels: int) -> Iterator[tuple[Stage, int]]:
    """Yield the stages of the downsampling half, each with its number of output channels."""
    width = config.widths[0]
    yield Stage(nn.Conv2d(in_channels, width, 3, padding=1)), width
    for level, (out_width, size) in enumerate(zip(config.widths, config.sizes, strict=True)):
        for _ in range(config.num_res_blocks):
            layers: list[nn.Module] = [ResBlock(config, width, out_width)]
            width = out_width
            if size in config.attention_resolutions:
                layers.append(AttentionBlock(config, width, config.num_heads))
            yield Stage(*layers), width
        if level < len(config.widths) - 1:
            down = ResBlock(config, width, width, "down") if config.resblock_updown else None
            yield Stage(down or downsample(width, config.conv_resample)), width


def _decoder_stages(config: UNetConfig, skip_widths: list[int]) -> Iterator[Stage]:
    """Yield the stages of the upsampling half; each takes the current map concatenated with a skip connection."""
    width = config.widths[-1]
    for level in reversed(range(len(config.widths))):
        for index in range(config.num_res_blocks + 1):
            layers: list[nn.Module] = [ResBlock(config, width + skip_widths.pop(), config.widths[level])]
            width = config.widths[level]
            if config.sizes[level] in config.attention_resolutions:
                layers.append(AttentionBlock(config, width, config.num_heads_upsample or config.num_heads))
            if level and index == config.num_res_blocks:
                up = ResBlock(config, width, width, "up") if config.resblock_updown else None
                layers.append(up or upsample(width, config.conv_resample))
            yield Stage(*layers)


class Encoder(nn.Module):
    """Time embedding, downsampling half and middle block, which U-Net and classifier share."""

    def __init__(self, config: EncoderConfig, in_channels: int) -> None:
        super().__init__()
        self.model_channels = config.model_channels
        self.gradient_checkpointing = config.gradient_checkpointing
        emb_channels = 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        stages, widths = zip(*_encoder_stages(config, in_channels), strict=True)
        self.input_blocks = nn.ModuleList(stages)
        self.input_widths: list[int] = list(widths)
        width = self.input_widths[-1]
        self.middle_block = Stage(
            ResBlock(config, width, width),
            AttentionBlock(config, width, config.num_heads),
            ResBlock(config, width, width),
        )

    def embed_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the time embedding [B, 4 * model_channels], which depends on `timesteps` [B] alone."""
        return in_float32(self.time_embed, timestep_embedding(timesteps, self.model_channels))

    def stages(self) -> Iterator[nn.Module]:
        """Yield the parts that autocast runs in half precision, in the order of the forward pass."""
        yield from self.input_blocks
        yield self.middle_block

    def run(self, stage: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        """Run one stage; with gradient checkpointing the backward pass recomputes it with the same dropout."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(stage, x, emb, use_reentrant=False))
        return stage(x, emb)


class UNet(Encoder):
    """The ADM U-Net, which predicts the noise (or x_start) and, with twice the output channels, the reverse variance.

    A super-resolution network also takes a low-resolution image, which is upsampled bilinearly and concatenated to x.
    """

    def __init__(self, config: UNetConfig) -> None:
        low_res_channels = config.in_channels if config.low_res_size else 0
        super().__init__(config, config.in_channels + low_res_channels)
        self.config = config
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.label_rows, 4 * config.model_channels)
        self.output_blocks = nn.ModuleList(_decoder_stages(config, list(self.input_widths)))
        self.out = nn.Sequential(
            GroupNorm(config.widths[0]),
            nn.SiLU(),
            zero_init(nn.Conv2d(config.widths[0], config.out_channels, 3, padding=1)),
        )

    def stages(self) -> Iterator[nn.Module]:
        """Yield the parts that autocast runs in half precision, in the order of the forward pass."""
        yield from super().stages()
        yield from self.output_blocks

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        time_embedding: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, float32 [B, out, H, W].

        Args:
            x: noised images [B, C, H, W].
            timesteps: original indices [B].
            y: labels int64 [B], for class-conditional networks only.
            time_embedding: `embed_timesteps(timesteps)` [B, 4 * model_channels], if it was computed beforehand.
            low_res: images [B, C, h, w] in [-1, 1], for super-resolution networks only.

        Raises:
            ValueError: y or low_res is missing or unexpected.
        """
        if (y is not None) != (self.config.num_classes is not None):
            raise ValueError(
                f"y is {'given' if y is not None else 'None'} but num_classes={self.config.num_classes}; "
                "class-conditional networks need labels, and others take none"
            )
        if (low_res is not None) != (self.config.low_res_size is not None):
            raise ValueError(
                f"low_res is {'given' if low_res is not None else 'None'} but low_res_size={self.config.low_res_size}; "
                "upsamplers need low-resolution images, and others take none"
            )
        if low_res is not None:
            x = torch.cat([x, F.interpolate(low_res, x.shape[-2:], mode="bilinear")], dim=1)
        emb = self.embed_timesteps(timesteps) if time_embedding is None else time_embedding
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for stage in self.input_blocks:
            h = self.run(stage, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb)
        return in_float32(self.out, h)


class AttentionPool(nn.Module):
    """CLIP's pool [B, C, H, W] -> [B, out_channels]: a token, the mean of all positions, attends to all positions."""

    def __init__(self, size: int, channels: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = PointwiseConv(channels, 3 * channels)
        self.c_proj = PointwiseConv(channels, out_channels)
        self.num_heads = channels // head_channels

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # [B, C, HW]
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = (tokens + self.positional_embedding).transpose(1, 2)
        h = attend(self.qkv_proj(tokens), self.num_heads, new_order=True)
        return self.c_proj(h[:, :1])[:, 0]


class NoisyClassifier(Encoder):
    """Classifier of noised images, p(y | x_t), whose gradient guides a diffusion model."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, config.in_channels)
        self.config = config
        width, size = config.widths[-1], config.sizes[-1]
        if config.pool == "adaptive":
            head = zero_init(nn.Conv2d(width, config.num_classes, 1))
            self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), head, nn.Flatten())
        elif config.pool == "attention":
            assert config.num_head_channels is not None  # checked by the config
            pool = AttentionPool(size, width, config.num_head_channels, config.num_classes)
            self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), pool)
        else:
            num_means = sum(self.input_widths) + width
            activation = [nn.ReLU()] if config.pool == "spatial" else [GroupNorm(2048), nn.SiLU()]
            self.out = nn.Sequential(nn.Linear(num_means, 2048), *activation, nn.Linear(2048, config.num_classes))

    def forward(self, x: Tensor, timesteps: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """Return logits [B, num_classes] for x [B, C, H, W] at timesteps [B] (original indices).

        `time_embedding` is as in `UNet.forward`. With the attention pool, images must have the configured size.
        """
        emb = self.embed_timesteps(timesteps) if time_embedding is None else time_embedding
        h, means = x, []
        for stage in (*self.input_blocks, self.middle_block):
            h = self.run(stage, h, emb)
            if self.config.pool.startswith("spatial"):
                means.append(h.float().mean(dim=(2, 3)))
        return in_float32(self.out, torch.cat(means, dim=1) if means else h)
