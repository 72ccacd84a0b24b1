"""A profile of some training steps by torch.profiler: the time and the memory of each operation."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from orchestrator import storage


@contextmanager
def step_profiler(folder: str, steps: tuple[int, int] | None) -> Iterator[Callable[[], None]]:
    """Profile steps of this process; yield a function that must be called at the end of every step.

    Write trace.json for chrome://tracing or Perfetto to `folder`, a URI.

    steps: [begin, end), counted from 0 at the start of the process; None = profile nothing.
    """
    if steps is None:
        yield lambda: None
        return
    begin, end = steps

    def write_trace(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(trace))
            storage.write_bytes(storage.join(folder, trace.name), trace.read_bytes())

    warmup = min(1, begin)
    phases = schedule(wait=begin - warmup, warmup=warmup, active=end - begin, repeat=1)
    with profile(schedule=phases, on_trace_ready=write_trace, record_shapes=True, profile_memory=True) as profiler:
        yield profiler.step
