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

    The sums of losses stay on the device, so that the host waits for it only in a report.
    """

    def __init__(self, config: Config, context: WorkerContext, group: Group) -> None:
        self._config, self._context, self._group = config, context, group
        self._flops_per_image = training_flops(config.model)
        self._peak_flops = peak_flops(platform(context.device)["device"], config.dtype)
        self._names: list[str] = []  # of the loss terms
        self._reset()

    def _reset(self) -> None:
        self._sums: Tensor | None = None  # float64 [terms + 1, 4]: by quartile of t; the last row counts images
        self._norms: list[Tensor] = []
        self._steps = self._undecodable = 0
        self._data_wait = 0.0  # seconds
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context as waiting for data."""
        begin = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - begin

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
        elapsed = time.perf_counter() - self._start
        assert self._sums is not None, "a report follows a step"
        sums = self._group.sum(self._sums.cpu())
        own = torch.tensor([self._data_wait / elapsed, self._undecodable])
        data_wait, undecodable = self._group.sum(own).tolist()
        memory = max(self._group.gather(_peak_memory(self._context.device)))
        if self._context.rank == 0:
            finite_norms = [norm for norm in torch.stack(self._norms).tolist() if isfinite(norm)]
            rate = self._steps * self._config.batch_size / elapsed
            norms = torch._foreach_norm([tensor.detach() for tensor in state.model.parameters()])
            metrics = means_by_quartile(sums, self._names) | {
                "images_per_second": rate,
                "data_wait_fraction": data_wait / self._group.world_size,
                "undecodable_images": undecodable,
                "learning_rate": learning_rate(self._config, state.position - self._config.batch_size),
                "skipped_steps": float(len(self._norms) - len(finite_norms)),
                "param_norm": float(torch.stack(norms).norm()),
                "peak_memory_bytes": float(memory),
            }
            if finite_norms:
                metrics["grad_norm"] = sum(finite_norms) / len(finite_norms)
            if self._config.dtype == "float16":
                metrics["log2_loss_scale"] = state.log2_loss_scale
            if self._peak_flops:
                metrics["mfu"] = rate * self._flops_per_image / (self._peak_flops * self._group.world_size)
            yield {"images": state.position, "metrics": metrics}
        self._reset()


def sums_by_quartile(terms: Terms, names: list[str], num_timesteps: int) -> Tensor:
    """Return sums of the named terms by quartile of t, float64 [names + 1, 4]; the last row has the numbers of images.

    The result is on the device of the terms, and the host does not wait for it.
    """
    values = torch.stack([terms[name].double() for name in names] + [torch.ones_like(terms["t"], dtype=torch.float64)])
    quartile = 4 * terms["t"] // num_timesteps
    is_in_quartile = torch.nn.functional.one_hot(quartile, 4).to(values)  # [n, 4]
    return values @ is_in_quartile


def means_by_quartile(sums: Tensor, names: list[str]) -> dict[str, float]:
    """Return the means from `sums_by_quartile`: NAME of all images, NAME_q0 to NAME_q3 of quartiles with images."""
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
