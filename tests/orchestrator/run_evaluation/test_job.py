"""Quality along a training: the evaluated snapshots, their assessments, and the best one."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import load_networks
from orchestrator.run_evaluation import job
from orchestrator.run_evaluation.config import RunEvaluationConfig
from orchestrator.run_evaluation.job import evaluate_run, plan
from orchestrator.run_evaluation.result import Point, best_files, conclude, summary
from orchestrator.search.halving import Outcome
from orchestrator.search.space import Setting
from orchestrator.training.snapshots import Snapshot
from tests.orchestrator.digits import digits
from tests.orchestrator.networks import CLASSIFIER, UNET, save_network


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with the digits and a classifier with random weights."""
    folder = str(tmp_path_factory.mktemp("store"))
    prepare(digits(folder))
    save_network(folder, "classifier.safetensors", CLASSIFIER)
    return folder


def write_snapshot(store: str, run: str, images: int, average: str, seed: int = 1) -> None:
    save_network(storage.join(store, run, "weights"), f"images-{images:012d}-{average}.safetensors", UNET, seed)


def config(store: str, run: str, **changes: Any) -> RunEvaluationConfig:
    settings: dict[str, Any] = {
        "store": store, "weights": run, "classifier": "classifier.safetensors", "reference": "digits",
        "output": f"{run}-quality", "sampler": SamplerConfig(name="ddim", num_steps=2), "num_samples": 64,
        "batch_size": 32, "num_workers": 0,
    }  # fmt: skip
    return RunEvaluationConfig(**settings | changes)


