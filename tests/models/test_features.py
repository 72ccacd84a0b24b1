"""The digits network: accuracy on held-out scans, reproducibility, and independence of batches."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from models.features import DigitsNetwork, extract, train_digits_network

Images = NDArray[np.uint8]


def scanned_digits(size: int) -> tuple[Images, NDArray[np.int64]]:
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    resized = [np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC)) for g in grey]
    return np.repeat(np.stack(resized)[..., None], 3, axis=-1), digits.target.astype(np.int64)


@pytest.fixture(scope="module")
def trained() -> DigitsNetwork:
    images, labels = scanned_digits(16)
    return train_digits_network(images, labels, seed=0)


def test_held_out_scans_are_classified_correctly(trained: DigitsNetwork) -> None:
    print("seed 0, held-out accuracy", trained.held_out_accuracy)
    assert trained.held_out_accuracy >= 0.98
    images, labels = scanned_digits(8)  # the native resolution, never seen in training
    logits = extract(trained, images, batch_size=256).logits
    assert logits is not None
    assert (logits.argmax(1) == labels).mean() > 0.95


def test_same_seed_gives_the_same_network_and_leaves_torch_randomness_alone() -> None:
    images, labels = scanned_digits(8)
    torch.manual_seed(1)
    first = train_digits_network(images[:300], labels[:300], seed=3, num_epochs=2)
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    second = train_digits_network(images[:300], labels[:300], seed=3, num_epochs=2)
    torch.set_num_threads(threads)
    other = train_digits_network(images[:300], labels[:300], seed=4, num_epochs=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.head.weight, other.head.weight)


def test_state_dict_carries_the_whole_network(trained: DigitsNetwork) -> None:
    copy = DigitsNetwork.from_state_dict(trained.state_dict())
    images, _ = scanned_digits(16)
    assert copy.held_out_accuracy == trained.held_out_accuracy
    np.testing.assert_array_equal(copy(images[:32]).pool, trained(images[:32]).pool)
    with pytest.raises(RuntimeError, match="Missing key"):
        DigitsNetwork.from_state_dict({})


def test_features_do_not_depend_on_how_many_images_follow(trained: DigitsNetwork) -> None:
    images, _ = scanned_digits(16)
    all_features = extract(trained, images[:100], batch_size=32)
    assert all_features.pool.shape == (100, trained.dimension) and all_features.pool.dtype == np.float32
    np.testing.assert_array_equal(extract(trained, images[:70], batch_size=32).pool, all_features.pool[:70])
    np.testing.assert_array_equal(extract(trained, images[64:100], batch_size=32).pool, all_features.pool[64:])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\)"),
    ],
)
def test_wrong_images_are_refused(images: Images, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(DigitsNetwork(), images, batch_size=2)


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        train_digits_network(np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 10]), seed=0)
