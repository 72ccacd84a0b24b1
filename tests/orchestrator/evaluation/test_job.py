"""The evaluation job: the report does not depend on the form of the samples, on shards or on the pool."""

import html
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
from orchestrator.evaluation.extraction import FeatureFiles
from orchestrator.evaluation.job import evaluate, plan
from orchestrator.generation.samples import Samples, Shard, encode_rows, put_shard, write_manifest, write_run
from orchestrator.pictures import png
from tests.orchestrator.digits import digits
from tests.orchestrator.evaluation.golden_inception import write_weights

TOY = "tests.orchestrator.evaluation.toy_extractor.ToyExtractor"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with the prepared digits, and 600 samples of noise as an .npz."""
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
    """Return the parts of a report that contain no paths."""
    content = storage.read_json(uri)
    return {
        name: content[name] for name in ("metrics", "held_out", "per_class", "closest_pairs", "nearest_training_image")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "digit"}, "digit holds no finished dataset"),
        ({"reference": "none.npz"}, r"--reference none\.npz does not exist"),
        ({"samples": "none.npz"}, r"--samples none\.npz does not exist"),
        ({"samples": "none"}, "none has no finished samples"),
        ({"reference": "a.pkl"}, r"--reference a\.pkl .*never opened"),
        ({"samples": "a.npy"}, r"--samples a\.npy .*arr_0"),
        ({"image_size": 16}, "image_size=16, but the samples"),
        ({"extractor": "inception"}, "put it at"),
        ({"extractor": "vgg"}, "inception, dinov2"),
    ],
)
def test_a_wrong_config_creates_no_folder(store: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        evaluate(config(store, output="mistaken", **changes))
    assert not storage.exists(storage.join(store, "mistaken"))


MADE_BY = {
    "seed": 0,
    "labels": "balanced",
    "weights": "ab12cd34",
    "sampler": {"name": "ddim", "num_steps": 25},
    "guidance": {"scale": 1.5},
}


def write_samples(store: str, name: str, classes: tuple[str, ...]) -> str:
    """Write 16 samples of noise with these class names in the format of `generate`, and return their `name`."""
    images = np.random.default_rng([75]).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    folder, shard = storage.join(store, name), Shard(0, 16)
    write_run(folder, MADE_BY, {}, {"classes": classes})
    digest = put_shard(folder, shard, encode_rows(Samples(np.arange(16), np.arange(16) % len(classes), images)))
    write_manifest(folder, {shard: digest})
    return name


@pytest.mark.parametrize("extractor", [TOY, "digits"])
def test_inputs_that_cannot_be_compared_are_refused_before_any_feature_is_extracted(
    extractor: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an extractor was trained, or features were extracted")

    functions = ["job.extract_all", "job.extract_reference", "extraction.map_items", "extractors.train_digits_network"]
    for function in functions:
        monkeypatch.setattr(f"orchestrator.evaluation.{function}", refuse)
    names = ("one", "two", "three")
    samples = write_samples(str(tmp_path), "named", names)
    source = prepare(digits(str(tmp_path), output="others", name="others"))
    others = source.model_copy(update={"classes": tuple(f"class {label}" for label in range(10))})
    storage.write_bytes(f"{source.folder}/manifest.json", others.model_dump_json().encode())
    settings = {"extractor": extractor, "samples": f"{tmp_path}/{samples}"}
    with pytest.raises(
        ValueError, match=r"class names of --samples .*named and --reference .*others.*'one'.*'class 0'"
    ):
        evaluate(config(store, output="others-refused", reference=source.folder, **settings))
    np.savez(tmp_path / "large", np.zeros((40, 16, 16, 3), np.uint8))
    if extractor == TOY:
        with pytest.raises(ValueError, match=r"8x8 pixels.*large\.npz of 16x16: --extractor"):
            evaluate(config(store, output="others-refused", reference=f"{tmp_path}/large.npz", **settings))
    assert not storage.exists(storage.join(store, "others-refused"))
    assert not [
        path for folder in (store, str(tmp_path)) for path in Path(folder).rglob("features") if "named" in str(path)
    ]


def test_warnings_are_on_the_terminal_in_the_report_and_on_the_page(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = write_samples(str(tmp_path), "named", ("one", "two", "three"))
    uri = evaluate(config(store, output="warned", samples=f"{tmp_path}/{samples}"))
    content, printed = storage.read_json(uri), capsys.readouterr().out
    page = html.unescape((Path(uri).parent / "report.html").read_text())
    assert any("'one'" in warning for warning in content["warnings"])
    assert any("grey" in warning for warning in content["warnings"])  # the scans are, and this noise is not
    for warning in content["warnings"]:
        assert printed.count(f"warning: {warning}") == 2 and warning in page
    assert "accuracy" not in content["metrics"] and content["per_class"] == {}
    for name in ("accuracy", "per_class"):
        assert "'one'" in content["not_available"][name]


def test_statistics_without_images_are_enough_for_the_extractor_that_they_state(store: str, tmp_path: Path) -> None:
    by_images = storage.read_json(evaluate(config(store, output="by-images", extractor="digits")))
    fingerprint = by_images["extractor"]["fingerprint"]
    folder = storage.join(store, "digits", "features", "train-8", fingerprint)
    features = FeatureFiles(folder, 1437, fingerprint).pool().astype(np.float64)
    statistics = {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "statistics", **statistics, extractor=fingerprint)
    reference = str(tmp_path / "statistics.npz")
    by_statistics = storage.read_json(evaluate(config(store, output="by-mu", extractor="digits", reference=reference)))
    expected = by_images["metrics"]["fd_digits"]["value"]
    assert by_statistics["metrics"]["fd_digits"]["value"] == pytest.approx(expected, rel=1e-6)
    assert "precision" in by_statistics["not_available"]
    for extractor, message in ((TOY, "toy-quarters"), ("digits", "digits-0123")):
        np.savez(tmp_path / "other", **statistics, extractor="digits-0123")
        with pytest.raises(ValueError, match=message):
            evaluate(config(store, output="mistaken", extractor=extractor, reference=str(tmp_path / "other.npz")))
    assert not storage.exists(storage.join(store, "mistaken"))


def test_noise_is_measured_by_the_digits_network(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "600 images" in plan(config(store, extractor="digits", output="by-digits"))[1]
    uri = evaluate(config(store, extractor="digits", output="by-digits"))
    content = json.loads(Path(uri).read_text())
    metrics = content["metrics"]
    assert set(metrics) == {
        "fd_digits", "fd_infinity_digits", "kid_digits", "precision", "recall", "density", "coverage", "authpct",
        "clipped_density", "clipped_coverage", "inception_score_digits", "inception_score_10split_digits", "accuracy",
        "vendi_score",
    }  # fmt: skip
    assert next(iter(metrics)) == "fd_infinity_digits"
    assert content["extractor"]["held_out_accuracy"] > 0.97
    unpaired = {"accuracy", "vendi_score", "inception_score_digits", "inception_score_10split_digits"}
    at_equal_counts = {"density", "coverage", "clipped_density", "clipped_coverage"}
    for name, entry in metrics.items():
        assert entry["n"] == 600 and entry["extractor"] == content["extractor"]["fingerprint"]
        if name in unpaired:
            assert entry["n_reference"] is None, name
        else:
            assert entry["n_reference"] == (600 if name in at_equal_counts else 1437), name
        assert entry["seeds"] == {"seed": None, "indices": [0, 600]}
        assert entry["interval"] or entry["note"]
    assert (
        metrics["fd_digits"]["value"] > 5 and metrics["precision"]["value"] < 0.5 and metrics["accuracy"]["value"] < 0.3
    )
    plain, corrected = metrics["fd_digits"], metrics["fd_infinity_digits"]
    assert plain["value"] - plain["bias"] == pytest.approx(corrected["value"]) and plain["bias"] > 0
    floor = content["held_out"]
    assert floor["n"] == 360 and set(floor["metrics"]) == set(metrics) and floor["uri"].endswith("validation")
    assert floor["metrics"]["precision"]["value"] > 0.8 and floor["metrics"]["fd_infinity_digits"]["value"] < 1
    assert list(content["per_class"]) == [str(digit) for digit in range(10)]
    assert all(entry["vendi_score"]["n"] == 60 for entry in content["per_class"].values())
    assert len(content["nearest_training_image"]["samples"]) == len(content["nearest_training_image"]["held_out"]) == 50
    assert content["reproduce"]["config"]["extractor"] == "digits" and content["reproduce"]["command"].startswith(
        "python "
    )
    printed = capsys.readouterr().out
    assert "bias at this n" in printed and "held-out real images" in printed and uri in printed

    page = (Path(uri).parent / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and 'src="http' not in page and "report.json" not in page
    before = Path(uri).read_bytes()
    assert evaluate(config(store, extractor="digits", output="by-digits")) == uri
    assert Path(uri).read_bytes() == before and "is complete" in capsys.readouterr().out


def test_held_out_images_are_measured_like_the_samples(store: str, tmp_path: Path) -> None:
    """`--floor` names held-out images for a reference without a validation split; as many as samples are used."""
    images = np.random.default_rng([76]).integers(0, 256, (900, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference", images[:200])
    np.savez(tmp_path / "held-out", images[200:])
    np.savez(tmp_path / "few", images[200:500])
    files = {"reference": str(tmp_path / "reference.npz"), "floor": str(tmp_path / "held-out.npz")}
    files |= {"samples": str(tmp_path / "few.npz")}
    content = storage.read_json(evaluate(config(store, output="with-floor", **files)))
    assert content["held_out"]["n"] == content["metrics"]["fd_toy"]["n"] == 300
    assert content["held_out"]["metrics"]["precision"]["value"] > 0.7
    with pytest.raises(FileNotFoundError, match=r"--floor none\.npz"):
        evaluate(config(store, output="no-floor", floor="none.npz"))


def test_held_out_images_with_other_labels_have_no_accuracy(store: str, tmp_path: Path) -> None:
    images = np.random.default_rng([78]).integers(0, 256, (40, 9, 8, 3), dtype=np.uint8)
    manifest = prepare(digits(str(tmp_path)))
    named = manifest.model_copy(update={"classes": tuple(f"class {label}" for label in range(10))})
    storage.write_bytes(f"{manifest.folder}/manifest.json", named.model_dump_json().encode())
    for index, image in enumerate(images):  # of several sizes, so that --image-size is needed
        storage.write_bytes(f"{tmp_path}/made/class {index % 10}/{index:02d}.png", png(image[index % 2 :]))
    np.savez(tmp_path / "held-out", images[:, 1:], np.arange(40) % 10)
    files = {"reference": manifest.folder, "samples": f"{tmp_path}/made", "extractor": "digits", "image_size": 8}
    by_numbers = storage.read_json(
        evaluate(config(store, output="floor-1", floor=str(tmp_path / "held-out.npz"), **files))
    )
    assert "accuracy" in by_numbers["metrics"] and "accuracy" not in by_numbers["held_out"]["metrics"]
    assert any("--floor" in warning and "labels" in warning for warning in by_numbers["warnings"])
    by_names = storage.read_json(evaluate(config(store, output="floor-2", floor=manifest.folder, **files)))
    assert by_names["held_out"]["metrics"]["accuracy"]["value"] > 0.9


def test_samples_equal_to_the_reference_are_reported(store: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = np.random.default_rng([77]).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "once", images)
    np.savez(tmp_path / "again", images[::-1])
    files = {"reference": str(tmp_path / "once.npz"), "samples": str(tmp_path / "again.npz")}
    content = storage.read_json(evaluate(config(store, output="itself", **files)))
    assert any("same images" in warning for warning in content["warnings"])
    assert content["metrics"]["fd_infinity_toy"]["value"] == 0 and "same images" in capsys.readouterr().out


def test_the_report_contains_the_settings_of_the_samples(store: str, tmp_path: Path) -> None:
    folder = write_samples(str(tmp_path), "made", tuple(str(digit) for digit in range(10)))
    uri = evaluate(config(store, output="with-making", samples=f"{tmp_path}/{folder}"))
    made_by = storage.read_json(uri)["samples"]["made_by"]
    page = (Path(uri).parent / "report.html").read_text()
    assert (
        made_by["config"] == MADE_BY | {"num_samples": 16}
        and "ab12cd34" in page
        and "num_steps 25" in page
        and "balanced" in page
    )


def test_the_evaluation_may_be_in_the_folder_of_the_samples(store: str) -> None:
    write_samples(store, "both", tuple("0123456789"))
    uri = evaluate(config(store, samples="both", output="both"))
    assert evaluate(config(store, samples="both", output="both")) == uri


def test_another_extractor_needs_another_folder(store: str) -> None:
    evaluate(config(store, output="claimed"))
    with pytest.raises(ValueError, match="extractor: toy-quarters before, digits-"):
        evaluate(config(store, output="claimed", extractor="digits"))


@pytest.mark.ray
def test_the_pool_gives_the_same_report(store: str, ray_session: None) -> None:
    unpooled = report(evaluate(config(store, output="alone")))
    pooled = report(evaluate(config(store, output="pooled", num_workers=2)))
    assert pooled == unpooled


@pytest.mark.slow
def test_the_metric_names_of_the_papers_belong_to_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden weights replace the published ones, with a reference in the published layout."""
    state, digest = write_weights(tmp_path / "weights.pth", monkeypatch)
    images = np.random.default_rng([74]).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples", images[:10])
    features = InceptionNetwork(state)(images[10:])
    spatial = features.spatial
    assert spatial is not None
    np.savez(
        tmp_path / "reference",
        images[10:],
        mu=features.pool.mean(0), sigma=np.cov(features.pool, rowvar=False),
        mu_s=spatial.mean(0), sigma_s=np.cov(spatial, rowvar=False),
    )  # fmt: skip
    settings = {"store": str(tmp_path), "output": "evaluation", "extractor": "inception", "num_workers": 0}
    files = {"samples": "samples.npz", "reference": "reference.npz", "extractor_weights": "weights.pth"}
    content = storage.read_json(evaluate(EvaluationConfig(**settings, **files)))
    assert set(content["metrics"]) == {
        "fid", "sfid", "kid", "inception_score", "inception_score_10split", "precision", "recall", "precision_openai",
        "recall_openai", "density", "coverage", "clipped_density", "clipped_coverage", "vendi_score",
    }  # fmt: skip
    assert content["extractor"]["fingerprint"] == f"inception-{digest[:12]}"
    assert content["metrics"]["fid"]["interval"] is None and "2 D" in content["metrics"]["fid"]["note"]
    assert content["metrics"]["fid"]["value"] == pytest.approx(
        frechet_distance_of_rows(features.pool, InceptionNetwork(state)(images[:10]).pool), rel=1e-3
    )


def test_a_published_batch_as_reference_leaves_its_folder_unchanged(store: str, tmp_path: Path) -> None:
    images = np.random.default_rng([73]).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference", images)
    uri = evaluate(config(store, output="against-batch", reference=str(tmp_path / "reference.npz")))
    report = storage.read_json(uri)
    assert report["metrics"]["fd_toy"]["value"] < 0.2  # both are noise
    assert report["metrics"]["precision"]["value"] > 0.8
    assert report["not_available"]["per_class"] == "the reference has no labels"
    assert report["nearest_training_image"] == {} and report["closest_pairs"] == []
    assert report["reference"]["what"] == "reference images" and report["held_out"] is None
    page = (Path(uri).parent / "report.html").read_text()
    assert "authpct" not in report["metrics"] and "training image" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference.npz"]
