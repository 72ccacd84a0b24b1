"""The whole quickstart in small, as users start it. Jobs on a cluster: test_cluster.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.submission import ROOT, quiet_environment

SMALL = [
    "--total-images", "512", "--classifier-total-images", "512", "--num-samples", "96", "--rungs", "36", "72",
    "--scales", "0", "2", "--num-steps", "4",
]  # fmt: skip


@pytest.mark.ray
def test_the_quickstart_in_small_and_again(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/quickstart.py", "digits", "--folder", str(tmp_path), *SMALL]
    first = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr[-3000:]
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["num_samples"] == 96
    assert set(numbers["seconds_by_stage"]) == {
        "prepare", "train", "train_classifier", "search",
        "generate_guided", "evaluate_guided", "generate_unguided", "evaluate_unguided",
    }  # fmt: skip
    assert numbers["peak_rss_bytes"] > 2**20
    winner = numbers["search"]["winner"]
    assert winner["guidance"]["scale"] in (0.0, 2.0) and winner["sampler"]["num_steps"] == 4
    assert winner["sampler"]["name"] == "ddpm"
    assert numbers["search"]["samples"] <= 2 * 128 + 128, "all trials to the end, and the final"
    for name in ("accuracy", "fd_digits", "kid_digits", "precision", "recall", "inception_score_digits"):
        for found in (numbers["metrics_guided"][name], numbers["metrics_unguided"][name]):
            assert found["n"] == 96 and {"value", "n", "interval", "note", "seeds", "extractor"} <= found.keys()
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and 'src="http' not in page
    assert (tmp_path / "mlflow.db").exists()

    stages_before = (tmp_path / "stages.json").read_text()
    (tmp_path / "report.html").unlink()
    again = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("done already") == 8
    assert (tmp_path / "stages.json").read_text() == stages_before
    assert (tmp_path / "report.html").exists()
