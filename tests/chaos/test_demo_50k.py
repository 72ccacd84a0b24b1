"""A small demo-50k: workers and a driver are killed, and all samples are those of a generation in this process."""

from pathlib import Path

import pytest

from cluster.session import address
from jobs.command_line import parse
from orchestrator.generation.job import generate
from orchestrator.generation.presets import generation_presets
from tests.chaos.demo_50k import Demo, Run, broken_promises, compare, disturb
from tests.orchestrator.networks import CLASSIFIER, UNET, save_network


@pytest.mark.ray
def test_generation_under_kills(
    ray_session: None, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    weights = save_network(str(tmp_path), "unet.safetensors", UNET)
    classifier = save_network(str(tmp_path), "classifier.safetensors", CLASSIFIER)
    networks = ("--weights", weights, "--classifier", classifier)
    settings = (*networks, "--sampler.num-steps", "40", "--batch-size", "8")
    demo = Demo(samples=102, kills=2, driver_kills=1, seed=11, shard_size=16, folder=str(tmp_path), settings=settings)
    run = disturb(demo, s3_bucket)
    print(run.killed)
    assert len(run.killed) == 3 and run.killed.count("driver") == 1

    location = ["--store", demo.folder, "--output", f"{s3_bucket}/undisturbed", "--num-workers", "0"]
    size = ["--num-samples", str(demo.samples), "--shard-size", str(demo.shard_size)]
    generate(parse("", generation_presets(), ["digits", *settings, *location, *size]))
    assert compare(demo, s3_bucket) == {"missing": 0, "doubled": 0, "hashes_equal": True}


def test_a_broken_promise_is_reported() -> None:
    report = {
        "missing": 0, "doubled": 0, "hashes_equal": True, "kills": 10, "driver_kills": 2,
        "driver_mib_at_half": 400.0, "driver_mib_at_end": 405.0,
    }  # fmt: skip
    assert broken_promises(Demo(), report) == []
    for name, value in (("missing", 1), ("doubled", 1), ("hashes_equal", False), ("kills", 9), ("driver_kills", 1)):
        assert len(broken_promises(Demo(), report | {name: value})) == 1
    assert broken_promises(Demo(), report | {"driver_mib_at_end": 500.0}) == ["the driver's memory grew"]


def test_memory_is_compared_from_half_of_the_samples_on() -> None:
    rows = [(0, 0, 100), (0, 5, 200), (0, 50, 300), (0, 100, 310), (1, 100, 400)]
    run = Run(100, [], [(life, done, mib << 20) for life, done, mib in rows])
    assert run.growth(0) == (300, 310)
