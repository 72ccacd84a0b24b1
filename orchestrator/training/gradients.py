"""The gradient of a step: fast by DDP, or exact, which means equal to the bit on any number of workers."""

import contextlib
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.collectives import Group
from cluster.trainer import WorkerContext
from models.costs import count_parameters, peak_memory, training_state_bytes
from models.unet import Architecture, compile_blocks
from orchestrator.order import Purpose, keyed_rng
from orchestrator.progress import counted
from orchestrator.training.config import Config, TrainingConfig
from orchestrator.training.losses import Losses, Microbatch, Terms, blank_microbatch
from orchestrator.training.state import TrainingState

COMPILE_TIMEOUT = timedelta(hours=1)  # for all workers to compile the network
MEMORY_SHARE = 0.85  # fraction of a GPU's memory that `memory_of` may fill; it counts no workspaces or fragmentation

Backward = Callable[[nn.Module, Microbatch], Terms]  # forward and backward pass of a microbatch; adds to .grad


def prepare_network(config: Config, context: WorkerContext, group: Group, state: TrainingState, losses: Losses) -> None:
    """Choose whether activations are recomputed, and compile the network on all workers before the first step."""
    memory = None
    if context.device.type == "cuda":
        memory = torch.cuda.get_device_properties(context.device).total_memory
    state.model.gradient_checkpointing = recomputes(config, context.world_size, memory)
    state.model.train()
    if config.compile:
        compile_blocks(state.model)
        rows = config.microbatch_rows(context.world_size)
        terms = losses(config.in_dtype(state.model), blank_microbatch(config, rows).to(context.device))
        terms["loss"].sum().backward()
        state.model.zero_grad(set_to_none=True)
        group.barrier(COMPILE_TIMEOUT)


def recomputes(config: Config, world_size: int, memory: float | None) -> bool:
    """Return whether activations are recomputed in the backward pass on a GPU of `memory` bytes (None: on a CPU).

    With recompute=none they are recomputed on a GPU if they would need more than 85% of its memory, and on a CPU if
    the model has gradient_checkpointing.
    """
    if config.recompute is not None:
        return config.recompute
    if memory is None:
        return config.model.gradient_checkpointing
    network = config.model.model_copy(update={"gradient_checkpointing": False})
    return sum(memory_of(config, network, world_size).values()) > MEMORY_SHARE * memory


def memory_of(config: Config, network: Architecture, world_size: int) -> dict[str, int]:
    """Return the peak memory of a worker in a step, in bytes, by what it is used for."""
    averages, rows = len(config.ema_rates) + len(config.power_emas), config.microbatch_rows(world_size)
    sizes = {
        f"weights, AdamW and {counted(averages, 'average')}": training_state_bytes(network, averages),
        f"activations and gradients of {rows} images": peak_memory(
            network, "training", rows, config.dtype != "float32"
        ),
    }
    if config.reduction == "exact" and (levels := (config.order.num_streams // world_size).bit_length() - 1):
        sizes[f"gradients of {levels} subtrees"] = 4 * count_parameters(network) * levels
    return sizes


def make_reduction(
    config: Config, context: WorkerContext, group: Group, state: TrainingState, losses: Losses
) -> Callable[[list[Microbatch]], list[Terms]]:
    """Return a function that computes the gradient of the mean loss of a step from this worker's microbatches.

    The function leaves the gradient, times the loss scale, in `.grad` and returns the loss terms of the microbatches.
    """
    model: nn.Module = state.model
    exact = config.reduction == "exact"
    if not exact and context.world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # The tree sums over all workers. DDP averages over them, so each divides by the size of its own share.
    divisor = config.batch_size if exact else config.batch_size // context.world_size

    def backward(model: nn.Module, batch: Microbatch) -> Terms:
        torch.manual_seed(_dropout_seed(config, state.position, batch))
        terms = losses(config.in_dtype(model), batch)
        (terms["loss"].sum() * (state.loss_scale / divisor)).backward()
        return {name: values.detach() for name, values in terms.items()}

    def compute_gradients(batches: list[Microbatch]) -> list[Terms]:
        state.model.zero_grad(set_to_none=True)
        if exact:
            return exact_gradients(model, batches, backward, group)
        terms = []
        for number, batch in enumerate(batches, 1):  # DDP averages over workers in the last backward pass
            is_local = isinstance(model, DistributedDataParallel) and number < len(batches)
            with model.no_sync() if is_local else contextlib.nullcontext():  # type: ignore[operator]
                terms.append(backward(model, batch))
        return terms

    return compute_gradients


def _dropout_seed(config: TrainingConfig, position: int, batch: Microbatch) -> int:
    """Return the seed of a microbatch's dropout masks, which depends on the seed, the position and the first stream.

    If several microbatches begin in the share of one stream, their offsets in the share distinguish them.
    """
    key = (config.seed, position + batch.offset, batch.stream)
    return int(keyed_rng(Purpose.DROPOUT, *key).integers(2**63))


def exact_gradients(model: nn.Module, batches: list[Microbatch], backward: Backward, group: Group) -> list[Terms]:
    """Sum the gradients of all canonical streams in one fixed binary tree.

    `batches` holds one microbatch for each stream of this worker; their number is a power of two. Each worker sums its
    subtree, and then all workers sum the subtrees in tree order. So the bits of the sum do not depend on the number of
    workers. In addition to the gradients of a microbatch, each level of the subtree needs memory for one set.
    """
    parameters = list(model.parameters())
    pending: list[list[torch.Tensor]] = []  # sums of subtrees whose right sibling is not complete, largest first
    terms = []
    for number, batch in enumerate(batches, 1):
        terms.append(backward(model, batch))
        total = [parameter.grad for parameter in parameters if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        while number % 2 == 0:
            total = list(torch._foreach_add(pending.pop(), total))
            number //= 2
        pending.append(total)
    (total,) = pending
    group.all_reduce_in_tree(total)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return terms
