"""The job: from samples in any form to one report, the same for every way of sharding and for any pool."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import storage
from orchestrator.evaluation import EvaluationConfig, evaluate, plan
from orchestrator.preparation import prepare
from tests.orchestrator.digits import digits

TOY = "tests.orchestrator.toy_extractor.ToyExtractor"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the prepared digits, and 600 samples of noise as an .npz."""
    store = tmp_path_factory.mktemp("store")
    prepare(digits(str(store)))
    images = np.random.default_rng([72]).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    np.savez(store / "noise", images, np.arange(600) % 10)
    return str(store)


def config(store: str, **changes: Any) -> EvaluationConfig:
    settings: dict[str, Any] = {
        "store": store, "samples": "noise.npz", "reference": "digits", "output": "evaluation",
        "extractor": TOY, "copies": 50, "num_workers": 0,
    }  # fmt: skip
    return EvaluationConfig(**settings | changes)


def report(uri: str) -> dict[str, Any]:
    """What does not tell where things lie."""
    content = storage.read_json(uri)
    return {name: content[name] for name in ("metrics", "per_class", "closest_pairs", "nearest_training_image")}


def test_samples_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none holds no finished samples: generate them first"):
        evaluate(EvaluationConfig(store=str(tmp_path), samples="none", reference="digits", output="evaluation"))


def test_noise_is_measured_by_the_digits_network(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "600 images" in plan(config(store, extractor="digits", output="by-digits"))
    uri = evaluate(config(store, extractor="digits", output="by-digits"))
    content = json.loads(Path(uri).read_text())
    metrics = content["metrics"]
    assert set(metrics) == {
        "fd_digits", "fd_infinity_digits", "kid_digits", "precision", "recall", "density", "coverage", "authpct",
        "inception_score_digits", "inception_score_classic_digits", "accuracy",
    }  # fmt: skip
    assert content["extractor"]["held_out_accuracy"] > 0.97
    for found in metrics.values():
        assert found["n"] == 600 and found["extractor"] == content["extractor"]["fingerprint"]
        assert found["seeds"] == {"seed": None, "indices": [0, 600]}
        assert found["interval"] or found["note"]
    assert (
        metrics["fd_digits"]["value"] > 5 and metrics["precision"]["value"] < 0.5 and metrics["accuracy"]["value"] < 0.3
    )
    assert list(content["per_class"]) == [str(digit) for digit in range(10)]
    assert len(content["nearest_training_image"]["samples"]) == len(content["nearest_training_image"]["held_out"]) == 50
    assert content["reproduce"]["config"]["extractor_seed"] == 7 and content["reproduce"]["command"].startswith(
        "python "
    )
    printed = capsys.readouterr().out
    assert "fd_digits" in printed and uri in printed

    page = (Path(uri).parent / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and 'src="http' not in page and "report.json" not in page
    before = Path(uri).read_bytes()
    assert evaluate(config(store, extractor="digits", output="by-digits")) == uri
    assert Path(uri).read_bytes() == before and "is complete" in capsys.readouterr().out


def test_another_extractor_or_other_samples_need_another_folder(store: str) -> None:
    evaluate(config(store, output="claimed"))
    with pytest.raises(ValueError, match="extractor: toy-quarters there, digits-"):
        evaluate(config(store, output="claimed", extractor="digits"))


@pytest.mark.ray
def test_the_pool_and_a_second_look_give_the_same_report(store: str, ray_session: None) -> None:
    alone = report(evaluate(config(store, output="alone")))
    pooled = report(evaluate(config(store, output="pooled", num_workers=2)))
    assert pooled == alone


def test_reference_images_of_another_size_are_refused(store: str) -> None:
    with pytest.raises(ValueError, match=r"image_size=16, but the samples in .* have 8 pixels"):
        evaluate(config(store, output="sixteen", image_size=16))


def test_a_published_batch_as_reference_and_nothing_written_beside_it(store: str, tmp_path: Path) -> None:
    images = np.random.default_rng([73]).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference", images)
    uri = evaluate(config(store, output="against-batch", reference=str(tmp_path / "reference.npz")))
    found = storage.read_json(uri)
    assert found["metrics"]["fd_toy"]["value"] < 0.2 and found["metrics"]["precision"]["value"] > 0.8  # noise is noise
    assert found["not_available"]["per_class"] == "the reference has no labels"
    assert found["nearest_training_image"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference.npz"]
