"""What a training starts from: fresh weights, or those of another training or a release."""

import logging

import torch
from torch import Tensor

from cluster.collectives import Group
from orchestrator.training.config import Config
from orchestrator.training.state import TrainingState
from orchestrator.weights.network import Network, load_network, load_published
from orchestrator.weights.published import check_tensors, entry_by_file_name
from orchestrator.weights.shapes import invisible_settings, with_classes_of

log = logging.getLogger(__name__)


def begin_with(config: Config, state: TrainingState, group: Group) -> None:
    """Put `init_from`'s weights, if there are any, into a fresh state and its averages; all workers get rank 0's.

    What belongs to the classes is kept fresh where the classes are not as many, and a warning says so.

    Raises:
        FileNotFoundError: nothing lies there.
        ValueError: they are another network's; the message lists differing tensors and the options that explain them.
    """
    if config.init_from is not None and group.rank == 0:
        weights, notes = _read(config, state.model.state_dict())
        for note in notes:
            log.warning("init_from: %s", note)
        state.model.load_state_dict(weights)
        for average in state.averages.values():
            for name, tensor in average.items():
                tensor.copy_(weights[name])
    # Fresh weights are drawn alike, but not every kind of processor rounds alike.
    group.copy_from_first(list(state.tensors().values()))


def check_initial_weights(config: Config) -> None:
    """Check that `init_from`'s weights fit, before anything starts. Raises what `begin_with` does."""
    if config.init_from is not None:
        with torch.device("meta"):
            module = config.model.build()
        _read(config, module.to_empty(device="cpu").state_dict())


def _read(config: Config, fresh: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights to start from, in the place of `fresh` ones, and what a user should know of them."""
    assert config.init_from is not None
    uri = config.path(config.init_from)
    source, notes = _source(uri, config)
    weights = _fitting(uri, source, config, fresh, notes)
    if source.diffusion != config.diffusion:
        notes.append(f"{uri} was trained for another diffusion than this one: {source.diffusion}")
    return weights, notes


def _source(uri: str, config: Config) -> tuple[Network, list[str]]:
    """Return the network to start from; a `.pt` file without a released name is read as the training's own model."""
    if not uri.endswith(".pt") or entry_by_file_name(uri):
        return load_network(uri), []
    settings = ", ".join(f"{name}={value}" for name, value in invisible_settings(config.model).items())
    note = (
        f"{uri} does not tell its architecture; the training goes on as if the file had that of --model.*, with "
        f"{settings}, and was trained for --diffusion.*"
    )
    model = config.model
    if model.kind == "unet":  # published code knows no null class
        model = model.model_copy(update={"null_class": False})
    return load_published(uri, lambda shapes: (with_classes_of(shapes, model), config.diffusion)), [note]


def _fitting(
    uri: str, source: Network, config: Config, fresh: dict[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """The source's weights, with fresh ones in the place of what belongs to other classes."""
    there, here = source.architecture.num_classes, config.model.num_classes
    weights = dict(source.module.state_dict())
    if there == here and here:
        _fit_null_class(uri, weights, fresh, notes)
    if there == here:
        check_tensors(uri, fresh, weights, config.model)
        return weights
    anew = [name for name, tensor in fresh.items() if name not in weights or _is_for_classes(weights[name], tensor)]
    dropped = [name for name in weights if name not in fresh]
    weights = {name: tensor for name, tensor in weights.items() if name in fresh}
    weights |= {name: fresh[name].cpu() for name in anew if here and fresh[name].shape[0] == here}
    check_tensors(uri, fresh, weights, config.model)
    changes = [f"{name} starts anew" for name in anew] + [f"{name} is left out" for name in dropped]
    notes.append(f"{uri} has {there or 'no'} classes and this model {here or 'none'}: {'; '.join(changes)}")
    return weights


def _fit_null_class(uri: str, weights: dict[str, Tensor], fresh: dict[str, Tensor], notes: list[str]) -> None:
    """Give the label embedding a row of zeros for the null class, or take it away, where source and model differ."""
    name = "label_emb.weight"
    if name not in weights or name not in fresh:
        return
    lacking = len(fresh[name]) - len(weights[name])
    if lacking == 1:
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:1])])
        notes.append(f"{uri} has no null class; {name} gets a row of zeros for it, which the training fills")
    elif lacking == -1:
        weights[name] = weights[name][:-1]
        notes.append(f"{uri} has a null class and this model has none; its row of {name} is left out")


def _is_for_classes(there: Tensor, here: Tensor) -> bool:
    """Whether two tensors differ in their first dimension alone, as those do that have a row for each class."""
    return there.shape != here.shape and there.shape[1:] == here.shape[1:]
