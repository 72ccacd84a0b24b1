"""Collective operations of the workers of one process group."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)  # a collective that hangs for longer ends the attempt
BUCKET_VALUES = 16 << 20  # values that are reduced at a time, which bounds the memory of the copies

T = TypeVar("T")


class Group:
    """A worker's handle on the process group.

    All workers must call the same methods in the same order. Flags, CPU tensors and objects are exchanged by gloo
    between CPUs, which does not synchronize a GPU. A group of one worker does not use torch.distributed.
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

    def barrier(self, timeout: timedelta) -> None:
        """Wait until all workers have called this. Raises RuntimeError after `timeout`."""
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

    def broadcast_items(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of rank 0's iterator on every worker. The iterators of the other workers are not used.

        Raises:
            Exception: on every worker, the error that rank 0's iterator raises.
        """
        if self._cpu is None:
            yield from items
            return
        while True:
            message: list[Any] = [_next(items) if self.rank == 0 else None]
            dist.broadcast_object_list(message, src=0, group=self._cpu)
            kind, item = message[0]
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Copy rank 0's values into `tensors` on every worker."""
        if self.world_size > 1:
            for tensor in tensors:  # the default group of workers with GPUs may have no backend for CPUs
                dist.broadcast(tensor, src=0, group=None if tensor.is_cuda else self._cpu)

    def all_reduce_in_tree(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over all workers, which is added in one fixed binary tree over the ranks.

        The tree adds ranks 0 + 1, 2 + 3, and so on, then the sums of these. If each worker contributes the sum over its
        own subtree of contiguous leaves, the result is bit-equal for every number of workers that is a power of two.
        The sum is a reduce-scatter and an all-gather: each worker adds one share of the values of all workers, then
        sends the sums to the others. So it sends about twice the bytes of the tensors, whatever the number of workers.
        """
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            values = torch.cat([tensor.flatten() for tensor in bucket])
            share_size = -(-len(values) // self.world_size)  # rounded up
            values = torch.nn.functional.pad(values, (0, share_size * self.world_size - len(values)))
            received = torch.empty_like(values)  # the share of this worker from every rank
            dist.all_to_all_single(received, values)
            sums = list(received.split(share_size))
            while len(sums) > 1:
                sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
            dist.all_gather_into_tensor(values, sums[0])
            sizes = [tensor.numel() for tensor in bucket]
            for tensor, total in zip(bucket, values[: sum(sizes)].split(sizes), strict=True):
                tensor.copy_(total.view_as(tensor))


def _next(items: Iterator[T]) -> tuple[str, Any]:
    """Return ("item", next item), ("end", None) or ("error", exception), so that all workers can act on it."""
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
