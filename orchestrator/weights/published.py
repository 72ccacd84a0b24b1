"""Weights in the format of the published code: `.pt` files with a flat dictionary of tensors and no architecture."""

import io
import re
from typing import Any

import torch
from torch import Tensor

from models import zoo
from models.unet import Architecture
from orchestrator.weights.shapes import describe_mismatch

DDP_PREFIX = "module."  # DistributedDataParallel adds it to the name of every tensor


def entry_by_file_name(uri: str) -> zoo.Entry | None:
    """Return the zoo entry that was released under this file name, or None."""
    file_name = uri.rsplit("/", 1)[-1]
    return next((entry for entry in zoo.ZOO.values() if entry.checkpoint == file_name), None)


def released_entry(uri: str, recipe: str | None = None) -> zoo.Entry:
    """Return the zoo entry of a `.pt` file: `recipe`, or the one that was released under its file name.

    Raises:
        ValueError: the zoo has no entry `recipe`, or none was released under this file name.
    """
    entry = zoo.entry(recipe) if recipe is not None else entry_by_file_name(uri)
    if entry is None:
        file_name = uri.rsplit("/", 1)[-1]
        raise ValueError(
            f"{uri}: a .pt file does not contain its architecture, and none was released as {file_name}. Convert it "
            "with jobs/convert_weights.py and one of: --flags with the flags of its training; --model.* options; "
            f"--recipe with one of {', '.join(zoo.ZOO)}"
        )
    return entry


def decode_state_dict(uri: str, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a `.pt` file on the CPU, without running any code in its pickle.

    Raises:
        ValueError: the file is truncated or damaged, was not written by `torch.save`, or is not a flat dictionary of
            tensors.
    """
    try:
        weights = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in many ways
        imported = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"its pickle imports {imported[1]}, which tensors do not need, so it contains code or is damaged"
            if imported
            else "it is truncated or damaged"
        )
        raise ValueError(f"{uri} is not a file of tensors from torch.save: {reason}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{uri} holds a {type(weights).__name__}; a dictionary of tensors is expected")
    _check_flat(uri, weights)
    tensors = {str(name): tensor for name, tensor in weights.items()}
    if tensors and all(name.startswith(DDP_PREFIX) for name in tensors):
        return {name.removeprefix(DDP_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def _check_flat(uri: str, weights: dict[Any, Any]) -> None:
    """Raise ValueError unless all values of a dictionary are tensors; the message says what the file may be."""
    if {"state", "param_groups"} <= weights.keys():
        raise ValueError(
            f"{uri} holds the state of an optimizer (opt*.pt of the published code); pass the weights beside it: "
            "ema_*.pt or model*.pt"
        )
    # Dictionaries come first, because one of them may be the network.
    for name, value in sorted(weights.items(), key=lambda item: not isinstance(item[1], dict)):
        if isinstance(value, Tensor):
            continue
        message = f"{uri} is not a flat dictionary of tensors: {name!r} is a {type(value).__name__}"
        if isinstance(value, dict):
            save = f"torch.save(torch.load(path)[{name!r}], 'weights.pt')"
            message += f"; if it holds the network, save only that: {save}"
        raise ValueError(message)


def encode_state_dict(weights: dict[str, Tensor], architecture: Architecture) -> bytes:
    """Return a `.pt` file that the published code loads with the flags of this architecture.

    Raises:
        ValueError: the published code would load the file, but compute other results.
    """
    if architecture.rescale_residual:
        raise ValueError(
            "rescale_residual=True: the published code has no such option and would give other results; convert to "
            ".safetensors instead"
        )
    buffer = io.BytesIO()
    # Clone the tensors, because torch.save writes the whole storage of a tensor that is a view.
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, buffer)
    return buffer.getvalue()


def check_tensors(
    uri: str, expected: dict[str, Tensor], tensors: dict[str, Tensor], architecture: Architecture
) -> None:
    """Check that a file's tensors have the names and shapes of an architecture, and are float32 or float16.

    expected: the tensors of `architecture`.
    tensors: the tensors of the file at `uri`.

    Raises:
        ValueError: tensors are missing or unexpected, or have another shape or dtype. The message lists the first of
            them and the options that explain the mismatch.
    """
    if mismatch := describe_mismatch(tensors, expected, architecture):
        raise ValueError(f"{uri} does not fit the architecture: {mismatch}")
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in (torch.float32, torch.float16):
            raise ValueError(
                f"{uri}: tensor {name} is {tensor.dtype} on {tensor.device}; accepted: dense float32 or float16 "
                "tensors with data"
            )
