"""EfficientNet-Lite0: TensorFlow's padding and missing weights. Its predictions are tested with the extractors."""

import pytest
import torch
from torch.nn import functional as F

from models.efficientnet import EfficientNetLite0
from models.features import fold_batch_norm


def state() -> dict[str, torch.Tensor]:
    """Return random weights of the right shapes."""
    generator = torch.Generator().manual_seed(0)
    stages = [
        (1, 3, 1, 16),
        (2, 3, 6, 24),
        (2, 5, 6, 40),
        (3, 3, 6, 80),
        (3, 5, 6, 112),
        (4, 5, 6, 192),
        (1, 3, 6, 320),
    ]
    shapes: dict[str, tuple[int, ...]] = {"_conv_stem.weight": (32, 3, 3, 3), "_conv_head.weight": (1280, 320, 1, 1)}
    norms, width, block = {"_bn0": 32, "_bn1": 1280}, 32, 0
    for repeats, kernel, expansion, out in stages:
        for _ in range(repeats):
            name = f"_blocks.{block}"
            expanded = width * expansion
            if expansion > 1:
                shapes[f"{name}._expand_conv.weight"], norms[f"{name}._bn0"] = (expanded, width, 1, 1), expanded
            shapes[f"{name}._depthwise_conv.weight"], norms[f"{name}._bn1"] = (expanded, 1, kernel, kernel), expanded
            shapes[f"{name}._project_conv.weight"], norms[f"{name}._bn2"] = (out, expanded, 1, 1), out
            width, block = out, block + 1
    shapes |= {
        f"{norm}.{part}": (n,)
        for norm, n in norms.items()
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    shapes |= {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    return {name: torch.rand(shape, generator=generator) * 0.1 + 0.05 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0(state())


def test_features_have_their_shapes_and_do_not_depend_on_the_batch(network: EfficientNetLite0) -> None:
    images = torch.randint(
        0, 256, (3, 20, 30, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ).numpy()
    features = network(images)
    assert features.pool.shape == (3, 1280) and features.spatial is None
    assert features.logits is not None and features.logits.shape == (3, 1000)
    torch.testing.assert_close(*(torch.from_numpy(f) for f in (network(images[1:2]).pool, features.pool[1:2])))


@pytest.mark.parametrize(("size", "stride", "kernel"), [(224, 2, 3), (112, 1, 3), (57, 2, 5), (28, 2, 5)])
def test_padding_is_tensorflow_s(network: EfficientNetLite0, size: int, stride: int, kernel: int) -> None:
    """SAME: an output of ceil(size / stride), whose window i begins at i * stride - floor(total padding / 2)."""
    network.units["probe"] = torch.ones(1, 1, kernel, kernel), torch.zeros(1)
    x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(2))
    output = network._unit("probe", x, stride)
    count = -(-size // stride)
    total = max((count - 1) * stride + kernel - size, 0)
    padded = F.pad(x, (total // 2, kernel) * 2)
    expected = torch.stack([
        torch.stack([padded[0, 0, i * stride :, j * stride :][:kernel, :kernel].sum() for j in range(count)])
        for i in (0, count // 2, count - 1)
    ])  # fmt: skip
    torch.testing.assert_close(output[0, 0, [0, count // 2, count - 1]], expected)


def test_missing_weights_are_named() -> None:
    weights = state()
    del weights["_blocks.7._bn1.running_var"]
    with pytest.raises(ValueError, match=r"1 tensors .*_blocks\.7\._bn1\.running_var"):
        EfficientNetLite0(weights)


def test_folding_does_what_batch_norm_did() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(5, 3, 3, 3, generator=generator)
    gain, bias, mean, var = torch.rand(4, 5, generator=generator)
    expected = F.batch_norm(F.conv2d(x, weight), mean, var, gain, bias, eps=1e-3)
    torch.testing.assert_close(F.conv2d(x, *fold_batch_norm("unit", 1e-3, weight, gain, bias, mean, var)), expected)
    with pytest.raises(ValueError, match="unit: the batch norm does not have one value"):
        fold_batch_norm("unit", 1e-3, weight, gain[:2], bias, mean, var)
