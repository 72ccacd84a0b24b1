"""Classifiers of the user: import by name, fingerprints, and guidance equal to that of a classifier file."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import fingerprint, load_networks, make_batch
from orchestrator.search.job import pass_costs
from orchestrator.search.space import Setting
from orchestrator.weights.imported import ImportedClassifier, import_classifier, is_imported
from tests.orchestrator.networks import CLASSES, CLASSIFIER, UNET, save_network


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, 10, generator=generator))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(t) == len(y)
        return x.flatten(1) @ self.weight


class Images(Linear):
    """Returns the pixels instead of logits."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of the user, which can be imported as `users_own`."""
    module = ModuleType("users_own")
    vars(module).update(linear=Linear(0), other=Linear(1), images=Images(0), plain=lambda x, t, y: x.flatten(1)[:, :10])
    monkeypatch.setitem(sys.modules, "users_own", module)
    return module


def config(folder: Path, classifier: str, scale: float = 2.0) -> GenerationConfig:
    save_network(str(folder), "unet.safetensors", UNET)
    return GenerationConfig(
        store=str(folder), weights="unet.safetensors", classifier=classifier, output="samples", num_samples=4,
        batch_size=4, shard_size=4, sampler=SamplerConfig(name="ddim", num_steps=3),
        guidance=GuidanceConfig(scale=scale),
    )  # fmt: skip


def test_names_of_functions_differ_from_paths() -> None:
    assert is_imported("package.module:function") and is_imported("a:b")
    assert not any(map(is_imported, ("runs/classifier", "s3://bucket/c.pt", "C:\\c.pt", "classifier.safetensors")))


def test_an_imported_classifier_gives_the_same_samples_as_its_file(tmp_path: Path, module: ModuleType) -> None:
    save_network(str(tmp_path), "classifier.safetensors", CLASSIFIER)
    by_file = config(tmp_path, "classifier.safetensors")
    networks = load_networks(by_file, "cpu")
    assert networks.classifier is not None
    from_file = networks.classifier.towards(torch.zeros(1))

    def function(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return from_file(x, t)

    vars(function).update(fingerprint="ours", classes=CLASSES)
    vars(module)["ours"] = function
    imported = config(tmp_path, "users_own:ours")
    file_images, imported_images = (make_batch(load_networks(c, "cpu"), c, 0)[0].images for c in (by_file, imported))
    np.testing.assert_array_equal(file_images, imported_images)
    unguided = config(tmp_path, "users_own:ours", scale=0.0)
    assert (make_batch(load_networks(unguided, "cpu"), unguided, 0)[0].images != file_images).any()


def test_other_weights_have_another_fingerprint_and_other_samples(tmp_path: Path) -> None:
    results = []
    for name in ("linear", "other"):
        job_config = config(tmp_path, f"users_own:{name}")
        networks = load_networks(job_config, "cpu")
        assert isinstance(networks.classifier, ImportedClassifier) and networks.classes == CLASSES
        results.append((fingerprint(job_config, networks)["classifier"], make_batch(networks, job_config, 0)[0].images))
    assert results[0][0] != results[1][0] and (results[0][1] != results[1][1]).any()


def test_the_cost_of_an_imported_classifier_is_counted(tmp_path: Path) -> None:
    passes = pass_costs([("classifier", None)], config(tmp_path, "users_own:linear"))
    guided = Setting(weights="w", sampler=SamplerConfig(name="ddim", num_steps=10), guidance=GuidanceConfig(scale=1.0))
    linear = 2 * 3 * 8 * 8 * 10  # multiply-adds, forward and backward to the input
    assert import_classifier("users_own:linear", 3, 8, "cpu").multiply_adds == linear
    assert 10 < passes.evaluations(guided) < 10.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_own:absent", "absent"),
        ("no_such_module:f", "no_such_module"),
        ("users_own:plain", "fingerprint"),
        ("users_own:images", r"\(1, 3, 8, 8\) for one image"),
    ],
)
def test_a_classifier_that_cannot_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--classifier {name}.*{message}"):
        import_classifier(name, 3, 8, "cpu")
