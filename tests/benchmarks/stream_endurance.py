"""Measure the growth of memory, log files and metrics while the stream reads thousands of units. Run by hand:

    python -m tests.benchmarks.stream_endurance [--units 10000] [--step-ms 0]

Starts a Ray with dashboard and metrics. Prints a row for each tenth of the units: the resident memory in MiB of the
largest process of each kind, the number of files in the log folder of the session, and the number of Prometheus series
of the node. The first three tenths are a warm-up. The exit code is 0 if after that no process has grown by more than
20 MiB, and there are at most 10 more files and 20 more series.
"""

import logging
import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro

from cluster.stream import stream

WARM_UP = 3  # tenths; Ray's metrics appear after about ten seconds
GROWTH_MIB = 20.0  # accepted growth of a process
MOST = {"log files": 10.0, "series": 20.0}  # accepted growth of counts

KINDS = {  # regular expressions for the command lines of processes
    "gcs": "gcs_server",
    "raylet": "raylet/raylet",
    "dashboard": "dashboard/dashboard.py",
    "agent": r"ray::DashboardAgent|dashboard/agent\.py",
    "stats actor": "ray::_StatsActor",
    "reader": r"ray::_ReaderActor",
}


@dataclass(frozen=True)
class Options:
    """The units."""

    units: int = 10_000
    rows: int = 64  # of a unit, 12 KiB each
    step_ms: float = 0.0  # time of the consumer for a unit, milliseconds


def read_unit(rows: int, unit: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield a block of small images."""
    yield {"unit": np.full(rows, unit), "image": np.full((rows, 64, 64, 3), unit % 256, np.uint8)}


def log_files() -> set[str]:
    """Return the paths of all files in the log folder of this process's Ray session."""
    import ray

    session: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    folder = Path(session.address_info["session_dir"], "logs")
    return {str(path) for path in folder.rglob("*") if path.is_file()}


def series() -> int:
    """Return the number of Prometheus series that this node's agent exports."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    return sum(not line.startswith("#") for line in text.splitlines())


def memory() -> dict[str, float]:
    """Return the resident memory of the largest process of each kind, in MiB."""
    this = psutil.Process()
    sizes = dict.fromkeys(["consumer", *KINDS], 0.0)
    sizes["consumer"] = this.memory_info().rss / 2**20
    for process in this.children(recursive=True):
        try:
            line, size = " ".join(process.cmdline()), process.memory_info().rss / 2**20
        except psutil.Error:
            continue  # the process has just ended
        for kind, pattern in KINDS.items():
            if re.search(pattern, line):
                sizes[kind] = max(sizes[kind], size)
    return sizes


def main(options: Options) -> int:
    """Print the table; return the exit code."""
    import ray

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(
        address="local", num_cpus=2, object_store_memory=300 << 20, include_dashboard=True, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    print(options)
    print(" ".join(f"{name:>11}" for name in ("units", "seconds", *memory(), "log files", "series")), flush=True)
    rows: list[dict[str, float]] = []
    files: list[set[str]] = []
    begin = time.perf_counter()
    blocks = stream(range(options.units), partial(read_unit, options.rows), ahead=16)
    for number, block in enumerate(blocks, 1):
        assert block["unit"][0] == number - 1
        time.sleep(options.step_ms / 1e3)
        if number % (options.units // 10) == 0:
            files.append(log_files())
            rows.append(memory() | {"log files": len(files[-1]), "series": series()})
            figures = [number, time.perf_counter() - begin, *rows[-1].values()]
            print(" ".join(f"{figure:11.0f}" for figure in figures), flush=True)
    ray.shutdown()
    first, last = rows[WARM_UP - 1], rows[-1]
    print("new log files:", *sorted(Path(path).name for path in files[-1] - files[WARM_UP - 1]))
    grown = [name for name in last if last[name] > first[name] + MOST.get(name, GROWTH_MIB)]
    print(f"grown: {', '.join(grown) or 'nothing'}")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