def test_every_snapshot_and_average_is_evaluated_at_every_scale(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    for images in (64, 128):
        for average in ("ema-0.9", "ema-0.99"):
            write_snapshot(store, "grid", images, average, seed=images)
    job_config = config(store, "grid", scales=(0.0, 2.0), num_samples=80)
    result = storage.read_json(evaluate_run(job_config))
    curves = {f"ema-{rate} scale {scale}" for rate in ("0.9", "0.99") for scale in (0, 2)}
    assert {(p["images"], p["curve"]) for p in result["points"]} == {(n, c) for n in (64, 128) for c in curves}
    for point in result["points"]:
        assert point["metrics"]["precision"]["n"] == 80
        assert point["evaluations"] == (2 if point["setting"]["guidance"]["scale"] == 0 else pytest.approx(4, abs=1))
        assert (point["change"] is None) == (point["images"] == 64) == (point["verdict"] == "first")
    objectives = {(p["images"], p["setting"]["guidance"]["scale"]): p["objective"] for p in result["points"]}
    assert len(objectives) == 4 and all(
        point["objective"] == objectives[point["images"], point["setting"]["guidance"]["scale"]]
        for point in result["points"]
    ), "equal weights under two names are the same samples"
    for name in ("quality.png", "snapshots.png"):
        data = storage.read_bytes(storage.join(job_config.path(job_config.output), name))
        assert np.asarray(Image.open(io.BytesIO(data))).std() > 0
    printed = capsys.readouterr().out
    assert "--weights grid --ema ema-0.9" in printed and "--at best" in printed
    page = storage.read_bytes(storage.join(job_config.path(job_config.output), "report.html")).decode()
    assert all(curve in page for curve in curves) and page.count("data:image/png") == 2


def test_evaluated_points_are_not_repeated_and_more_can_be_added(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(store, "again", 64, "ema-0.9")
    evaluate_run(config(store, "again"))
    evaluated: list[Any] = []
    evaluate = job.evaluate

    def recording_evaluate(*arguments: Any) -> Any:
        evaluated.append(arguments[-1])
        return evaluate(*arguments)

    monkeypatch.setattr(job, "evaluate", recording_evaluate)
    evaluate_run(config(store, "again"))
    assert not evaluated
    write_snapshot(store, "again", 128, "ema-0.9", seed=2)
    evaluate_run(config(store, "again", scales=(0.0, 1.0), num_samples=64))
    assert len(evaluated) == 3, "the new snapshot at both scales, the old one at the new scale"


def test_a_run_that_was_trained_anew_is_refused(store: str) -> None:
    write_snapshot(store, "anew", 64, "ema-0.9")
    evaluate_run(config(store, "anew"))
    storage.delete(storage.join(store, "anew", "weights", f"images-{64:012d}-ema-0.9.safetensors"))
    write_snapshot(store, "anew", 64, "ema-0.9", seed=2)
    with pytest.raises(ValueError, match="first_snapshot"):
        evaluate_run(config(store, "anew"))


def test_the_selected_averages_may_change(store: str) -> None:
    for seed, average in enumerate(("ema-0.9", "ema-0.99"), 1):
        write_snapshot(store, "selected", 64, average, seed)
    for selection in (("ema-0.99",), ()):
        result = storage.read_json(evaluate_run(config(store, "selected", ema=selection)))
    assert {point["average"] for point in result["points"]} == {"ema-0.9", "ema-0.99"}


def test_a_dry_run_computes_no_average_and_an_impossible_one_is_named_once(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def average(_: object) -> None:
        raise ValueError("too few snapshots")

    monkeypatch.setattr(job, "average", average)
    for images in (64, 128):
        write_snapshot(store, "powers", images, "ema-0.9", seed=images)
        storage.write_bytes(f"{store}/powers/weights/power/images-{images:012d}-0.1.safetensors", b"")
    text = plan(config(store, "powers", ema=("ema-0.9",), sigma_rel=(0.05,), dry_run=True))[1]
    assert "4 snapshots" in text and not caplog.text
    for _ in range(3):
        assert len(job._snapshots(config(store, "powers", ema=("ema-0.9",), sigma_rel=(0.05,)))) == 2
    assert caplog.text.count("too few snapshots") == 2


def test_a_run_is_followed_until_its_training_ends(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(store, "followed", 64, "ema-0.9")
    lease_states = iter([(True, None), (True, 128), (True, None), (False, 192), (False, None)])

    def is_held(_: Any) -> bool:
        is_training, images = next(lease_states)
        if images:  # a snapshot that is written during this call must be evaluated after it
            write_snapshot(store, "followed", images, "ema-0.9", seed=images)
        return is_training

    monkeypatch.setattr(job.Lease, "is_held", is_held)
    monkeypatch.setattr(job, "POLL_SECONDS", 0.0)
    result = storage.read_json(evaluate_run(config(store, "followed", follow=True)))
    assert [point["images"] for point in result["points"]] == [64, 128, 192]


def test_a_generation_can_use_the_best_snapshot(store: str) -> None:
    for images in (64, 128):
        write_snapshot(store, "best", images, "ema-0.9", seed=images)
    result = storage.read_json(evaluate_run(config(store, "best")))
    job = GenerationConfig(store=store, weights="best", at="best", output="samples", num_samples=1)
    best = load_networks(job, "cpu").weights.sha256
    first = load_networks(job.model_copy(update={"at": str(result["best"]["images"])}), "cpu").weights.sha256
    other = load_networks(job.model_copy(update={"at": str(192 - result["best"]["images"])}), "cpu").weights.sha256
    assert best == first != other
    with pytest.raises(ValueError, match="snapshots at 64, 128"):
        load_networks(job.model_copy(update={"at": "65"}), "cpu")
    with pytest.raises(ValueError, match=r"ema-0\.5"):
        load_networks(job.model_copy(update={"ema": "ema-0.5"}), "cpu")
    write_snapshot(store, "unknown", 64, "ema-0.9")
    with pytest.raises(FileNotFoundError, match="evaluate_run"):
        load_networks(job.model_copy(update={"weights": "unknown"}), "cpu")


def test_a_plan_works_before_and_after_the_first_snapshot(store: str) -> None:
    assert "not there yet" in plan(config(store, "planned"))[1]
    with pytest.raises(FileNotFoundError, match="--snapshot-every"):
        evaluate_run(config(store, "planned"))
    write_snapshot(store, "planned", 64, "ema-0.9")
    write_snapshot(store, "planned", 96, "ema-0.9")
    with pytest.raises(ValueError, match=r"--ema ema-0\.5: planned has only ema-0\.9"):
        evaluate_run(config(store, "planned", ema=("ema-0.5",)))
    text = plan(config(store, "planned", scales=(0.0, 1.0)))[1]
    assert "2 snapshots from 64 to 96 images" in text and text.count("evaluations an image") == 2


# ------------------------------------------------------------------------------------------------ curves and verdicts


def point(images: int, mean: float, average: str = "ema-0.9", failed: str | None = None) -> Point:
    """Return a snapshot whose scores differ from the others by `mean` and a little noise."""
    rng = np.random.default_rng(images)
    shared = np.random.default_rng(0).standard_normal(512)
    scores = {} if failed else {"fd_digits": mean + shared + 0.1 * rng.standard_normal(512)}
    name = f"images-{images:012d}-{average}.safetensors"
    setting = Setting(weights=f"run/weights/{name}", sampler=SamplerConfig(), guidance=GuidanceConfig())
    metrics: dict[str, Any] = {"evaluations": {"value": 2}}
    return Point(Snapshot(images, average, name), setting, Outcome(scores, metrics=metrics, failed=failed))


def test_verdicts_of_a_curve_that_falls_levels_off_and_rises() -> None:
    job_config = config("runs", "run", num_samples=512)
    points = [point(1000 * i, mean) for i, mean in enumerate((5.0, 3.0, 2.0, 2.0, 2.5), 1)]
    result = conclude(job_config, [*points, point(3000, 4.0, "ema-0.99"), point(6000, 0.0, failed="NaN")])
    curve = [entry for entry in result["points"] if entry["average"] == "ema-0.9"]
    improving, level, worse = "still improving", "no significant change", "getting worse: overfitting"
    assert [entry["verdict"] for entry in curve] == ["first", improving, improving, level, worse]
    assert result["best"]["images"] in (3000, 4000) and result["as_good_from"] == 3000
    files = best_files(result)
    assert files["ema-0.99"] == "images-000000003000-ema-0.99.safetensors"
    assert files["any"] == files["ema-0.9"] == result["best"]["weights"].removeprefix("run/weights/")
    text = summary(result)
    assert "NaN" in text and text.count("<- best") == 1


def test_a_run_without_any_measured_snapshot_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        conclude(config("runs", "run"), [point(1000, 0.0, failed="not finite")])


def test_files_and_missing_classifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training run's folder"):
        config(str(tmp_path), "w.safetensors")
    with pytest.raises(ValueError, match="--classifier"):
        config(str(tmp_path), "run", classifier=None, scales=(0.0, 1.0))
