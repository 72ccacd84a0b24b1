"""Test that profiled steps are written as a trace into the run's folder."""

import json
from pathlib import Path

import pytest
import torch

from orchestrator.training.profiling import StepProfiler


@pytest.mark.parametrize(("steps", "made"), [(range(1, 3), 5), (range(3, 9), 5), (range(7, 9), 5), (range(0), 5)])
def test_the_window_is_traced(tmp_path: Path, steps: range, made: int) -> None:
    with StepProfiler(str(tmp_path), steps, torch.device("cpu")) as profiler:
        for _ in range(made):
            torch.ones(4).cumsum(0)
            profiler.step()
    trace = tmp_path / "trace.json"
    assert trace.exists() == bool(set(steps) & set(range(made)))
    if trace.exists():
        names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
        assert names.count("aten::cumsum") == len(set(steps) & set(range(made)))
