"""The whole search: kill and resume, records, result and pictures."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from cluster.session import address
from jobs.command_line import parse
from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.evaluation.references import Reference
from orchestrator.generation.presets import generation_presets
from orchestrator.search import evaluator, job
from orchestrator.search.config import Limit, SearchConfig
from orchestrator.search.evaluator import class_mismatch
from orchestrator.search.job import plan, search
from orchestrator.search.presets import search_presets
from orchestrator.search.result import summary
from orchestrator.search.space import Setting, SpaceConfig
from tests.benchmarks.demo_search import Demo, compare, demonstrate, grid_config, halving_config
from tests.orchestrator.digits import digits
from tests.orchestrator.networks import CLASSIFIER, UNET, save_network
from tests.orchestrator.search.counted_search import make_counted_worker

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with the digits dataset and two networks of random weights."""
    folder = str(tmp_path_factory.mktemp("store"))
    prepare(digits(folder))
    for name, architecture in (("unet.safetensors", UNET), ("classifier.safetensors", CLASSIFIER)):
        save_network(folder, name, architecture)
    return folder


def config(store: str, **changes: Any) -> SearchConfig:
    settings: dict[str, Any] = {
        "store": store, "weights": ("unet.safetensors",), "classifier": "classifier.safetensors",
        "reference": "digits", "output": "search", "space": SpaceConfig(scales=(0.0, 2.0), num_steps=(2, 3)),
        "rungs": (32, 96), "trials": 4, "round_size": 4, "batch_size": 32,
    }  # fmt: skip
    return SearchConfig(**settings | changes)


def modification_times(folder: str) -> dict[str, int]:
    """Return the modification times of all finished objects."""
    paths = (Path(folder, name) for name in storage.list_names(folder, recursive=True))
    return {str(path): path.stat().st_mtime_ns for path in paths}


