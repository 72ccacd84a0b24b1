"""A small run of the complete quickstart by its command. test_cluster.py tests jobs on a cluster."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.command_line import parse
from orchestrator.quickstart import job
from orchestrator.quickstart.presets import quickstart_presets
from tests.submission import ROOT, quiet_environment

# One worker: most of the time is the start of processes, and trainings on several workers are tested elsewhere.
SMALL = [
    "--num-workers", "1", "--total-images", "256", "--classifier-total-images", "256", "--num-samples", "96",
    "--rungs", "36", "72", "--scales", "0", "2", "--num-steps", "4",
]  # fmt: skip


@pytest.mark.ray
def test_a_small_quickstart_runs_all_stages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "jobs/quickstart.py", "digits", "--folder", str(tmp_path), *SMALL]
    first = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr[-3000:]
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["num_samples"] == 96
    assert set(numbers["seconds_by_stage"]) == {
        "prepare", "train", "train_classifier", "search",
        "generate_guided", "evaluate_guided", "generate_unguided", "evaluate_unguided",
    }  # fmt: skip
    winner = numbers["search"]["winner"]
    assert winner["guidance"]["scale"] in (0.0, 2.0) and winner["sampler"]["num_steps"] == 4
    assert winner["sampler"]["name"] == "ddpm"
    assert numbers["search"]["samples"] <= 2 * 128 + 128, "more samples than all trials and the final evaluation need"
    for name in ("accuracy", "fd_digits", "kid_digits", "precision", "recall", "inception_score_digits"):
        for metric in (numbers["metrics_guided"][name], numbers["metrics_unguided"][name]):
            assert metric["n"] == 96 and {"value", "n", "interval", "note", "seeds", "extractor"} <= metric.keys()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and 'src="http' not in page
    assert (tmp_path / "mlflow.db").exists()

    stages_before = (tmp_path / "stages.json").read_text()
    (tmp_path / "report.html").unlink()
    for name in ("MLFLOW_TRACKING_URI", "ADMIRAL_STORE", "RAY_ADDRESS"):
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/mlflow.db")  # restored at the end; the quickstart sets them
    monkeypatch.setattr(job, "session", lambda _: contextlib.nullcontext())  # all stages that need Ray are done
    monkeypatch.setattr(job, "address", lambda: "")
    job.quickstart(parse("Quickstart.", quickstart_presets(), ["digits", "--folder", str(tmp_path), *SMALL]))
    assert capsys.readouterr().out.count("already done") == 8
    assert (tmp_path / "stages.json").read_text() == stages_before
    assert (tmp_path / "report.html").exists()
