"""Checkpoints beside the training: staged at a step's end, written by a thread, old ones removed."""

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self

import torch
from torch import Tensor

from orchestrator.training import checkpoints
from orchestrator.training.checkpoints import Checkpoint
from orchestrator.training.config import TrainingConfig
from orchestrator.training.state import TrainingState

PATIENCE_SECONDS = 60.0  # how long a needed checkpoint may wait for the one before; collectives time out later
MAX_LOST = 3  # consecutive checkpoints that may fail to be written

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Rank 0's writer of the run's checkpoints.

    `save` copies the state to the host and returns; a thread writes it to storage, commits it and prunes. If storage
    fails, a warning says so, the training goes on and tries again at the next mark; MAX_LOST consecutive failures end
    it. If old checkpoints cannot be removed, a warning says so, and the new one counts.
    """

    def __init__(self, run: str, config: TrainingConfig, after: Callable[[Checkpoint], None]) -> None:
        self._run, self._config, self._after = run, config, after
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def save(self, state: TrainingState, needed: bool = False, last: bool = False) -> None:
        """Stage the state and have it written; while another checkpoint is being written, skip this one.

        If it is `needed`, because its weights are kept or a node goes away, it waits up to PATIENCE_SECONDS for the one
        before. The `last` one waits until both are written.

        Raises:
            ArithmeticError: the state is not finite; nothing is written.
            RuntimeError: MAX_LOST consecutive checkpoints could not be written, or the last one.
        """
        if not self._settled(math.inf if last else PATIENCE_SECONDS if needed else 0):
            log.warning(
                "no checkpoint at %d images: the one before is still being written; the training goes on. "
                "If this comes often, raise checkpoint_every or check the storage", state.position,
            )  # fmt: skip
            return
        state.check_finite()
        self._stage(state)
        self._pending = self._thread.submit(self._write, Checkpoint(state.position, self._staged, state.facts()))
        if last:
            self._lost = MAX_LOST - 1  # nobody tries again later
            self._settled(math.inf)

    def poll(self) -> None:
        """Check, without waiting, whether the last checkpoint is written. Raises as `save` does."""
        self._settled(0)

    def _settled(self, patience: float) -> bool:
        """Whether nothing is being written, after at most `patience` seconds."""
        if self._pending is None:
            return True
        if wait([self._pending], patience if patience < math.inf else None).not_done:
            return False
        error, self._pending = self._pending.exception(), None
        self._lost = self._lost + 1 if error else 0
        if self._lost >= MAX_LOST:
            raise RuntimeError(f"the last checkpoints could not be written: {error}") from error
        if error:
            log.warning("a checkpoint could not be written, the training goes on without it: %s", error)
        return True

    def _stage(self, state: TrainingState) -> None:
        """Copy the state to the host, into the same memory every time."""
        live = state.tensors()
        on_gpu = any(tensor.is_cuda for tensor in live.values())
        if not self._staged:  # contiguous, as they are written
            self._staged = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for name, t in live.items()}
        for name, tensor in live.items():
            self._staged[name].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _write(self, checkpoint: Checkpoint) -> None:
        checkpoints.save_checkpoint(self._run, checkpoint)
        self._after(checkpoint)
        keep, keep_every = self._config.keep_checkpoints, self._config.keep_every
        try:
            checkpoints.prune_checkpoints(self._run, checkpoint.position, keep, keep_every)
        except OSError as error:
            log.warning(
                "old checkpoints of %s could not be removed and stay; the training goes on: %s", self._run, error
            )
