"""Asynchronous checkpoints: the state is copied to the host after a step, and a thread writes it to storage."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self

import torch
from torch import Tensor

from orchestrator.training import checkpoints
from orchestrator.training.checkpoints import Checkpoint
from orchestrator.training.config import TrainingConfig
from orchestrator.training.state import TrainingState

PATIENCE_SECONDS = 60.0  # how long a needed checkpoint waits for the previous one; collectives time out after 300 s
MAX_FAILURES = 3  # consecutive checkpoints that cannot be written, after which the training ends

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run, on rank 0.

    `save` copies the state to the host and returns. A thread writes and commits the checkpoint, calls `after_saving`
    with it, and removes old checkpoints. If the storage fails, it logs a warning and the training continues until the
    next checkpoint; after MAX_FAILURES consecutive failures the training ends.
    """

    def __init__(self, run: str, config: TrainingConfig, after_saving: Callable[[Checkpoint], None]) -> None:
        self._run, self._config, self._after_saving = run, config, after_saving
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._failures = 0  # consecutive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def save(self, state: TrainingState, needed: bool = False, last: bool = False) -> None:
        """Copy the state and start writing it, or skip this checkpoint if the previous one is still being written.

        needed: wait up to PATIENCE_SECONDS for the previous one, because this checkpoint has a snapshot or a node is
        preempted. last: wait until the previous checkpoint and this one are written.

        Raises:
            ArithmeticError: the state is not finite; nothing is written.
            RuntimeError: MAX_FAILURES consecutive checkpoints or the last checkpoint could not be written.
        """
        timeout = PATIENCE_SECONDS if needed else 0
        if not self._finish_pending(None if last else timeout):
            log.warning(
                "no checkpoint at %d images: the previous one is still being written; the training continues. "
                "If this happens often, raise --checkpoint-every or check the storage", state.position,
            )  # fmt: skip
            return
        state.check_finite()
        self._stage(state)
        self._pending = self._thread.submit(self._write, Checkpoint(state.position, self._staged, state.facts()))
        if last:
            self._failures = MAX_FAILURES - 1  # a failure now ends the training
            self._finish_pending(None)

    def poll(self) -> None:
        """Check without waiting whether a checkpoint failed. Raises what `save` does."""
        self._finish_pending(0)

    def _finish_pending(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds (None: without limit); return whether no checkpoint is being written."""
        if self._pending is None:
            return True
        if wait([self._pending], timeout).not_done:
            return False
        error, self._pending = self._pending.exception(), None
        self._failures = self._failures + 1 if error else 0
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(
                f"the last checkpoints could not be written: {error}; check the storage, then run the same command, "
                "which continues at the newest checkpoint"
            ) from error
        if error:
            log.warning("a checkpoint could not be written, the training continues without it: %s", error)
        return True

    def _stage(self, state: TrainingState) -> None:
        """Copy the state to host memory, which is allocated once (pinned if the state is on a GPU)."""
        live = state.tensors()
        on_gpu = any(tensor.is_cuda for tensor in live.values())
        if not self._staged:  # contiguous, because safetensors writes no other tensors
            self._staged = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu) for name, t in live.items()}
        for name, tensor in live.items():
            self._staged[name].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _write(self, checkpoint: Checkpoint) -> None:
        checkpoints.save_checkpoint(self._run, checkpoint)
        self._after_saving(checkpoint)
        keep, keep_every = self._config.keep_checkpoints, self._config.keep_every
        try:
            checkpoints.prune_checkpoints(self._run, checkpoint.position, keep, keep_every)
        except OSError as error:
            log.warning("old checkpoints of %s could not be removed; the training continues: %s", self._run, error)
