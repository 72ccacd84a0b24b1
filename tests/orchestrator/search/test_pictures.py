"""The pictures of a search."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.search import pictures
from orchestrator.search.pictures import front_figure, guidance_figure
from orchestrator.search.result import Json
from orchestrator.search.space import Setting

FD = "fd_dinov2"


def trial(scale: float, n: int = 64) -> Json:
    setting = Setting(weights="w", sampler=SamplerConfig(), guidance=GuidanceConfig(scale=scale))
    estimate = {"value": 1.0 + scale, "interval": [0.5 + scale, 1.5 + scale]}
    metrics = dict.fromkeys((FD, "precision", "recall", "evaluations"), estimate)
    return {
        "setting": setting.model_dump(mode="json"), "n": n, "metrics": metrics, "objective": {FD: estimate},
        "rungs": {str(n): metrics}, "objective_by_rung": {str(n): {FD: estimate}},
    }  # fmt: skip


def test_an_extractor_without_classes_has_no_inception_score() -> None:
    data = guidance_figure([trial(0.0), trial(1.0)], [FD], "dinov2")
    assert np.asarray(Image.open(io.BytesIO(data))).std() > 0


def test_all_rungs_are_in_the_picture_of_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    plot_points = pictures._plot_points

    def recording_plot(axis: Any, points: Any, colour: str, label: str, **options: Any) -> None:
        labels.append(label)
        plot_points(axis, points, colour, label, **options)

    monkeypatch.setattr(pictures, "_plot_points", recording_plot)
    trials = [trial(1.0, n) for n in range(32, 44)]
    front_figure((FD, "evaluations"), {"trials": trials, "front": [], "winner": trials[0]})
    assert labels[:-1] == [f"n = {n}" for n in range(32, 44)]
