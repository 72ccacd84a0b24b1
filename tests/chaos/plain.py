"""The training loop in plain processes with a gloo process group, without Ray, for tests and comparisons."""

import os
import tempfile
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import count

import torch
import torch.distributed
import torch.multiprocessing

from cluster.trainer import WorkerContext
from orchestrator.training.config import Config
from orchestrator.training.job import train_loop

Loop = Callable[[WorkerContext], None]


def train_plainly(config: Config, workers: int, steps: int | None = None) -> None:
    """Train with a number of local processes, to the end or for a number of steps."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["orchestrator.training.job"])
    context = start_plainly(partial(train_loop, config), workers, steps)
    while not context.join():
        pass


def start_plainly(loop: Loop, workers: int, steps: int | None = None) -> torch.multiprocessing.ProcessContext:
    """Start plain processes in one process group that run `loop`; after `steps` steps their stop flag is set."""
    rendezvous = os.path.join(tempfile.gettempdir(), f"admiral-meeting-{uuid.uuid4().hex}")
    context = torch.multiprocessing.start_processes(
        _worker,
        (workers, rendezvous, loop, steps, dict(os.environ)),
        nprocs=workers,
        join=False,
        start_method="forkserver",
    )
    assert context is not None
    return context


def _worker(
    rank: int, world_size: int, rendezvous: str, loop: Loop, steps: int | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # the fork server has the environment of its start
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{rendezvous}", timedelta(seconds=60), rank=rank, world_size=world_size
        )
    calls = count(1)
    loop(
        WorkerContext(
            rank,
            world_size,
            torch.device("cpu"),
            report=lambda record: None,
            stopping=lambda: next(calls) == steps,
            streams_on_cluster=False,
        )
    )
    if world_size > 1:
        torch.distributed.destroy_process_group()
