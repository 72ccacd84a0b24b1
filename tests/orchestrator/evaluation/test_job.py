"""The job: from samples in any form to one report, the same for every way of sharding and for any pool."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.inception import InceptionNetwork
from models.metrics import frechet_distance_of_rows
from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.evaluation.config import EvaluationConfig
from orchestrator.evaluation.job import evaluate, plan
from tests.orchestrator.digits import digits
from tests.orchestrator.evaluation.golden_inception import write_weights

TOY = "tests.orchestrator.evaluation.toy_extractor.ToyExtractor"


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
        "extractor": TOY, "num_memorization_samples": 50, "num_workers": 0,
    }  # fmt: skip
    return EvaluationConfig(**settings | changes)


def report(uri: str) -> dict[str, Any]:
    """What does not tell where things lie."""
    content = storage.read_json(uri)
    return {name: content[name] for name in ("metrics", "per_class", "closest_pairs", "nearest_training_image")}


def test_samples_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none holds no finished samples: generate them first"):
        evaluate(EvaluationConfig(store=str(tmp_path), samples="none", reference="digits", output="evaluation"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "digit"}, "digit holds no finished dataset"),
        ({"reference": "none.npz"}, r"none\.npz is not there"),
        ({"image_size": 16}, "image_size=16, but the samples"),
        ({"extractor": "inception"}, "put it at"),
        ({"extractor": "vgg"}, "wanted inception"),
    ],
)
def test_a_mistake_claims_no_folder(store: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        evaluate(config(store, output="mistaken", **changes))
    assert not storage.exists(storage.join(store, "mistaken"))


def test_noise_is_measured_by_the_digits_network(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "600 images" in plan(config(store, extractor="digits", output="by-digits"))
    uri = evaluate(config(store, extractor="digits", output="by-digits"))
    content = json.loads(Path(uri).read_text())
    metrics = content["metrics"]
    assert set(metrics) == {
        "fd_digits", "fd_infinity_digits", "kid_digits", "precision", "recall", "density", "coverage", "authpct",
        "inception_score_digits", "inception_score_10split_digits", "accuracy",
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
    assert content["reproduce"]["config"]["extractor"] == "digits" and content["reproduce"]["command"].startswith(
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


@pytest.mark.slow
def test_the_names_of_the_papers_belong_to_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden recipe's weights in the place of the published ones, against a reference in the published layout."""
    state, digest = write_weights(tmp_path / "weights.pth", monkeypatch)
    images = np.random.default_rng([74]).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples", images[:10])
    own = InceptionNetwork(state)(images[10:])
    spatial = own.spatial
    assert spatial is not None
    np.savez(
        tmp_path / "reference",
        images[10:],
        mu=own.pool.mean(0), sigma=np.cov(own.pool, rowvar=False),
        mu_s=spatial.mean(0), sigma_s=np.cov(spatial, rowvar=False),
    )  # fmt: skip
    settings = {"store": str(tmp_path), "output": "evaluation", "extractor": "inception", "num_workers": 0}
    files = {"samples": "samples.npz", "reference": "reference.npz", "extractor_weights": "weights.pth"}
    found = storage.read_json(evaluate(EvaluationConfig(**settings, **files)))
    assert set(found["metrics"]) == {
        "fid", "sfid", "kid", "inception_score", "inception_score_10split", "precision", "recall", "precision_openai",
        "recall_openai", "density", "coverage", "authpct",
    }  # fmt: skip
    assert found["extractor"]["fingerprint"] == f"inception-{digest[:12]}"
    assert found["metrics"]["fid"]["interval"] is None and "2 D" in found["metrics"]["fid"]["note"]
    assert found["metrics"]["fid"]["value"] == pytest.approx(
        frechet_distance_of_rows(own.pool, InceptionNetwork(state)(images[:10]).pool), rel=1e-3
    )


def test_a_published_batch_as_reference_and_nothing_written_beside_it(store: str, tmp_path: Path) -> None:
    images = np.random.default_rng([73]).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference", images)
    uri = evaluate(config(store, output="against-batch", reference=str(tmp_path / "reference.npz")))
    found = storage.read_json(uri)
    assert found["metrics"]["fd_toy"]["value"] < 0.2 and found["metrics"]["precision"]["value"] > 0.8  # noise is noise
    assert found["not_available"]["per_class"] == "the reference has no labels"
    assert found["nearest_training_image"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference.npz"]
