"""From the microbatches of a step to one gradient: as fast as can be, or equal to the bit on any number of workers."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.collectives import Group
from cluster.trainer import WorkerContext
from orchestrator.order import Purpose, keyed_rng
from orchestrator.training.config import Config, TrainingConfig
from orchestrator.training.losses import Losses, Microbatch, Terms
from orchestrator.training.state import TrainingState

Backward = Callable[[nn.Module, Microbatch], Terms]  # forward and backward of one microbatch; gradients add up in .grad


def make_reduction(
    config: Config, context: WorkerContext, group: Group, state: TrainingState, losses: Losses
) -> Callable[[list[Microbatch]], list[Terms]]:
    """A function from a worker's microbatches to the gradient of the mean loss over the whole step, left in .grad.

    It returns the microbatches' loss terms. Gradients are those of the loss times the loss scale.
    """
    if config.compile:
        state.model.compile()
    state.model.train()
    model: nn.Module = state.model
    exact = config.reduction == "exact"
    if not exact and context.world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    images = config.batch_size if exact else config.batch_size // context.world_size  # the tree sums, DDP averages

    def backward(model: nn.Module, batch: Microbatch) -> Terms:
        torch.manual_seed(_dropout_seed(config, state.position, batch))
        terms = losses(config.in_dtype(model), batch)
        (terms["loss"].sum() * (state.loss_scale / images)).backward()
        return {name: values.detach() for name, values in terms.items()}

    def reduced(batches: list[Microbatch]) -> list[Terms]:
        state.model.zero_grad(set_to_none=True)
        if exact:
            return exact_gradients(model, batches, backward, group)
        return fast_gradients(model, batches, backward)

    return reduced


def _dropout_seed(config: TrainingConfig, position: int, batch: Microbatch) -> int:
    """Another dropout mask for every microbatch, the same again after a resume: by seed, images seen, first stream.

    Where several microbatches begin in one stream's share, the later ones count the images before them as seen.
    """
    key = (config.seed, position + batch.offset, batch.stream)
    return int(keyed_rng(Purpose.DROPOUT, *key).integers(2**63))


def fast_gradients(model: nn.Module, batches: list[Microbatch], backward: Backward) -> list[Terms]:
    """Accumulate over a worker's microbatches; DDP averages over workers during the last one's backward pass."""
    found = []
    for number, batch in enumerate(batches, 1):
        alone = isinstance(model, DistributedDataParallel) and number < len(batches)
        with model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            found.append(backward(model, batch))
    return found


def exact_gradients(model: nn.Module, batches: list[Microbatch], backward: Backward, group: Group) -> list[Terms]:
    """Sum over all canonical streams in one fixed binary tree, whoever owns them.

    `batches` holds one microbatch for each of this worker's streams, a power of two of them. A worker adds up its own
    subtree, then the workers theirs, so the sum has the same bits for every number of workers. Beside the gradients
    of one microbatch this holds one set for each level of the subtree.
    """
    parameters = list(model.parameters())
    waiting: list[list[torch.Tensor]] = []  # sums of whole subtrees without their right neighbours, largest first
    found = []
    for number, batch in enumerate(batches, 1):
        found.append(backward(model, batch))
        total = [parameter.grad for parameter in parameters if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        while number % 2 == 0:
            total = list(torch._foreach_add(waiting.pop(), total))
            number //= 2
        waiting.append(total)
    (total,) = waiting
    group.add_in_tree(total)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return found


@contextlib.contextmanager
def fixed_arithmetic(config: TrainingConfig) -> Iterator[None]:
    """While inside, the numbers of CPU threads and (with reduction=exact) the algorithms are the config's alone."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.num_threads)
    if config.reduction == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it before its first product
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
