"""Networks of a user's own, named by where Python imports them from: feature networks, and noisy classifiers."""

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.guidance import log_prob_gradient


def import_named(option: str, module: str, attribute: str) -> Any:
    """Return what a module on the workers' path calls `attribute`; ValueError where it cannot be imported."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} cannot be imported: {error}") from error


def fingerprint_of(option: str, network: Any) -> str:
    """Return what tells a network from others: its `fingerprint`, or of a torch module the SHA-256 of its state.

    Raises:
        ValueError: it has neither.
    """
    found = getattr(network, "fingerprint", None)
    if found is None and isinstance(network, torch.nn.Module):
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
        found = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
    if found is None:
        raise ValueError(f"{option} is no torch module, so it must have a `fingerprint` of its weights")
    return str(found)


@dataclass(frozen=True)
class ImportedClassifier:
    """A classifier of noisy images that is not a network of ours."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t [B, C, H, W] in [-1, 1], timesteps [B], labels [B]
    classes: tuple[str, ...]  # in the order of its logits [B, K]
    sha256: str
    multiply_adds: int  # for one image, forward and back to the input

    def towards(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return (x_t, t) -> logits for samples of the labels y int64 [B]."""
        return lambda x, t: self.function(x, t, y)


def is_imported(path: str) -> bool:
    """Return whether a path names a function, as package.module:function, and no file."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path) is not None


def import_classifier(path: str, channels: int, image_size: int, device: torch.device | str) -> ImportedClassifier:
    """Return the classifier that `package.module:function` names, tried on one image.

    It is a function (x_t, t, y) -> logits, or a torch module, which is moved to the device. Its attribute `classes`
    names its classes; without it they are numbered. See `fingerprint_of` for what tells it from others.

    Raises:
        ValueError: it cannot be imported, has no fingerprint, or does not return logits with a gradient.
    """
    option = f"--classifier {path}"
    function = import_named(option, *path.split(":"))
    sha256 = fingerprint_of(option, function)
    if isinstance(function, torch.nn.Module):
        function = function.to(device).eval().requires_grad_(False)
    x, zero = torch.zeros(1, channels, image_size, image_size, device=device), torch.zeros(1, dtype=torch.long)
    zero = zero.to(device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = function(x, zero, zero)
    if logits.ndim != 2 or len(logits) != 1:
        raise ValueError(f"{option} returned {tuple(logits.shape)} for one image, and logits are [1, K]")
    log_prob_gradient(lambda x, t: function(x, t, zero), x, zero, zero)
    classes = tuple(getattr(function, "classes", map(str, range(logits.shape[1]))))
    return ImportedClassifier(function, classes, sha256, counter.get_total_flops())
