"""Vision transformers (Dosovitskiy et al. 2021): the image encoders of DINOv2 and CLIP.

The caller provides the weights, with the tensor names of the published files: `dinov2_vitl14_pretrain.pth`, and
`pytorch_model.bin` of clip-vit-large-patch14-336. The caller also checks whether they are the published weights, which
give FD_DINOv2 and CMMD. Depth and width follow from the weights.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.features import Features, check_images

PATCH = 14  # pixels
HEAD_WIDTH = 64
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of colours in 0..1
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Linear = tuple[Tensor, Tensor]  # weight and bias of a linear layer or a layer norm


class Block(NamedTuple):
    """Parameters of a transformer block: attention, then an MLP, each with a layer norm and a residual connection."""

    norm_1: Linear
    qkv: Linear
    projection: Linear
    scale_1: Tensor  # layer scale; ones if the network has none
    norm_2: Linear
    expand: Linear
    contract: Linear
    scale_2: Tensor


def encode(tokens: Tensor, blocks: list[Block], eps: float, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply all blocks to tokens [B, T, C]; `eps` is that of the layer norms."""
    for block in blocks:
        batch, length, width = tokens.shape
        y = F.layer_norm(tokens, (width,), *block.norm_1, eps)
        q, k, v = F.linear(y, *block.qkv).view(batch, length, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + block.scale_1 * F.linear(y, *block.projection)
        y = activation(F.linear(F.layer_norm(tokens, (width,), *block.norm_2, eps), *block.expand))
        tokens = tokens + block.scale_2 * F.linear(y, *block.contract)
    return tokens


def quick_gelu(x: Tensor) -> Tensor:
    """Return CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return one token for each patch of x [B, 3, H, W], as [B, T, C]; computed without TF32."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return F.conv2d(x, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)


def preprocess(
    images: NDArray[np.uint8], size: int, colours: tuple[tuple[float, ...], ...], device: torch.device
) -> Tensor:
    """Resize uint8 [B, H, W, 3] to [B, 3, size, size] (bicubic, antialiased, not rounded) and normalise the colours."""
    check_images(images)
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(channels, device=device).view(3, 1, 1) for channels in colours)
    return (x / 255 - mean) / std


class DinoV2:
    """Extractor for FD_DINOv2; `pool` [B, C] is the class token of DINOv2 (Oquab et al. 2023) at 224 pixels."""

    name = "dinov2"
    num_classes = None
    size = 224

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Load the published tensors.

        Raises:
            ValueError: a tensor is missing or unknown; the message names it.
        """
        weights = _Weights(state, device)
        self.device, self.dimension = weights.device, weights["cls_token"].shape[-1]
        self.blocks = [
            Block(
                weights.linear(f"{block}.norm1"), weights.linear(f"{block}.attn.qkv"),
                weights.linear(f"{block}.attn.proj"), weights[f"{block}.ls1.gamma"], weights.linear(f"{block}.norm2"),
                weights.linear(f"{block}.mlp.fc1"), weights.linear(f"{block}.mlp.fc2"), weights[f"{block}.ls2.gamma"],
            )
            for block in weights.block_names("blocks")
        ]  # fmt: skip
        self.patches, self.norm = weights.linear("patch_embed.proj"), weights.linear("norm")
        positions = weights["pos_embed"]  # of the class token, then of the patches
        grid = positions[:, 1:].unflatten(1, (round((positions.shape[1] - 1) ** 0.5), -1)).permute(0, 3, 1, 2)
        # The network was trained on 37 x 37 patches. The published code adds 0.1 to the target size.
        grid = F.interpolate(grid, scale_factor=(self.size // PATCH + 0.1) / grid.shape[2], mode="bicubic")
        self.token = weights["cls_token"] + positions[:, :1]
        self.positions = grid.flatten(2).transpose(1, 2)
        weights.check_all_used(unneeded={"mask_token"})

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Return the features of images uint8 [B, H, W, 3]."""
        x = preprocess(images, self.size, IMAGENET_COLOURS, self.device)
        tokens = embed_patches(x, *self.patches) + self.positions
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1)
        class_token = encode(tokens, self.blocks, 1e-6, F.gelu)[:, 0]
        return Features(F.layer_norm(class_token, class_token.shape[1:], *self.norm, 1e-6).cpu().numpy())


class ClipVision:
    """Extractor for CMMD; `pool` [B, C] is the image embedding of CLIP (Radford et al. 2021) at 336 pixels."""

    name = "clip"
    num_classes = None
    size = 336

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Load the published tensors, without those of the text encoder.

        Raises:
            ValueError: a tensor is missing or unknown; the message names it.
        """
        image_encoder = {name: tensor for name, tensor in state.items() if name.startswith("vis")}
        weights = _Weights(image_encoder, device)
        self.device, embeddings = weights.device, "vision_model.embeddings"
        self.projection = weights["visual_projection.weight"]
        self.dimension, width = self.projection.shape
        ones = torch.ones(width, device=self.device)
        self.blocks = [
            Block(
                weights.linear(f"{block}.layer_norm1"), weights.qkv(f"{block}.self_attn"),
                weights.linear(f"{block}.self_attn.out_proj"), ones, weights.linear(f"{block}.layer_norm2"),
                weights.linear(f"{block}.mlp.fc1"), weights.linear(f"{block}.mlp.fc2"), ones,
            )
            for block in weights.block_names("vision_model.encoder.layers")
        ]  # fmt: skip
        self.patches = weights[f"{embeddings}.patch_embedding.weight"]
        self.token = weights[f"{embeddings}.class_embedding"]
        self.positions = weights[f"{embeddings}.position_embedding.weight"]
        self.first_norm = weights.linear("vision_model.pre_layrnorm")  # the spelling of the published file
        self.norm = weights.linear("vision_model.post_layernorm")
        weights.check_all_used(unneeded={f"{embeddings}.position_ids"})

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Return the features of images uint8 [B, H, W, 3]; they have norm 1."""
        tokens = embed_patches(preprocess(images, self.size, CLIP_COLOURS, self.device), self.patches)
        tokens = torch.cat([self.token.expand(len(tokens), 1, -1), tokens], dim=1) + self.positions
        tokens = F.layer_norm(tokens, tokens.shape[2:], *self.first_norm, 1e-5)
        class_token = encode(tokens, self.blocks, 1e-5, quick_gelu)[:, 0]
        pool = F.linear(F.layer_norm(class_token, class_token.shape[1:], *self.norm, 1e-5), self.projection)
        return Features(F.normalize(pool, dim=1).cpu().numpy())


class _Weights:
    """Tensors by name, as float32 on a device; it records which ones were used."""

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._state = state
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._state:
            raise ValueError(f"tensor {name!r} is missing from the weights of the vision transformer")
        self._used.add(name)
        return self._state[name].to(self.device, torch.float32)

    def linear(self, name: str) -> Linear:
        """Return weight and bias of a layer."""
        return self[f"{name}.weight"], self[f"{name}.bias"]

    def qkv(self, name: str) -> Linear:
        """Return the projections to queries, keys and values as one linear layer."""
        weights, biases = zip(*(self.linear(f"{name}.{part}_proj") for part in "qkv"), strict=True)
        return torch.cat(weights), torch.cat(biases)

    def block_names(self, prefix: str) -> list[str]:
        """Return the names of all blocks with this prefix, in order."""
        numbers = {name.removeprefix(f"{prefix}.").split(".")[0] for name in self._state if name.startswith(prefix)}
        return [f"{prefix}.{number}" for number in range(len(numbers))]

    def check_all_used(self, unneeded: set[str]) -> None:
        """Raise ValueError with the name of the first tensor that was not used, except for those in `unneeded`."""
        if unknown := sorted(set(self._state) - self._used - unneeded):
            raise ValueError(
                f"the weights of the vision transformer contain {len(unknown)} unknown tensors, first {unknown[0]!r}"
            )
