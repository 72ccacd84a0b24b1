"""The audit log: what every step of a training consumed, row by row, to show that order and noise are as planned."""

import os
import uuid
import zlib

from torch import Tensor

from orchestrator import storage
from orchestrator.training.losses import Microbatch, Terms


class AuditLog:
    """One worker's part of the log: an object for each step, whole or absent, written before the weights change.

    Its name tells position, rank, number of workers, process and attempt, so that what a killed attempt left and what
    the next one repeats stand side by side.
    """

    def __init__(self, folder: str, rank: int, world_size: int) -> None:
        self._folder = folder
        self._who = f"{rank:04d}-of-{world_size:04d}-process-{os.getpid()}-{uuid.uuid4().hex[:12]}"

    def write(self, position: int, batches: list[Microbatch], found: list[Terms]) -> None:
        """Record the step that starts at `position` images, from the tensors that it consumed and its loss terms."""
        rows = []
        for batch, terms in zip(batches, found, strict=True):
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
        storage.write_json(storage.join(self._folder, f"{position:012d}-{self._who}.json"), content)


def _checksums(values: Tensor) -> list[int]:
    """CRC-32 of every row's bytes."""
    return [zlib.crc32(row.tobytes()) for row in values.cpu().numpy()]
