"""Vision transformers agree with torch's own layers, closed forms and the sizes of the published files."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.vit import CLIP_COLOURS, IMAGENET_COLOURS, Block, ClipVision, DinoV2, encode, preprocess

SEED = 31
CPU = torch.device("cpu")


def dinov2_shapes(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of DINOv2's released files."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 37 * 37 + 1, width), "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                   "mlp.fc2": (width, 4 * width), "norm1": (width,), "norm2": (width,)}  # fmt: skip
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.ls{j}.gamma": (width,) for j in (1, 2)}
    return shapes


def clip_shapes(depth: int, width: int, embedding: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the image encoder in CLIP's released file, and of one tensor of the text encoder."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (width,), "vision_model.embeddings.position_ids": (1, 577),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (577, width),
        "visual_projection.weight": (embedding, width), "text_model.final_layer_norm.weight": (5,),
    }  # fmt: skip
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for i in range(depth):
        block = f"vision_model.encoder.layers.{i}"
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        linears = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_images(size: int = 20) -> np.ndarray:
    print("seed", SEED)
    return np.random.default_rng(SEED).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def test_dinov2_has_as_many_weights_as_its_released_file() -> None:
    """The file has 1,217,586,395 bytes: four for each of 304,368,640 numbers, and the names."""
    count = sum(int(np.prod(shape)) for shape in dinov2_shapes(24, 1024).values())
    assert count == 304_368_640 and 0 < 1_217_586_395 - 4 * count < 200_000


def test_a_block_is_torch_s_encoder_layer() -> None:
    torch.manual_seed(SEED)
    layer = nn.TransformerEncoderLayer(128, 2, 256, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    attention = layer.self_attn
    assert attention.in_proj_weight is not None and attention.in_proj_bias is not None
    modules = (layer.norm1, attention.out_proj, layer.norm2, layer.linear1, layer.linear2)
    norm_1, projection, norm_2, expand, contract = ((m.weight, m.bias) for m in modules)
    ones, qkv = torch.ones(128), (attention.in_proj_weight, attention.in_proj_bias)
    block = Block(norm_1, qkv, projection, ones, norm_2, expand, contract, ones)
    tokens = torch.randn(2, 7, 128)
    torch.testing.assert_close(encode(tokens, [block], 1e-6, F.gelu), layer.eval()(tokens), rtol=1e-4, atol=1e-5)


def test_without_blocks_only_the_class_token_is_left() -> None:
    """Layer scales of 0 disable the blocks, so that the output has a closed form for every image."""
    state = random_state(dinov2_shapes(2, 128))
    state |= {name: torch.zeros(128) for name in state if name.endswith("gamma")}
    token = (state["cls_token"] + state["pos_embed"][:, :1])[0, 0]
    normalised = (token - token.mean()) / torch.sqrt(token.var(unbiased=False) + 1e-6)
    expected = normalised * state["norm.weight"] + state["norm.bias"]
    features = DinoV2(state)(random_images())
    assert features.pool.shape == (2, 128) and features.logits is None
    np.testing.assert_allclose(features.pool, expected.expand(2, -1).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [DinoV2, ClipVision])
def test_features_depend_on_the_image_alone(network: type[DinoV2] | type[ClipVision]) -> None:
    shapes = dinov2_shapes(2, 128) if network is DinoV2 else clip_shapes(2, 128, 48)
    extractor, images = network(random_state(shapes)), random_images()
    pair, single = extractor(images).pool, extractor(images[1:]).pool
    assert extractor.dimension == pair.shape[1] == (128 if network is DinoV2 else 48)
    np.testing.assert_allclose(pair[1:], single, rtol=1e-4, atol=1e-5)
    assert np.abs(pair[0] - pair[1]).max() > 1e-4
    if network is ClipVision:
        np.testing.assert_allclose(np.linalg.norm(pair, axis=1), 1, rtol=1e-5)


def test_a_grey_image_stays_grey_at_any_size() -> None:
    for size, colours in ((224, IMAGENET_COLOURS), (336, CLIP_COLOURS)):
        actual = preprocess(np.full((1, 17, 17, 3), 51, np.uint8), size, colours, CPU)
        expected = (0.2 - torch.tensor(colours[0])) / torch.tensor(colours[1])
        torch.testing.assert_close(actual, expected.view(1, 3, 1, 1).expand(1, 3, size, size), rtol=1e-4, atol=1e-5)


def test_other_tensors_are_named() -> None:
    state = random_state(dinov2_shapes(1, 64))
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma"):
        DinoV2({name: tensor for name, tensor in state.items() if name != "blocks.0.ls1.gamma"})
    with pytest.raises(ValueError, match="unknown tensors, first 'register_tokens'"):
        DinoV2(state | {"register_tokens": torch.zeros(1, 4, 64)})
