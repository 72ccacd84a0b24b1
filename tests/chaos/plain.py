"""The training loop in plain processes, without Ray: a process group over gloo, for tests and for comparison."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed
import torch.multiprocessing

from cluster.trainer import WorkerContext
from orchestrator.training import train_loop
from orchestrator.training_config import Config

Loop = Callable[[WorkerContext], None]


def train_plainly(config: Config, workers: int) -> None:
    """Train on so many processes of this machine."""
    run_plainly(partial(train_loop, config), workers)


def run_plainly(loop: Loop, workers: int, join: bool = True) -> torch.multiprocessing.ProcessContext | None:
    """Run `loop` in a process group of plain processes; with `join`, until it ends."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["orchestrator.training"])
    meeting = tempfile.mktemp(prefix="admiral-meeting-")
    return torch.multiprocessing.start_processes(
        _worker, (workers, meeting, loop), nprocs=workers, join=join, start_method="forkserver"
    )


def _worker(rank: int, workers: int, meeting: str, loop: Loop) -> None:
    if workers > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{meeting}", timedelta(seconds=60), rank=rank, world_size=workers
        )
    loop(
        WorkerContext(rank, workers, torch.device("cpu"), lambda record: None, lambda: False, streams_on_cluster=False)
    )
    if workers > 1:
        torch.distributed.destroy_process_group()
