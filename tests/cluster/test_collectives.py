"""Collectives give all workers the same results, in an order that depends only on the ranks."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from cluster import collectives
from cluster.collectives import Group


def _worker(rank: int, world_size: int, folder: str) -> None:
    """Call every collective once, and write its results to a file."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timedelta(minutes=5), rank=rank, world_size=world_size
    )
    group = Group(rank, world_size)
    collectives.BUCKET_VALUES = 5  # several messages

    def items() -> Iterator[int]:
        assert rank == 0, "only rank 0's iterator is touched"
        yield from (7, 8)
        raise ValueError("a damaged file")

    received: list[int | str] = []
    try:
        for item in group.broadcast_items(items()):
            received.append(item)
    except ValueError as error:
        received.append(str(error))
    leaves = torch.from_numpy(_leaves()).split(8 // world_size)[rank]
    while len(leaves) > 1:
        leaves = leaves[0::2] + leaves[1::2]
    tensors = [leaves[0, :3].reshape(3, 1), leaves[0, 3:]]
    group.all_reduce_in_tree(tensors)
    group.barrier(timedelta(minutes=1))
    copied = [torch.full((2,), float(rank))]
    group.broadcast(copied)
    results = {
        "any": group.any(rank == 1, False, True),
        "sum": group.sum(torch.tensor([1.0, rank])).tolist(),
        "gather": group.gather({"rank": rank}),
        "received": received,
        "tree": torch.cat([tensor.flatten() for tensor in tensors]).view(torch.int32).tolist(),
        "copied": copied[0].tolist(),
    }
    Path(folder, f"{world_size}-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def _leaves() -> np.ndarray:
    """Return eight leaves of the tree, whose sum depends on the order."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((8, 9)) * 10.0 ** rng.integers(-6, 6, (8, 9))).astype(np.float32)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_workers_get_the_same_results(tmp_path: Path, world_size: int) -> None:
    torch.multiprocessing.start_processes(_worker, (world_size, str(tmp_path)), world_size, start_method="forkserver")
    results = [json.loads((tmp_path / f"{world_size}-{rank}.json").read_text()) for rank in range(world_size)]
    assert all(result == results[0] for result in results)
    assert results[0]["any"] == [True, False, True]
    assert results[0]["sum"] == [world_size, sum(range(world_size))]
    assert results[0]["gather"] == [{"rank": rank} for rank in range(world_size)]
    assert results[0]["received"] == [7, 8, "a damaged file"]
    assert results[0]["copied"] == [0.0, 0.0]
    tree = _leaves()
    while len(tree) > 1:
        tree = tree[0::2] + tree[1::2]
    assert results[0]["tree"] == tree[0].view(np.int32).tolist()
    in_order = _leaves().sum(axis=0).view(np.int32).tolist()
    assert results[0]["tree"] != in_order, "the sum of these leaves depends on the order"


def test_a_group_of_one_needs_no_process_group() -> None:
    group = Group(0, 1)
    assert group.any(True, False) == (True, False)
    assert group.gather(3) == [3]
    assert list(group.broadcast_items(iter([1, 2]))) == [1, 2]
    assert group.sum(torch.ones(2)).tolist() == [1, 1]
    tensors = [torch.ones(2)]
    group.all_reduce_in_tree(tensors)
    group.broadcast(tensors)
    assert tensors[0].tolist() == [1, 1]
