"""Weights as the published code keeps them: `.pt` files, one flat dictionary from names to tensors, no architecture."""

import io
import re

import torch
from torch import Tensor

from models import zoo
from models.unet import Architecture


def released_entry(uri: str, recipe: str | None = None) -> zoo.Entry:
    """What a `.pt` file holds: the zoo's entry `recipe`, or the one that was released under the file's name.

    Raises:
        ValueError: the zoo does not know `recipe`, or without it the name.
    """
    if recipe is not None:
        return zoo.entry(recipe)
    file_name = uri.rsplit("/", 1)[-1]
    for entry in zoo.ZOO.values():
        if entry.checkpoint == file_name:
            return entry
    raise ValueError(
        f"{uri}: a .pt file does not tell its architecture, and no released one is called {file_name}; rename it, "
        f"or convert it (jobs/convert_weights.py) with --recipe and the zoo's name for it: {', '.join(zoo.ZOO)}"
    )


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
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{uri} is not a flat dictionary of tensors: {name!r} is a {type(value).__name__}")
    return {str(name): tensor for name, tensor in weights.items()}


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


def check_tensors(uri: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Hold a file's tensors to an architecture's: the same names and shapes, float32 or (to be widened) float16.

    Raises:
        ValueError: the first tensor that is missing, extra, misshapen or of another kind, by name.
    """
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{uri}: tensor {name} {tuple(wanted[name].shape)} is missing")
        tensor = found[name]
        if name not in wanted:
            raise ValueError(f"{uri}: tensor {name} {tuple(tensor.shape)} does not belong to this architecture")
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, the architecture wants {tuple(wanted[name].shape)}"
            raise ValueError(f"{uri}: tensor {name} has shape {shapes}")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"{uri}: tensor {name} is {tensor.dtype} on {tensor.device}; want float32 or float16")
