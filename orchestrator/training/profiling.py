"""A profile of some steps: times of operations, and on a GPU the memory they use."""

import os
import tempfile
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from orchestrator import storage


class StepProfiler:
    """A context that profiles `steps` of a process; the first step is 0. With an empty range it does nothing.

    Writes trace.json for chrome://tracing or Perfetto and, on a GPU, memory.pickle for pytorch.org/memory_viz into
    `folder`, a URI.
    """

    def __init__(self, folder: str, steps: range, device: torch.device) -> None:
        self._folder, self._steps, self._device = folder, steps, device
        self._done = 0
        self._running: profile | None = None

    def __enter__(self) -> Self:
        self._turn()
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:  # the training ended before the last of these steps
            self._write()

    def step(self) -> None:
        """Count a finished step."""
        self._done += 1
        self._turn()

    def _turn(self) -> None:
        if self._steps and self._done == self._steps.start:
            on_gpu = self._device.type == "cuda"
            if on_gpu:
                torch.cuda.memory._record_memory_history()
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()
        elif self._running is not None and self._done == self._steps.stop:
            self._write()

    def _write(self) -> None:
        assert self._running is not None
        self._running.stop()
        with tempfile.TemporaryDirectory() as here:
            self._running.export_chrome_trace(os.path.join(here, "trace.json"))
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(os.path.join(here, "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            for name in sorted(os.listdir(here)):
                with open(os.path.join(here, name), "rb") as file:
                    storage.write_bytes(storage.join(self._folder, name), file.read())
        self._running = None
