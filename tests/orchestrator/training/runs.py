"""Configure a small training on the digits for tests, and read its checkpoints."""

from dataclasses import replace

import torch

from cluster.trainer import WorkerContext
from models.diffusion import DiffusionConfig
from models.unet import UNetConfig
from orchestrator.order import OrderConfig
from orchestrator.training.checkpoints import Checkpoint, read_newest
from orchestrator.training.config import AdmConfig

UNET = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=2,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1,),
    attention_resolutions=(),
    num_classes=10,
    dropout=0.1,
)


def adm(store: str, output: str, **changes: object) -> AdmConfig:
    settings: dict = {
        "store": store, "dataset": "digits", "output": output, "model": UNET,
        "diffusion": DiffusionConfig(schedule="cosine"), "order": OrderConfig(num_streams=2, shuffle_row_groups=2),
        "total_images": 96, "batch_size": 16, "learning_rate": 1e-3, "ema_rates": (0.9, 0.5), "random_flip": False,
        "checkpoint_every": 32, "log_every": 32, "num_workers": 0, "tracking": False,
    }  # fmt: skip
    return AdmConfig(**settings | changes)


def context(stop_after: int | None = None, records: list | None = None) -> WorkerContext:
    """Return the context of a single worker in this process. Its stop flag is set in step `stop_after`."""
    calls = iter(range(10**9))

    def stopping() -> bool:
        return stop_after is not None and next(calls) + 1 >= stop_after

    report = records.append if records is not None else lambda record: None
    return WorkerContext(0, 1, torch.device("cpu"), report, stopping, streams_on_cluster=False)


def final_state(config: AdmConfig) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint at the end of a training."""
    checkpoint = newest_checkpoint(config.path(config.output))
    assert checkpoint is not None and checkpoint.position == config.total_images
    return checkpoint.tensors


def newest_checkpoint(run: str) -> Checkpoint | None:
    """Return the newest usable checkpoint of `run`, or None if it has no checkpoints."""
    newest = None
    for part in read_newest(run):
        newest = replace(newest, tensors=newest.tensors | part.tensors) if newest and part.tensors else part
    return newest
