"""Checkpoints beside the training: staged at a step's end, written by a thread, old ones removed."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from orchestrator.training import checkpoints
from orchestrator.training.checkpoints import Checkpoint
from orchestrator.training.config import TrainingConfig
from orchestrator.training.state import TrainingState

PATIENCE_SECONDS = 60.0  # how long a step may wait for the checkpoint before; collectives time out later
MAX_LOST = 3  # checkpoints in a row that may fail to be written

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Rank 0's hand on the run's checkpoints.

    `save` copies the state to the host and returns; a thread streams it to storage, commits it and prunes. Where
    storage fails the training goes on, saying so, and tries again at the next mark; MAX_LOST failures in a row end it.
    """

    def __init__(self, run: str, config: TrainingConfig, after: Callable[[Checkpoint], None]) -> None:
        self._run, self._config, self._after = run, config, after
        self._attempt = checkpoints.new_attempt()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def save(self, state: TrainingState, wait: bool = False) -> None:
        """Stage the state and have it written; with `wait`, as at the end, see to it that it is.

        Raises:
            RuntimeError: MAX_LOST checkpoints in a row could not be written, or this one with `wait`.
        """
        if not self._settled(math.inf if wait else PATIENCE_SECONDS):
            log.warning(
                "no checkpoint at %d images: the one before is still being written after %g s; "
                "raise checkpoint_every, or look at the storage",
                state.position,
                PATIENCE_SECONDS,
            )
            return
        self._stage(state)
        self._pending = self._thread.submit(self._write, Checkpoint(state.position, self._staged, state.facts()))
        if wait:
            self._lost = MAX_LOST - 1  # nobody tries again later
            self._settled(math.inf)

    def poll(self) -> None:
        """Look, without waiting, whether the last checkpoint is written. Raises as `save` does."""
        self._settled(0)

    def _settled(self, patience: float) -> bool:
        """Whether nothing is being written, after at most `patience` seconds."""
        deadline = time.monotonic() + patience
        while self._pending is not None and not self._pending.done() and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._pending is None or not self._pending.done():
            return self._pending is None
        pending, self._pending = self._pending, None
        if (error := pending.exception()) is None:
            self._lost = 0
            return True
        self._lost += 1
        if self._lost >= MAX_LOST:
            raise RuntimeError(f"the last checkpoints could not be written: {error}") from error
        log.warning("a checkpoint could not be written, the training goes on without it: %s", error)
        return True

    def _stage(self, state: TrainingState) -> None:
        """Copy the state to the host, into the same memory every time."""
        live = state.tensors()
        on_gpu = any(tensor.is_cuda for tensor in live.values())
        if not self._staged:
            self._staged = {name: torch.empty_like(t, device="cpu", pin_memory=on_gpu) for name, t in live.items()}
        for name, tensor in live.items():
            self._staged[name].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _write(self, checkpoint: Checkpoint) -> None:
        checkpoints.save_checkpoint(self._run, checkpoint, self._attempt)
        self._after(checkpoint)
        keep, keep_every = self._config.keep_checkpoints, self._config.keep_every
        checkpoints.prune_checkpoints(self._run, checkpoint.position, keep, keep_every)
