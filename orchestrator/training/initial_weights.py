"""The initial weights of a training: random ones, or those of another training or a released model."""

import logging

import torch
from torch import Tensor

from cluster.collectives import Group
from orchestrator.training.config import Config
from orchestrator.training.state import TrainingState
from orchestrator.weights.network import Network, load_network, load_published
from orchestrator.weights.published import check_tensors, entry_by_file_name
from orchestrator.weights.shapes import invisible_settings, with_classes_of

LABEL_EMBEDDING = "label_emb.weight"

log = logging.getLogger(__name__)


def load_initial_weights(config: Config, state: TrainingState, group: Group) -> None:
    """Load the weights of `init_from`, if it is set, into a new state and its averages; make all workers' states equal.

    If the number of classes differs, class-dependent tensors are re-initialised, and a warning names them.

    Raises:
        FileNotFoundError: `init_from` does not exist.
        ValueError: the architecture differs; the message lists the tensors that differ and the options to set.
    """
    if config.init_from is not None and group.rank == 0:
        weights, notes = _read(config, state.model.state_dict())
        for note in notes:
            log.warning("--init-from: %s; the training continues", note)
        state.model.load_state_dict(weights)
        for average in state.averages.values():
            for name, tensor in average.items():
                tensor.copy_(weights[name])
    # All workers draw the same random weights, but processors of different kinds may round them differently.
    group.broadcast(list(state.tensors().values()))


def check_initial_weights(config: Config) -> None:
    """Check that the weights of `init_from` fit, before workers start. Raises what `load_initial_weights` does."""
    if config.init_from is not None:
        with torch.device("meta"):
            module = config.model.build()
        _read(config, module.to_empty(device="cpu").state_dict())


def _read(config: Config, random_weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights to start from, and notes for the user.

    A `.pt` file that is not a released one must have the config's architecture.
    """
    assert config.init_from is not None
    uri, model = config.path(config.init_from), config.model
    notes: list[str] = []
    if uri.endswith(".pt") and not entry_by_file_name(uri):
        settings = ", ".join(f"{name}={value}" for name, value in invisible_settings(model).items())
        notes.append(
            f"{uri} does not contain its architecture; the training assumes that of --model.*, with {settings}, "
            "and the process of --diffusion.*"
        )
        if model.kind == "unet":  # the published code has no null class
            model = model.model_copy(update={"null_class": False})
        source = load_published(uri, lambda shapes: (with_classes_of(shapes, model), config.diffusion))
    else:
        source = load_network(uri)
    weights = _fit_classes(uri, source, config, random_weights, notes)
    if source.diffusion != config.diffusion:
        notes.append(f"{uri} was trained for another diffusion process: {source.diffusion}")
    return weights, notes


def _fit_classes(
    uri: str, source: Network, config: Config, random_weights: dict[str, Tensor], notes: list[str]
) -> dict[str, Tensor]:
    """Return the weights of the source, with random ones for class-dependent tensors if the number of classes differs.

    Adds a note for each difference.
    """
    source_classes, own_classes = source.architecture.num_classes, config.model.num_classes
    weights = dict(source.module.state_dict())
    if source_classes == own_classes:
        if own_classes:
            _fit_null_class(uri, weights, random_weights, notes)
        check_tensors(uri, random_weights, weights, config.model)
        return weights

    def depends_on_classes(name: str, tensor: Tensor) -> bool:
        other = weights.get(name)
        if name == LABEL_EMBEDDING or other is None:
            return name == LABEL_EMBEDDING
        return len(tensor) == own_classes != len(other) and tensor.shape[1:] == other.shape[1:]

    reinitialised = [name for name, tensor in random_weights.items() if depends_on_classes(name, tensor)]
    dropped = [name for name in weights if name not in random_weights]
    weights = {name: tensor for name, tensor in weights.items() if name in random_weights}
    weights |= {name: random_weights[name].cpu() for name in reinitialised}
    check_tensors(uri, random_weights, weights, config.model)
    changes = [f"{name} is re-initialised" for name in reinitialised] + [f"{name} is left out" for name in dropped]
    notes.append(
        f"{uri} has {source_classes or 'no'} classes and this model {own_classes or 'none'}: {'; '.join(changes)}"
    )
    return weights


def _fit_null_class(uri: str, weights: dict[str, Tensor], random_weights: dict[str, Tensor], notes: list[str]) -> None:
    """Add a row of zeros for the null class to the label embedding, or remove its row, if only one model has one."""
    if LABEL_EMBEDDING not in weights or LABEL_EMBEDDING not in random_weights:
        return
    rows = weights[LABEL_EMBEDDING]
    missing_rows = len(random_weights[LABEL_EMBEDDING]) - len(rows)
    if missing_rows == 1:
        weights[LABEL_EMBEDDING] = torch.cat([rows, torch.zeros_like(rows[:1])])
        notes.append(f"{uri} has no null class; a row of zeros for it is added to {LABEL_EMBEDDING}")
    elif missing_rows == -1:
        weights[LABEL_EMBEDDING] = rows[:-1]
        notes.append(f"{uri} has a null class and this model has none; its row in {LABEL_EMBEDDING} is left out")
