"""Collective operations of the workers of one process group."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)  # a collective that hangs for longer ends the attempt
BUCKET_VALUES = 16 << 20  # number of values that are added at a time

T = TypeVar("T")


class Group:
    """A worker's handle on the process group. Small values are exchanged by the CPUs, which does not synchronize a GPU.

    All workers must call the same methods in the same order. A group of one worker does not use torch.distributed.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._cpu = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any worker. All workers get the same result."""
        if self._cpu is None:
            return flags
        reduced = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=self._cpu)
        return tuple(bool(flag) for flag in reduced)

    def meet(self, timeout: timedelta) -> None:
        """Wait until all workers have called this, for `timeout` at most."""
        if self._cpu is not None:
            dist.monitored_barrier(self._cpu, timeout)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all workers."""
        total = values.clone()
        if self._cpu is not None:
            dist.all_reduce(total, group=self._cpu)
        return total

    def gather(self, item: T) -> list[T]:
        """Return the items of all workers in the order of their ranks."""
        if self._cpu is None:
            return [item]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, item, group=self._cpu)
        return gathered

    def from_first(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of rank 0's iterator on every worker. The other iterators are not used.

        Raises:
            Exception: on every worker, the error that rank 0's iterator raises.
        """
        if self._cpu is None:
            yield from items
            return
        while True:
            step: list[Any] = [None]
            if self.rank == 0:
                step = [_next(items)]
            dist.broadcast_object_list(step, src=0, group=self._cpu)
            kind, item = step[0]
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Copy rank 0's values into `tensors` on every worker."""
        if self.world_size > 1:
            for tensor in tensors:  # the default group of workers with GPUs may have no backend for CPUs
                dist.broadcast(tensor, src=0, group=None if tensor.is_cuda else self._cpu)

    def add_in_tree(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over all workers, in one fixed binary tree over the ranks.

        Every worker adds one share of all values in the order of the tree: ranks 0 + 1, 2 + 3, and so on, then the sums
        of these. If each worker contributes the sum over its own subtree of contiguous leaves, the result is equal to
        the bit for every number of workers that is a power of two. Each worker sends twice the bytes of the tensors,
        whatever the number of workers.
        """
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            values = torch.cat([tensor.flatten() for tensor in bucket])
            share = -(-len(values) // self.world_size)
            values = torch.nn.functional.pad(values, (0, share * self.world_size - len(values)))
            parts = torch.empty_like(values)
            dist.all_to_all_single(parts, values)
            sums = list(parts.split(share))
            while len(sums) > 1:
                sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
            dist.all_gather_into_tensor(values, sums[0])
            sizes = [tensor.numel() for tensor in bucket]
            for tensor, part in zip(bucket, values[: sum(sizes)].split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))


def _next(items: Iterator[T]) -> tuple[str, Any]:
    try:
        return "item", next(items)
    except StopIteration:
        return "end", None
    except Exception as error:  # noqa: BLE001 - raised on every worker
        return "error", error


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield buckets of consecutive tensors, each with at most BUCKET_VALUES values or with one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_VALUES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
