"""Vision transformers (Dosovitskiy et al. 2021) in plain torch: the image encoders of DINOv2 and CLIP.

The weights come from outside, under the names of the published files: `dinov2_vitl14_pretrain.pth`, and
`pytorch_model.bin` of clip-vit-large-patch14-336. Depth and width are those of the weights. Whether a distance may be
called FD_DINOv2 or CMMD is for the caller to say, who knows whether the weights are the published ones.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.features import Features, check_images

PATCH = 14  # pixels
HEAD_WIDTH = 64
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of colours in 0..1
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Linear = tuple[Tensor, Tensor]  # weight and bias, of a linear map or of a layer norm


class Block(NamedTuple):
    """Attention, then two linear maps, each on the normalised tokens and added to them."""

    norm_1: Linear
    qkv: Linear
    projection: Linear
    scale_1: Tensor  # layer scale; ones where the network has none
    norm_2: Linear
    expand: Linear
    contract: Linear
    scale_2: Tensor


def encode(tokens: Tensor, blocks: list[Block], eps: float, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """tokens [B, T, C] -> the same after all blocks."""
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
    """CLIP's approximation of the Gaussian error linear unit."""
    return x * torch.sigmoid(1.702 * x)


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, 3, H, W] -> a token [B, T, C] of each patch, in the same arithmetic on every device."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        return F.conv2d(x, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)


def pixels(
    images: NDArray[np.uint8], size: int, colours: tuple[tuple[float, ...], ...], device: torch.device
) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, size, size], bicubic and smoothed where it shrinks, not rounded, then normalised."""
    check_images(images)
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(part, device=device).view(3, 1, 1) for part in colours)
    return (x / 255 - mean) / std


class DinoV2:
    """Extractor with `pool` [B, C]: the class token of DINOv2 (Oquab et al. 2023) at 224 pixels; of FD_DINOv2."""

    name = "dinov2"
    num_classes = None
    size = 224

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
        """state: the published tensors. Raises ValueError naming the first that is missing or unknown."""
        weights = _Weights(state, device)
        self.device, self.dimension = weights.device, weights.width("cls_token")
        self.blocks = [
            Block(
                weights.linear(f"{block}.norm1"), weights.linear(f"{block}.attn.qkv"),
                weights.linear(f"{block}.attn.proj"), weights[f"{block}.ls1.gamma"], weights.linear(f"{block}.norm2"),
                weights.linear(f"{block}.mlp.fc1"), weights.linear(f"{block}.mlp.fc2"), weights[f"{block}.ls2.gamma"],
            )
            for block in weights.numbered("blocks")
        ]  # fmt: skip
        self.patches, self.norm = weights.linear("patch_embed.proj"), weights.linear("norm")
        positions, side = weights["pos_embed"], self.size // PATCH
        grid = positions[:, 1:].unflatten(1, (round((positions.shape[1] - 1) ** 0.5), -1)).permute(0, 3, 1, 2)
        # From the 37 x 37 patches of its training; the tenth that is added is the published code's.
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / grid.shape[2], mode="bicubic")
        self.token = weights["cls_token"] + positions[:, :1]
        self.positions = grid.flatten(2).transpose(1, 2)
        weights.check_all_used({"mask_token"})

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """images uint8 [B, H, W, 3] -> Features."""
        tokens = embed_patches(pixels(images, self.size, IMAGENET, self.device), *self.patches) + self.positions
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1)
        last = encode(tokens, self.blocks, 1e-6, F.gelu)[:, 0]
        return Features(F.layer_norm(last, last.shape[1:], *self.norm, 1e-6).cpu().numpy())


class ClipVision:
    """Extractor with `pool` [B, C]: the image embedding of CLIP (Radford et al. 2021) at 336 pixels; of CMMD."""

    name = "clip"
    num_classes = None
    size = 336

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device = "cpu") -> None:
        """state: the published tensors; those of the text encoder are left alone. Raises ValueError as `DinoV2`."""
        weights = _Weights({name: t for name, t in state.items() if name.startswith("vis")}, device)
        self.device, embeddings = weights.device, "vision_model.embeddings"
        self.projection = weights["visual_projection.weight"]
        self.dimension, width = self.projection.shape
        ones = torch.ones(width, device=self.device)
        self.blocks = [
            Block(
                weights.linear(f"{block}.layer_norm1"), weights.joined(f"{block}.self_attn", "qkv"),
                weights.linear(f"{block}.self_attn.out_proj"), ones, weights.linear(f"{block}.layer_norm2"),
                weights.linear(f"{block}.mlp.fc1"), weights.linear(f"{block}.mlp.fc2"), ones,
            )
            for block in weights.numbered("vision_model.encoder.layers")
        ]  # fmt: skip
        self.patches = weights[f"{embeddings}.patch_embedding.weight"]
        self.token = weights[f"{embeddings}.class_embedding"]
        self.positions = weights[f"{embeddings}.position_embedding.weight"]
        self.first_norm = weights.linear("vision_model.pre_layrnorm")  # spelt so in the file
        self.norm = weights.linear("vision_model.post_layernorm")
        weights.check_all_used({f"{embeddings}.position_ids"})

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """images uint8 [B, H, W, 3] -> Features of length 1."""
        tokens = embed_patches(pixels(images, self.size, CLIP, self.device), self.patches)
        tokens = torch.cat([self.token.expand(len(tokens), 1, -1), tokens], dim=1) + self.positions
        tokens = F.layer_norm(tokens, tokens.shape[2:], *self.first_norm, 1e-5)
        last = encode(tokens, self.blocks, 1e-5, quick_gelu)[:, 0]
        pool = F.linear(F.layer_norm(last, last.shape[1:], *self.norm, 1e-5), self.projection)
        return Features(F.normalize(pool, dim=1).cpu().numpy())


class _Weights:
    """Tensors by name, float32 on a device, which remembers what was taken."""

    def __init__(self, state: Mapping[str, Tensor], device: str | torch.device) -> None:
        self.device, self._state, self._used = torch.device(device), state, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._state:
            raise ValueError(f"the weights lack {name!r}, which a vision transformer of this kind has")
        self._used.add(name)
        return self._state[name].to(self.device, torch.float32)

    def linear(self, name: str) -> Linear:
        return self[f"{name}.weight"], self[f"{name}.bias"]

    def joined(self, name: str, parts: str) -> Linear:
        """Several linear maps of one input as one."""
        weights, biases = zip(*(self.linear(f"{name}.{part}_proj") for part in parts), strict=True)
        return torch.cat(weights), torch.cat(biases)

    def width(self, name: str) -> int:
        return int(self[name].shape[-1])

    def numbered(self, prefix: str) -> Iterator[str]:
        """The names of all blocks under a prefix, in their order."""
        numbers = {name.removeprefix(f"{prefix}.").split(".")[0] for name in self._state if name.startswith(prefix)}
        return (f"{prefix}.{number}" for number in range(len(numbers)))

    def check_all_used(self, but: set[str]) -> None:
        """Raises ValueError naming the first tensor that was not taken."""
        if unknown := sorted(set(self._state) - self._used - but):
            raise ValueError(f"the weights hold {len(unknown)} unknown tensors, first {unknown[0]!r}")
