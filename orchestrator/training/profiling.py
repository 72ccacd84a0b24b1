"""A profile of some steps: what each operation took, and on a GPU what held memory."""

import os
import tempfile
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from orchestrator import storage


class StepProfiler:
    """Traces the steps of one process from `steps.start` to `steps.stop`, counted from its first; a context.

    Writes trace.json, which chrome://tracing and Perfetto open, and on a GPU memory.pickle, for pytorch.org/memory_viz,
    into the folder `folder` (a URI). With no steps it does nothing.
    """

    def __init__(self, folder: str, steps: range, device: torch.device) -> None:
        self._folder, self._steps, self._device = folder, steps, device
        self._done = 0
        self._running: profile | None = None

    def __enter__(self) -> Self:
        self._turn()
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:  # the training ends before the window does
            self._write()

    def step(self) -> None:
        """Say that a step is over."""
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
