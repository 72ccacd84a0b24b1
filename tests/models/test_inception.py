"""The Inception network: names, refused weights and TensorFlow's resize. Golden data test its values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.features import extract
from models.inception import InceptionNetwork, resize, unit_names
from tests.reference_metrics import random_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    shapes = json.loads((GOLDEN / "inception_state_dict.json").read_text())["shapes"]
    with np.load(GOLDEN / "inception_random_weights.npz") as arrays:
        return random_weights({name: arrays[name] for name in ("seed", "fc_scale")}, shapes)


@pytest.fixture(scope="module")
def network(state: State) -> InceptionNetwork:
    return InceptionNetwork(state)


def test_names_are_those_of_the_public_port(state: State) -> None:
    assert len(unit_names()) == len(set(unit_names())) == 94
    assert {f"{name}.conv.weight" for name in unit_names()} == {key for key in state if key.endswith("conv.weight")}


def test_features_do_not_depend_on_the_rest_of_the_batch(network: InceptionNetwork) -> None:
    images = np.random.default_rng([40]).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    features = extract(network, images, batch_size=2)
    assert features.spatial is not None and features.logits is not None
    assert (features.pool.shape, features.spatial.shape, features.logits.shape) == ((3, 2048), (3, 2023), (3, 1008))
    np.testing.assert_array_equal(extract(network, images[:1], batch_size=2).pool[0], features.pool[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": None}, r"1 tensors .*'fc\.bias'"),
        ({"AuxLogits.fc.weight": torch.zeros(1)}, r"1 unknown tensors, first 'AuxLogits\.fc\.weight'"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc\.weight has shape \(1000, 2048\)"),
        ({"Mixed_6b.branch1x1.bn.bias": torch.zeros(7)}, r"Mixed_6b\.branch1x1: the batch norm"),
        ({"Mixed_6b.branch1x1.conv.weight": torch.zeros(192, 760, 1, 1)}, "fit together after Mixed_6a"),
    ],
)
def test_foreign_weights_are_refused(state: State, change: dict[str, torch.Tensor | None], message: str) -> None:
    changed = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        InceptionNetwork(changed)


def test_resize_samples_at_multiples_of_the_ratio_without_smoothing() -> None:
    ramp = torch.arange(598, dtype=torch.float32).view(1, 1, 598, 1).expand(1, 299, 598, 3)
    torch.testing.assert_close(resize(ramp)[0, 0, :, 0], 2 * torch.arange(299.0), rtol=0, atol=0)
    edge = torch.tensor([0.0, 10.0]).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    row = resize(edge)[0, 0, :, 0]
    assert row[0] == 0 and row[-1] == 10 and row[75] == pytest.approx(10 * 75 * 2 / 299, abs=1e-5)
    assert (row[150:] == 10).all()  # beyond the last source pixel its value is repeated
    same = torch.rand(1, 299, 299, 3, generator=torch.Generator().manual_seed(1)) * 255
    assert torch.equal(resize(same), same)
