"""What the workers of one process group do together: agree, gather, share what one knows, add in a fixed tree."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)  # a collective that hangs ends the attempt after this
BUCKET_VALUES = 16 << 20  # values that are added at a time

T = TypeVar("T")


class Group:
    """This worker's hand on all workers. Small things go over the CPU, so that no GPU is waited for.

    Every worker must call the same methods in the same order. A group of one works without torch.distributed.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._cpu = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None

    def any(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish, whether any worker has it; all get the same answer."""
        if self._cpu is None:
            return wishes
        flags = torch.tensor(wishes, dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._cpu)
        return tuple(bool(flag) for flag in flags)

    def meet(self, timeout: timedelta) -> None:
        """Return when all workers have come here, each after as long as `timeout` of its own work."""
        if self._cpu is not None:
            dist.monitored_barrier(self._cpu, timeout)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers of a CPU tensor."""
        total = values.clone()
        if self._cpu is not None:
            dist.all_reduce(total, group=self._cpu)
        return total

    def gather(self, item: T) -> list[T]:
        """Every worker's item, in rank order."""
        if self._cpu is None:
            return [item]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, item, group=self._cpu)
        return found

    def from_first(self, items: Iterator[T]) -> Iterator[T]:
        """What rank 0's iterator yields, on every worker; the others' iterators are not touched.

        Raises:
            Exception: what rank 0's iterator raises, on every worker.
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
        """Give every worker rank 0's values of `tensors`, in place."""
        if self.world_size > 1:
            for tensor in tensors:  # the default group of workers with GPUs may know nothing of the CPU
                dist.broadcast(tensor, src=0, group=None if tensor.is_cuda else self._cpu)

    def add_in_tree(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over workers, added in one fixed binary tree over ranks.

        Every worker adds one share of all values, in the tree's order: ranks 0 + 1, 2 + 3, then these sums. So where
        each worker brings the sum over its own subtree of contiguous leaves, the result is equal to the bit for every
        number of workers, a power of two, and twice the tensors' bytes cross the network, however many there are.
        """
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            mine = torch.cat([tensor.flatten() for tensor in bucket])
            share = -(-len(mine) // self.world_size)
            mine = torch.nn.functional.pad(mine, (0, share * self.world_size - len(mine)))
            parts = torch.empty_like(mine)
            dist.all_to_all_single(parts, mine)
            sums = list(parts.split(share))
            while len(sums) > 1:
                sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
            dist.all_gather_into_tensor(mine, sums[0])
            total = mine.split([tensor.numel() for tensor in bucket] + [len(mine) - sum(t.numel() for t in bucket)])
            for tensor, part in zip(bucket, total, strict=False):
                tensor.copy_(part.view_as(tensor))


def _next(items: Iterator[T]) -> tuple[str, Any]:
    try:
        return "item", next(items)
    except StopIteration:
        return "end", None
    except Exception as error:  # noqa: BLE001 - it is raised on every worker
        return "error", error


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours together, each bucket at most BUCKET_VALUES or one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_VALUES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
