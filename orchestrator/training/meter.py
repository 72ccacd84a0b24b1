"""The metrics of a training: mean losses, speed, norms, memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from cluster.collectives import Group
from cluster.trainer import WorkerContext
from orchestrator.arithmetic import platform
from orchestrator.cost import peak_flops, training_flops
from orchestrator.training.config import Config
from orchestrator.training.losses import Terms
from orchestrator.training.state import TrainingState, learning_rate


class Meter:
    """Sums the metrics of a worker, and reports the means over all workers.

    Sums of losses stay on the device, so that only a report waits for it.
    """

    def __init__(self, config: Config, context: WorkerContext, group: Group) -> None:
        self._config, self._context, self._group = config, context, group
        self._flops = training_flops(config.model)  # of one image
        self._peak = peak_flops(platform(context.device)["device"], config.dtype)
        self._names: list[str] = []
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | None = None  # float64 [terms + 1, 4]: by quartile of t; the last row counts images
        self._norms: list[Tensor] = []
        self._steps, self._undecodable, self._waited, self._since = 0, 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def add(self, all_terms: list[Terms], norm: Tensor, undecodable: int) -> None:
        """Add a step: loss terms of its microbatches, gradient norm, number of undecodable images."""
        self._names = [name for name in all_terms[0] if name != "t"]
        for terms in all_terms:
            sums = sums_by_quartile(terms, self._names, self._config.diffusion.num_timesteps)
            self._sums = sums if self._sums is None else self._sums + sums
        self._norms.append(norm)
        self._undecodable += undecodable
        self._steps += 1

    def report(self, state: TrainingState) -> Iterator[dict[str, Any]]:
        """Yield the means since the last report as a record, on rank 0; all workers must iterate."""
        state.settle()
        elapsed = time.perf_counter() - self._since
        assert self._sums is not None, "a report follows a step"
        sums = self._group.sum(self._sums.cpu())
        waited, undecodable = self._group.sum(torch.tensor([self._waited / elapsed, self._undecodable])).tolist()
        memory = max(self._group.gather(_peak_memory(self._context.device)))
        if self._context.rank == 0:
            good = [norm for norm in torch.stack(self._norms).tolist() if isfinite(norm)]
            rate = self._steps * self._config.batch_size / elapsed
            squares = torch._foreach_norm([tensor.detach() for tensor in state.model.parameters()])
            metrics = means_by_quartile(sums, self._names) | {
                "images_per_second": rate,
                "data_wait_fraction": waited / self._group.world_size,
                "undecodable_images": undecodable,
                "learning_rate": learning_rate(self._config, state.position - self._config.batch_size),
                "skipped_steps": float(len(self._norms) - len(good)),
                "param_norm": float(torch.stack(squares).norm()),
                "peak_memory_bytes": float(memory),
            }
            if good:
                metrics["grad_norm"] = sum(good) / len(good)
            if self._config.dtype == "float16":
                metrics["log2_loss_scale"] = state.log2_loss_scale
            if self._peak:
                metrics["mfu"] = rate * self._flops / (self._peak * self._group.world_size)
            yield {"images": state.position, "metrics": metrics}
        self._restart()


def sums_by_quartile(terms: Terms, names: list[str], num_timesteps: int) -> Tensor:
    """Return sums of the named terms by quartile of t, float64 [names + 1, 4]; the last row is the number of images.

    The result is on the device of the terms, and the host does not wait for it.
    """
    values = torch.stack([terms[name].double() for name in names] + [torch.ones_like(terms["t"], dtype=torch.float64)])
    quartile = 4 * terms["t"] // num_timesteps
    inside = torch.nn.functional.one_hot(quartile, 4).to(values)
    return values @ inside


def means_by_quartile(sums: Tensor, names: list[str]) -> dict[str, float]:
    """Return the means from these sums: NAME over all images, NAME_q0 to NAME_q3 in the quartiles that have images."""
    means = {}
    *rows, counts = sums.tolist()
    for name, row in zip(names, rows, strict=True):
        means[name] = sum(row) / sum(counts)
        means |= {f"{name}_q{q}": row[q] / counts[q] for q in range(4) if counts[q]}
    return means


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory of this worker in bytes: of its GPU, or of its process if it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
