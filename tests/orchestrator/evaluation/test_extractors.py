"""Extractors by name: missing or wrong weights are reported before the first image."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from models.features import DigitsNetwork, extract
from orchestrator import storage
from orchestrator.data.dataset import load_manifest, read_images
from orchestrator.data.job import prepare
from orchestrator.evaluation import extractors
from orchestrator.evaluation.extractors import (
    CPU,
    efficientnet_extractor,
    extractor_loader,
    own_extractor,
)
from orchestrator.pictures import png
from tests.models.test_vit import clip_shapes, dinov2_shapes, random_state
from tests.orchestrator.digits import digits
from tests.orchestrator.evaluation.golden_inception import GOLDEN, write_weights


def load(name: str, weights: str | None = None, dataset: str | None = None) -> extractors.LoadedExtractor:
    return extractor_loader(name, weights, dataset, "/nowhere/extractors", image_size=8)(CPU)


def test_the_error_of_missing_inception_weights_names_file_and_folder() -> None:
    with pytest.raises(FileNotFoundError) as error:
        load("inception")
    message = str(error.value)
    assert "pt_inception-2015-12-05-6726825d.pth" in message and "6726825d" in message
    assert "/nowhere/extractors/pt_inception-2015-12-05-6726825d.pth" in message and "--extractor-weights" in message


@pytest.mark.parametrize(("name", "distance"), [("inception", "FID"), ("dinov2", "FD_DINOv2"), ("clip", "CMMD")])
def test_other_weights_are_refused(name: str, distance: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.bias": torch.zeros(1008)}, path)
    with pytest.raises(ValueError, match=rf"weights\.pth is not .*{distance}"):
        load(name, str(path))


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_vision_transformers_load_from_their_published_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"/nowhere/extractors/.*14.*--extractor-weights"):
        load(name)
    state = random_state(dinov2_shapes(1, 64) if name == "dinov2" else clip_shapes(1, 64, 48))
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(extractors.PUBLISHED, name, extractors.PUBLISHED[name]._replace(sha256=digest))
    loaded = load(name, str(path))
    assert loaded.fingerprint == f"{name}-{digest[:12]}"
    assert loaded.network(np.zeros((1, 8, 8, 3), np.uint8)).pool.shape == (1, 64 if name == "dinov2" else 48)


def test_accuracy_needs_the_classes_of_the_extractor() -> None:
    wordnet = tuple(f"n{number:08d}" for number in range(1000))
    loaded = efficientnet_extractor(CPU)
    assert loaded.class_mismatch(wordnet) == "" and "efficientnet" in loaded.class_mismatch(wordnet[::-1])
    assert "not those of the samples' labels" in loaded.class_mismatch(tuple(map(str, range(1000))))
    named = own_extractor("tests.orchestrator.evaluation.toy_extractor.ToyExtractor")._replace(classes=("a", "b", "c"))
    assert named.class_mismatch(("a", "b", "c")) == "" and "toy" in named.class_mismatch(("a", "c", "b"))


def test_the_right_file_is_checked_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, digest = write_weights(tmp_path / "weights.pth", monkeypatch)
    with np.load(GOLDEN / "inception_random_weights.npz") as arrays:
        images, expected = arrays["images_64"][:1], arrays["images_64/pool3_2048"][:1]
    loaded = load("inception", str(tmp_path / "weights.pth"))
    assert loaded.fingerprint == f"inception-{digest[:12]}"
    np.testing.assert_allclose(loaded.network(images).pool, expected, rtol=1e-3, atol=1e-4)


def test_efficientnet_classifies_a_palace_and_a_flower() -> None:
    """Real ImageNet weights: scikit-learn's two photographs are a palace (698) with a bell cote (442), and a daisy."""
    loaded = efficientnet_extractor(CPU)
    china, flower = (image[:, 100:500] for image in load_sample_images().images)
    features = extract(loaded.network, np.stack([china, flower])[:, :400], 2)
    assert features.pool.shape == (2, 1280) and features.logits is not None
    ranked = np.argsort(-features.logits, axis=1)
    assert {698, 442} == set(ranked[0, :2].tolist()) and ranked[1, 0] == 985
    assert loaded.fingerprint.startswith("efficientnet_lite0-57934424")


def test_a_custom_extractor_is_imported_by_its_dotted_name() -> None:
    loaded = own_extractor("tests.orchestrator.evaluation.toy_extractor.ToyExtractor")
    assert loaded.fingerprint == "toy-quarters" and loaded.network.dimension == 12
    module = own_extractor("models.features.DigitsNetwork")  # its identity is that of its state
    assert isinstance(module.network, DigitsNetwork) and len(module.fingerprint) == len("digits-") + 12
    with pytest.raises(ValueError, match="cannot be imported"):
        own_extractor("tests.orchestrator.evaluation.toy_extractor.Nothing")
    with pytest.raises(ValueError, match="'inception', which is reserved"):
        own_extractor("tests.orchestrator.evaluation.toy_extractor.FalseInception")
    with pytest.raises(ValueError, match="name, dimension, num_classes"):
        own_extractor("collections.OrderedDict")


def test_each_dataset_has_its_own_digits_network(tmp_path: Path) -> None:
    """The same scans with other labels need another network."""
    store = str(tmp_path)
    folder = prepare(digits(store)).folder
    scans, labels = read_images(load_manifest(folder), "train", 0, 200, 8)
    for label in range(10):
        for index in np.flatnonzero(labels == label)[:15]:
            storage.write_bytes(f"{store}/turned/{(label + 1) % 10}/{index}.png", png(scans[index]))
    other = prepare(digits(store, source=f"{store}/turned", output="other", name="other")).folder
    networks = f"{store}/extractors"
    first, second = (extractor_loader("digits", None, uri, networks, 8)(CPU) for uri in (folder, other))
    assert first.fingerprint != second.fingerprint and len(storage.list_names(networks)) == 2
    for loaded, turn in ((first, 0), (second, 1)):
        logits = loaded.network(scans).logits
        assert logits is not None and (logits.argmax(axis=1) == (labels + turn) % 10).mean() > 0.7
    # A fingerprint is enough to load a network without its dataset, for references that contain only mu and sigma.
    for loaded in (first, second):
        assert extractor_loader("digits", None, None, networks, 8, loaded.fingerprint)(CPU).fingerprint == (
            loaded.fingerprint
        )
    with pytest.raises(ValueError, match="states digits-0123"):
        extractor_loader("digits", None, None, networks, 8, "digits-0123")


def test_the_digits_network_needs_few_classes_but_no_validation_split(tmp_path: Path) -> None:
    manifest = prepare(digits(str(tmp_path), validation_fraction=0.0))
    loader = extractor_loader("digits", None, manifest.folder, f"{tmp_path}/extractors", 8)
    assert (loader(CPU).held_out_accuracy or 0) > 0.9
    for classes, message in (((), "has 0 classes"), (tuple(map(str, range(11))), "has 11 classes")):
        other = manifest.model_copy(update={"classes": classes})
        storage.write_bytes(f"{manifest.folder}/manifest.json", other.model_dump_json().encode())
        with pytest.raises(ValueError, match=f"{message}; pass --extractor efficientnet"):
            loader(CPU)


def test_unknown_names_and_unused_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="inception, dinov2, clip, efficientnet, digits"):
        load("vgg")
    with pytest.raises(ValueError, match="must then be a dataset"):
        load("digits")
    with pytest.raises(ValueError, match="extractor=efficientnet"):
        load("efficientnet", "weights.pth")
