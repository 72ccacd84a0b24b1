"""Test that profiled steps are written as a trace into the run's folder."""

import json
from pathlib import Path

import pytest
import torch

from orchestrator.training.profiling import step_profiler


@pytest.mark.parametrize(
    ("steps", "profiled"), [((1, 3), 2), ((0, 2), 2), ((3, 9), 2), ((5, 9), 0), ((7, 9), 0), (None, 0)]
)
def test_only_the_chosen_steps_are_traced(tmp_path: Path, steps: tuple[int, int] | None, profiled: int) -> None:
    with step_profiler(str(tmp_path), steps) as finished_step:
        for _ in range(5):
            torch.ones(4).cumsum(0)
            finished_step()
    trace = tmp_path / "trace.json"
    if profiled or trace.exists():
        names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
        assert names.count("aten::cumsum") == profiled
