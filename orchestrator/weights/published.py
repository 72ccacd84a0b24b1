"""Weights as the published code keeps them: `.pt` files, one flat dictionary from names to tensors, no architecture."""

import io
import re
from typing import Any

import torch
from torch import Tensor

from models import zoo
from models.unet import Architecture
from orchestrator.weights.shapes import describe_mismatch

DDP_PREFIX = "module."  # what DistributedDataParallel puts before the name of every tensor


def entry_by_file_name(uri: str) -> zoo.Entry | None:
    """Return the zoo's entry that was released under this file's name, if there is one."""
    file_name = uri.rsplit("/", 1)[-1]
    return next((entry for entry in zoo.ZOO.values() if entry.checkpoint == file_name), None)


def released_entry(uri: str, recipe: str | None = None) -> zoo.Entry:
    """Return what a `.pt` file holds: the zoo's entry `recipe`, or the one that was released under the file's name.

    Raises:
        ValueError: the zoo does not know `recipe`, or without it the name.
    """
    entry = zoo.entry(recipe) if recipe is not None else entry_by_file_name(uri)
    if entry is None:
        file_name = uri.rsplit("/", 1)[-1]
        raise ValueError(
            f"{uri}: a .pt file does not tell its architecture, and no released one is called {file_name}. Convert it "
            "with jobs/convert_weights.py and one of: --flags and the flags that trained it; --model.* options; "
            f"--recipe and the zoo's name for it: {', '.join(zoo.ZOO)}"
        )
    return entry


def decode_state_dict(uri: str, data: bytes) -> dict[str, Tensor]:
    """The tensors of a `.pt` file's bytes, on the CPU as they were saved; no code in its pickle is ever run.

    Raises:
        ValueError: truncated, damaged, not a file of `torch.save`'s, with more than tensors in it, or not flat.
    """
    try:
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make the reader fail in a dozen ways
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"its pickle asks for {asked[1]}, which no tensor needs: it has code in it or is damaged"
            if asked
            else "it is truncated or damaged"
        )
        raise ValueError(f"{uri} is not a file of tensors as torch.save writes it: {reason}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{uri} holds a {type(weights).__name__}, not a dictionary of names and tensors")
    _refuse_nested(uri, weights)
    tensors = {str(name): tensor for name, tensor in weights.items()}
    if tensors and all(name.startswith(DDP_PREFIX) for name in tensors):
        return {name.removeprefix(DDP_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def _refuse_nested(uri: str, weights: dict[Any, Any]) -> None:
    """Raise ValueError if a file's dictionary holds more than tensors; say what the file is, where that is known."""
    if {"state", "param_groups"} <= weights.keys():
        raise ValueError(
            f"{uri} holds the state of an optimizer, not a network (opt*.pt of the published code); "
            "give the file of weights beside it: ema_*.pt, or model*.pt"
        )
    others = {name: value for name, value in weights.items() if not isinstance(value, Tensor)}
    nested = [name for name, value in others.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{uri} is not a flat dictionary of tensors: it holds the dictionaries {', '.join(map(repr, nested))}; "
            f"save the one with the network's tensors alone: torch.save(torch.load(path)[{nested[0]!r}], 'weights.pt')"
        )
    for name, value in others.items():
        raise ValueError(f"{uri} is not a flat dictionary of tensors: {name!r} is a {type(value).__name__}")


def encode_state_dict(weights: dict[str, Tensor], architecture: Architecture) -> bytes:
    """A `.pt` file that the published code loads, given the flags of this architecture.

    Raises:
        ValueError: the published code would load the file, but not compute what this network does.
    """
    if architecture.rescale_residual:
        raise ValueError("rescale_residual=True: the published code has no such switch and would give other results")
    buffer = io.BytesIO()
    # clones: of a tensor that is part of a larger one, torch.save would write the larger one
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, buffer)
    return buffer.getvalue()


def check_tensors(uri: str, wanted: dict[str, Tensor], found: dict[str, Tensor], architecture: Architecture) -> None:
    """Compare a file's tensors with an architecture's: the same names and shapes, float32 or (to be widened) float16.

    Raises:
        ValueError: some tensors are missing, extra, misshapen or of another type; the message lists the first of them
            and the options that explain the differences.
    """
    if mismatch := describe_mismatch(found, wanted, architecture):
        raise ValueError(f"{uri} does not fit the architecture: {mismatch}")
    for name, tensor in found.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in (torch.float32, torch.float16):
            raise ValueError(
                f"{uri}: tensor {name} is {tensor.dtype} on {tensor.device}; float32 or float16 in memory is expected"
            )
