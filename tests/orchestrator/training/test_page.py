"""Test the page of a training, and the verdict on a finished classifier."""

from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.metrics_log import MetricsLog, Record
from orchestrator.training.page import classifier_lines, write_run_page
from orchestrator.training.presets import adm_presets, classifier_presets


@pytest.mark.parametrize(
    ("training", "validation", "verdict"),
    [(0.9, 0.85, "it can guide"), (0.99, 0.6, "overfitting"), (0.3, 0.3, "too weak"), (0.9, None, "it can guide")],
)
def test_accuracy_by_noise_level_and_verdict_are_printed(
    training: float, validation: float | None, verdict: str, tmp_path: Path
) -> None:
    config = classifier_presets()["digits"][1]
    assert not classifier_lines(str(tmp_path), config), "there are no metrics yet"
    numbers = {"accuracy": training, "accuracy_q0": training, "accuracy_q3": 0.1}
    if validation is not None:
        numbers |= {"val_accuracy": validation, "val_accuracy_q0": validation, "val_accuracy_q3": 0.1}
    log = MetricsLog(str(tmp_path))
    log.append(Record(0, 1, numbers))
    log.close()
    first, second = classifier_lines(str(tmp_path), config)
    assert "10.0% at almost pure noise" in first and "chance: 10.0%" in first
    assert ("validation" in first) == (validation is not None) and verdict in second
    assert not classifier_lines(str(tmp_path), adm_presets()["digits"][1]), "a diffusion model has no verdict"


def test_samples_that_the_user_generates_into_the_run_are_no_previews(tmp_path: Path) -> None:
    for name in ("ema-0.9/images-000000000016.png", "ema-0.9/images-000000000032.png", "run.json", "shards/00.parquet"):
        storage.write_bytes(f"{tmp_path}/samples/{name}", b"content")
    page = write_run_page(str(tmp_path), adm_presets()["digits"][1])
    assert "ema-0.9 after 32 images" in page and "after 16 images" not in page
