"""The audit log: every sample that a training consumed, so that tests can check the order and the noise."""

import os
import uuid
import zlib

from torch import Tensor

from orchestrator import storage
from orchestrator.training.losses import Microbatch, Terms


class AuditLog:
    """Writes one worker's part of the log: one object for each step, before the weights change.

    The name of an object holds position, rank, number of workers, process and attempt. So the steps of an attempt that
    was killed and their repetitions by the next attempt are both in the log.
    """

    def __init__(self, folder: str, rank: int, world_size: int) -> None:
        self._folder = folder
        self._suffix = f"{rank:04d}-of-{world_size:04d}-process-{os.getpid()}-{uuid.uuid4().hex[:12]}"

    def write(self, position: int, batches: list[Microbatch], losses: list[Terms]) -> None:
        """Write the record of the step that starts at `position` images: the tensors that it used, and its losses."""
        rows = []
        for batch, terms in zip(batches, losses, strict=True):
            columns = (
                batch.samples.tolist(),
                batch.flips.tolist(),
                terms["t"].tolist(),
                _checksums(batch.x_start),
                _checksums(batch.noise),
                terms["loss"].double().tolist(),
            )
            rows += [list(row) for row in zip(*columns, strict=True)]
        content = {"columns": ["sample", "flip", "t", "pixels", "noise", "loss"], "rows": rows}
        storage.write_json(storage.join(self._folder, f"{position:012d}-{self._suffix}.json"), content)


def _checksums(values: Tensor) -> list[int]:
    """Return the CRC-32 of each row's bytes."""
    return [zlib.crc32(row.tobytes()) for row in values.cpu().numpy()]
