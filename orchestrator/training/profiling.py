"""A profile of some steps: the time and the memory of each operation."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

from orchestrator import storage


@contextmanager
def step_profiler(folder: str, steps: tuple[int, int] | None) -> Iterator[Callable[[], None]]:
    """Profile the steps [begin, end) of this process; yield a function to call after every step.

    Writes trace.json for chrome://tracing or Perfetto into `folder`, a URI. If `steps` is None, it does nothing.
    """
    if steps is None:
        yield lambda: None
        return
    begin, end = steps

    def write(finished: profile) -> None:
        with tempfile.TemporaryDirectory() as local:
            trace = Path(local, "trace.json")
            finished.export_chrome_trace(str(trace))
            storage.write_bytes(storage.join(folder, trace.name), trace.read_bytes())

    warmup = min(1, begin)
    plan = schedule(wait=begin - warmup, warmup=warmup, active=end - begin, repeat=1)
    with profile(schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True) as profiler:
        yield profiler.step
