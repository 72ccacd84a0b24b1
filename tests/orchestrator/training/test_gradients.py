"""Test the memory estimate, the reductions, and that exact gradients need equal platforms."""

from typing import Any

import pytest
import torch

from cluster.collectives import Group
from cluster.trainer import WorkerContext
from models.costs import count_parameters
from orchestrator.arithmetic import platform
from orchestrator.order import OrderConfig
from orchestrator.training.gradients import exact_gradients, memory_of, recomputes
from orchestrator.training.job import report_platform
from orchestrator.training.presets import adm_presets

ADM_256 = adm_presets()["imagenet256"][1]  # a step of 256 images


@pytest.mark.parametrize(
    ("changes", "workers", "gigabytes", "expected"),
    [
        ({}, 32, 141, False),
        ({}, 8, 80, True),
        ({"microbatch_size": 4}, 8, 80, False),
        ({"microbatch_size": 4, "recompute": True}, 8, 80, True),
        ({"recompute": False}, 8, 24, False),
        ({}, 1, None, False),
        ({"model": ADM_256.model.model_copy(update={"gradient_checkpointing": True})}, 1, None, True),
    ],
)
def test_activations_are_recomputed_if_gpu_memory_is_small_or_the_config_requires_it(
    changes: dict[str, Any], workers: int, gigabytes: float | None, expected: bool
) -> None:
    config = ADM_256.model_copy(update=changes)
    assert recomputes(config, workers, gigabytes and gigabytes * 1e9) is expected


def test_exact_sums_hold_a_set_of_gradients_for_each_level() -> None:
    config = ADM_256.model_copy(update={"reduction": "exact", "order": OrderConfig(num_streams=64)})
    for workers, levels in ((1, 6), (8, 3), (64, 0)):
        memory = memory_of(config, config.model, workers)
        sums = [size for name, size in memory.items() if "subtrees" in name]
        assert sums == ([4 * levels * count_parameters(config.model)] if levels else [])


def test_a_thousand_streams_sum_to_the_same_bits_on_any_number_of_workers() -> None:
    streams, model = 1024, torch.nn.Linear(3, 1)
    inputs = torch.randn(streams, 3, generator=torch.Generator().manual_seed(1))

    def backward(model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        model(inputs[batch]).sum().backward()
        return {}

    def subtree(batches: range) -> torch.Tensor:
        exact_gradients(model, list(batches), backward, Group(0, 1))  # type: ignore[arg-type]
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return gradient

    sums = []
    for workers in (1, 8, streams):
        share = streams // workers
        tree = [subtree(range(rank * share, (rank + 1) * share)) for rank in range(workers)]
        while len(tree) > 1:  # as `Group.all_reduce_in_tree` adds the workers' sums
            tree = [left + right for left, right in zip(tree[::2], tree[1::2], strict=True)]
        sums.append(tree[0])
    assert all(torch.equal(total, sums[0]) for total in sums)
    assert not torch.equal(sums[0][:3], inputs.sum(0)), "the sum of these inputs depends on the order"


class _Pair:
    """A group of two workers, the second of which has another device."""

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        return [value, value | {"device": "NVIDIA L4"}]


def test_exact_gradients_are_refused_on_different_platforms() -> None:
    records: list[dict[str, Any]] = []
    context = WorkerContext(0, 2, torch.device("cpu"), records.append, lambda: False, streams_on_cluster=False)
    report_platform(ADM_256, context, _Pair())  # type: ignore[arg-type]
    assert records[0]["platform"] == platform(torch.device("cpu")) and len(records[0]["others"]) == 1
    with pytest.raises(ValueError, match=r"device: .* and NVIDIA L4"):
        report_platform(ADM_256.model_copy(update={"reduction": "exact"}), context, _Pair())  # type: ignore[arg-type]
