"""The quickstart without its stages: which folders it continues, and its grids of samples."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.quickstart import job, page
from orchestrator.quickstart.config import QuickstartConfig


def test_a_folder_with_finished_stages_is_continued_only_with_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(name: str, command: list[str]) -> dict[str, Any]:
        ran.append(name)
        return {"seconds": 1.0, "command": command}

    def write_report(*_: object) -> str:
        (tmp_path / "report.html").touch()
        return str(tmp_path / "report.html")

    for name, value in (("_run", run), ("_winner", lambda _: (1.0, 12)), ("write_report", write_report)):
        monkeypatch.setattr(job, name, value)
    monkeypatch.setattr(job, "session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(job, "address", lambda: "")
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/mlflow.db")  # the quickstart sets them
    for num_workers in (1, 2):
        job.quickstart(QuickstartConfig(folder=str(tmp_path), tracking=False, num_workers=num_workers))
    assert len(ran) == 8
    with pytest.raises(ValueError, match=r"num_samples: 1000 before, 2000 now.*choose another --folder"):
        job.quickstart(QuickstartConfig(folder=str(tmp_path), tracking=False, num_samples=2000))


def test_a_row_of_the_grid_has_samples_of_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(25) % 10  # three samples of five classes, and two of the others
    images = np.full((25, 8, 8, 3), 20, np.uint8) * (1 + labels[:, None, None, None]).astype(np.uint8)
    monkeypatch.setattr(page, "count_samples", lambda _: 25)
    monkeypatch.setattr(page, "read_range", lambda *_: (images, labels))
    grid = np.asarray(Image.open(io.BytesIO(page.class_grid("samples"))))
    values = [sorted(set(row[row < 255].tolist())) for row in grid[:, :, 0]]
    assert [value for value in values if value] and all(len(value) <= 1 for value in values)
    assert {value[0] for value in values if value} == set(range(20, 201, 20))
