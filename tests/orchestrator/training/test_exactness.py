"""Test that reduction=exact gives the same SHA-256 of all weights on any number of workers, also if it changes."""

import hashlib
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cluster.trainer import WorkerContext
from models.diffusion import DiffusionConfig
from orchestrator.order import OrderConfig
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train_loop
from tests.orchestrator.training.runs import UNET, adm, context, final_state

STEPS = 8


def config_of(store: str, output: str, **changes: object) -> AdmConfig:
    """Return a training with everything that could depend on the number of workers: dropout, clipping, timesteps."""
    network = {"channel_mult": (1, 2), "attention_resolutions": (4,), "dropout": 0.2}
    settings: dict[str, Any] = {
        "model": UNET.model_copy(update=network), "reduction": "exact", "max_grad_norm": 0.5,
        "diffusion": DiffusionConfig(schedule="cosine", num_timesteps=4), "timesteps": "loss_second_moment",
        "order": OrderConfig(num_streams=4, shuffle_row_groups=2), "total_images": STEPS * 16,
        "log_every": 64, "checkpoint_every": 48, "num_workers": 1,
    }  # fmt: skip
    return adm(store, output, **settings | changes)


def _worker(rank: int, world_size: int, rendezvous: str, config: AdmConfig, steps: int) -> None:
    """Run one worker process, which joins its group and stops after a number of steps."""
    torch.distributed.init_process_group(
        "gloo", f"file://{rendezvous}", timedelta(minutes=5), rank=rank, world_size=world_size
    )
    calls = iter(range(1, 10**9))
    stopping = lambda: next(calls) >= steps  # noqa: E731
    train_loop(config, WorkerContext(rank, world_size, torch.device("cpu"), print, stopping, streams_on_cluster=False))
    torch.distributed.destroy_process_group()


def run(config: AdmConfig, world_size: int, steps: int = STEPS) -> None:
    rendezvous = str(Path(config.store) / uuid.uuid4().hex)
    arguments = (world_size, rendezvous, config, steps)
    torch.multiprocessing.start_processes(_worker, arguments, nprocs=world_size, start_method="forkserver")


def digest(config: AdmConfig) -> str:
    """Return the SHA-256 of weights, averages, optimizer and the timestep sampler's history at the end."""
    tensors = final_state(config)
    data = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(data).hexdigest()


def test_one_hash_for_every_number_of_workers_and_through_resizes(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["orchestrator.training.job"])
    hashes = {}
    for workers in (1, 2, 4):
        config = config_of(store, f"workers-{workers}")
        run(config, workers)
        hashes[f"{workers} workers"] = digest(config)
    config = config_of(store, "resized")
    for workers, steps in ((2, 3), (1, 2), (4, STEPS)):
        run(config, workers, steps)
    hashes["2 -> 1 -> 4 workers"] = digest(config)
    assert len(set(hashes.values())) == 1, hashes


def test_another_seed_gives_another_hash(store: str) -> None:
    hashes = set()
    for seed in (0, 1):
        config = config_of(store, f"seed-{seed}", seed=seed, total_images=16)
        train_loop(config, context())
        hashes.add(digest(config))
    assert len(hashes) == 2