@pytest.mark.ray
def test_a_killed_search_resumes_without_repeating_a_batch_and_has_the_same_result(
    store: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_config, log = config(store, output="killed"), tmp_path / "log"
    command = [sys.executable, "-m", "tests.orchestrator.search.counted_search", job_config.model_dump_json(), str(log)]
    environment = os.environ | {"RAY_ADDRESS": address()}
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not log.exists() or len(log.read_text().split()) < 3:
        assert driver.poll() is None, "the search ended before it was killed"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(2)  # its workers notice the death and end
    folder = f"{store}/killed/trials"
    before, drawn_before = modification_times(folder), len(log.read_text().split())
    finished = sum(name.endswith(".safetensors") and "block" in name for name in before)
    assert not Path(store, "killed", "search.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(job, "make_worker", partial(make_counted_worker, str(log)))
        search(job_config)
    after, drawn = modification_times(folder), log.read_text().split()
    assert {name: after[name] for name in before} == before, "a finished object was written again"
    blocks = sum("block" in name for name in after)
    assert len(drawn) - drawn_before == blocks - finished, "a finished batch was drawn again"
    assert max(Counter(drawn).values()) <= 2, "a batch was drawn twice in one attempt"

    result = storage.read_json(f"{store}/killed/search.json")
    assert result["samples"] == 32 * blocks, "the counted samples differ from those that were drawn"
    check_result(store, job_config, result)
    undisturbed = storage.read_json(search(config(store, output="undisturbed", num_workers=0)))
    assert undisturbed == result, "a kill, the number of workers or the order of completion changed the result"


def check_result(store: str, job_config: SearchConfig, result: dict[str, Any]) -> None:
    """Check the content of search.json, sampling from it, and the pictures."""
    assert result["seeds"] == {"search": 0, "final": job_config.fresh_seed} and not result["failed"]
    assert result["winner"]["seed"] == job_config.fresh_seed and result["winner"]["n"] == 96
    assert result["winner"]["metrics"]["fd_digits"]["interval"] is not None
    assert len(result["trials"]) == 4 and result["front"]
    for trial in result["trials"]:
        assert set(trial["rungs"]) <= {"32", "96"} and trial["samples"] >= 32
        status = trial["status"]
        assert status in ("winner", "not eliminated") or "significantly" in status or "not promoted" in status
        if status == "not eliminated":
            assert trial["behind_winner"]["fd_digits"]["value"] >= 0
    assert result["finalists"][0]["behind_winner"]["fd_digits"]["value"] == 0
    assert len(result["finalists"]) < 2 or result["finalists"][1]["behind_winner"]["fd_digits"]["interval"]
    text = summary(result)
    assert text.startswith("winner  ddim, ") and "96 fresh samples (seed 1000003)" in text and "next    " in text

    uri = f"{store}/{job_config.output}/search.json"
    generation = parse("Generate.", generation_presets(), ["digits", "--from-search", uri])
    setting = result["winner"]["setting"]
    assert generation.sampler.model_dump() == setting["sampler"]
    assert generation.guidance.scale == setting["guidance"]["scale"]
    assert generation.weights == "unet.safetensors"
    for name in ("guidance.png", "front.png", "scales.png"):
        image = Image.open(io.BytesIO(storage.read_bytes(f"{store}/{job_config.output}/{name}"))).convert("L")
        grey = np.asarray(image)
        assert grey.min() < 100 and grey.max() == 255 and min(image.size) > 50, f"{name} is blank"
    page = storage.read_bytes(f"{store}/{job_config.output}/report.html").decode()
    assert page.count("data:image/png;base64,") == 3 and f"--from-search {job_config.output}" in page
    assert all(str(Setting(**trial["setting"])) in page for trial in result["trials"])


def test_a_failing_trial_is_in_the_result_and_a_larger_budget_resumes_the_search(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights, a scale of 1e38 gives non-finite samples."""
    space = SpaceConfig(scales=(0.0, 1.0, 1e38), num_steps=(2,), continuous=False)
    changes = {"space": space, "trials": 3, "round_size": 3, "finalists": 1, "num_workers": 0}
    job_config = config(store, output="failing", budget="224", **changes)
    result = storage.read_json(search(job_config))
    assert result["stopped_by_budget"] and result["samples"] <= 224
    ((setting, reason),) = result["failed"].items()
    assert "1e+38" in setting and "FloatingPointError" in reason
    larger = storage.read_json(search(job_config.model_copy(update={"budget": None})))
    assert not larger["stopped_by_budget"] and larger["samples"] >= result["samples"]
    capsys.readouterr()
    search(job_config.model_copy(update={"budget": None}))
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"alpha: 0\.05 before, 0\.1 now"):
        search(job_config.model_copy(update={"alpha": 0.1}))


def make_breaking_worker(folder: str, config: SearchConfig) -> Callable[[evaluator.Block], evaluator.BlockResult]:
    """Return the real worker, which raises a memory error once."""
    real = evaluator.make_block

    def make_block(*arguments: Any) -> evaluator.BlockResult:
        if storage.put_if_absent(f"{folder}/broke", b""):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return real(*arguments)

    evaluator.make_block = make_block  # type: ignore[assignment]
    work = evaluator.make_worker(config)

    def work_and_restore(block: evaluator.Block) -> evaluator.BlockResult:
        try:
            return work(block)
        finally:
            evaluator.make_block = real

    return work_and_restore


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_machine_is_not_recorded_as_a_result(
    store: str, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    job_config = config(store, output=f"broken-{num_workers}", space=SpaceConfig(scales=(0.0,), continuous=False,
                    num_steps=(2,)), trials=1, round_size=1, finalists=1, num_workers=num_workers)  # fmt: skip
    monkeypatch.setattr(job, "make_worker", partial(make_breaking_worker, str(tmp_path)))
    if not num_workers:  # without a pool, only the same command retries it
        with pytest.raises(RuntimeError, match="uncorrectable ECC"):
            search(job_config)
    result = storage.read_json(search(job_config))
    assert Path(tmp_path, "broke").exists() and not result["failed"] and len(result["trials"]) == 1


def test_a_damaged_block_is_named_and_regenerated_after_it_is_deleted(store: str) -> None:
    job_config = config(store, output="damaged", space=SpaceConfig(scales=(0.0,), continuous=False, num_steps=(2,)),
                    trials=1, round_size=1, finalists=1, num_workers=0)  # fmt: skip
    result = storage.read_json(search(job_config))
    names = storage.list_names(f"{store}/damaged/trials", recursive=True)
    (block,) = (
        f"{store}/damaged/trials/{name}" for name in names if name.endswith("seed-1000003/block-000001.safetensors")
    )
    for name in ("search.json", *(f"trials/{name}" for name in names if "n-" in name and "seed-1000003" in name)):
        storage.delete(f"{store}/damaged/{name}")
    Path(block).write_bytes(Path(block).read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"block-000001\.safetensors is damaged .*; delete it"):
        search(job_config)
    storage.delete(block)
    assert storage.read_json(search(job_config)) == result


def test_a_dry_run_estimates_the_cost(store: str) -> None:
    text = plan(config(store))[1]
    assert "4 settings of a grid of 4, and any scale between" in text
    match = re.search(r"at most 576 samples, ([\d,]+) network evaluations", text)
    assert match, "4 x 96, and 2 x 96 in the final evaluation"
    # half of the settings are guided, and the gradient of the classifier costs less than two passes of the model
    assert 576 * 2.5 < int(match[1].replace(",", "")) < 576 * 2.5 * 2
    assert "at most 250 samples" in plan(config(store, budget="250"))[1]
    assert "at most 230 samples" in plan(config(store, budget="10%"))[1], "including the final evaluation"
    assert "or 1.5h" in plan(config(store, budget="1.5h"))[1]


def test_presets_are_valid() -> None:
    assert {"digits", "images", "imagenet64", "released"} <= set(search_presets())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs": (64, 32)}, "rungs"),
        ({"rungs": (8, 32)}, "at least 32"),
        ({"classifier": None}, "--classifier"),
        ({"fresh_seed": 0}, "fresh_seed=0"),
        ({"constraints": ("recall=0.4",)}, "not of the form"),
        ({"budget": "soon"}, "budget='soon'"),
        ({"constraints": ("evaluations>=9",)}, "only be bounded from above"),
        ({"budget": "200"}, "budget=200 must be at least 224 samples"),
        ({"objective": ("recall", "recall")}, "twice"),
    ],
)
def test_a_wrong_config_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config("store", **changes)


def test_a_wrong_objective_or_constraint_is_an_error_before_ray_starts(store: str) -> None:
    with pytest.raises(ValueError, match=r"'fid' is not a metric .* use fd_digits, "):
        search(config(store, output="wrong", objective=("fid",)))
    with pytest.raises(ValueError, match="constraints=evaluations<=1"):
        search(config(store, output="wrong", constraints=("evaluations<=1",)))


def test_budgets_are_samples_hours_or_a_share() -> None:
    assert Limit.parse("12,288") == Limit(12_288) and Limit.parse("1.5h") == Limit(1.5, "h")
    assert Limit.parse("25%") == Limit(25, "%") and Limit.parse(None) == Limit()


def test_a_small_demo_agrees_with_the_grid_and_counts_its_samples(store: str) -> None:
    demo = Demo(
        folder=store, scales=(0.0, 1.0, 30.0, 90.0), num_steps=(2, 3), samplers=("ddim",), rungs=(64, 192),
        share=0.9, workers=0, weights="unet.safetensors", classifier="classifier.safetensors", dataset="digits",
    )  # fmt: skip
    result = demonstrate(demo)
    assert result["broken"] == [] and result["evaluations_ratio"] <= 0.9 and result["grid_samples"] == 8 * 192
    low, high = result["regret"]["interval"]
    assert low <= max(result["regret"]["value"], 0) <= high or result["grid_winner"] == result["search_winner"]
    assert result["variance_unpaired_over_paired"]["median"] > 1

    grid, halving = grid_config(demo, 8), halving_config(demo, 8)
    results = [storage.read_json(f"{store}/{config.output}/search.json") for config in (grid, halving)]
    assert results[1]["samples"] == result["search_samples"]
    worst = max(results[0]["trials"], key=lambda trial: trial["objective"]["fd_digits"]["value"])
    wrong = results[1] | {"winner": results[1]["winner"] | {"setting": worst["setting"]}}
    assert "significantly worse" in compare(demo, grid, results[0], wrong)["broken"][0]
    assert "of the grid's evaluations" in compare(replace(demo, share=0.01), grid, *results)["broken"][0]


def test_labels_of_other_classes_are_refused_or_not_measured() -> None:
    def reference(*classes: str) -> Reference:
        return Reference("datasets/some", "digits", {}, None, classes=classes)

    assert class_mismatch(("a", "b"), reference("a", "b")) == "" == class_mismatch((), reference("a"))
    assert "cannot be matched" in class_mismatch(("0", "1"), reference("a", "b"))
    with pytest.raises(ValueError, match="only --weights has 'b'"):
        class_mismatch(("a", "b"), reference("a", "c"))
    with pytest.raises(ValueError, match="another order"):
        class_mismatch(("a", "b"), reference("b", "a"))


def test_a_newer_snapshot_does_not_change_a_search_that_is_resumed(store: str) -> None:
    save_network(store, "going/weights/images-000000000512-ema-0.9.safetensors", UNET)
    job_config = config(store, output="attempts", weights=("going",), trials=1, num_workers=0)
    uri = search(job_config)
    result = storage.read_json(uri)
    save_network(store, "going/weights/images-000000001024-ema-0.9.safetensors", UNET, seed=7)
    for name in storage.list_names(f"{store}/attempts", recursive=True):
        if name == "search.json" or "block-000002" in name or "n-000096" in name:
            storage.delete(f"{store}/attempts/{name}")
    assert storage.read_json(search(job_config)) == result
