"""The user's own feature networks and noisy classifiers, imported by their Python name."""

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
    """Import an attribute of a module; raise a ValueError that names the option if that fails."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} cannot be imported: {error}; check the name and PYTHONPATH") from error


def fingerprint_of(option: str, network: Any) -> str:
    """Return the attribute `fingerprint` of a network, or the SHA-256 of the state of a torch module without one.

    Raises:
        ValueError: the network has no `fingerprint` and is not a torch module.
    """
    fingerprint = getattr(network, "fingerprint", None)
    if fingerprint is None and isinstance(network, torch.nn.Module):
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
        fingerprint = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
    if fingerprint is None:
        raise ValueError(
            f"{option} is not a torch module, so it must have an attribute `fingerprint` that identifies its weights"
        )
    return str(fingerprint)


@dataclass(frozen=True)
class ImportedClassifier:
    """A classifier of noisy images that the user provides."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, y) -> logits, see `import_classifier`
    classes: tuple[str, ...]  # in the order of the logits
    sha256: str  # fingerprint of its weights
    multiply_adds: int  # for one image, forward and backward to the input

    def towards(self, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function (x_t, t) -> logits for samples of the labels y, int64 [B]."""
        return lambda x, t: self.function(x, t, y)


def is_imported(path: str) -> bool:
    """Return whether a path has the form package.module:function, and so is not a file."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path) is not None


def import_classifier(path: str, channels: int, image_size: int, device: torch.device | str) -> ImportedClassifier:
    """Import the classifier `package.module:function`, and try it on one image.

    It is a function (x_t, t, y) -> logits [B, K] of images [B, C, H, W] in [-1, 1], timesteps [B] and labels int64 [B],
    or a torch module, which is moved to the device. Its attribute `classes` names the classes; without it they are
    numbered. `fingerprint_of` identifies its weights.

    Raises:
        ValueError: it cannot be imported, has no fingerprint, or does not return logits with a gradient.
    """
    option = f"--classifier {path}"
    function = import_named(option, *path.split(":"))
    sha256 = fingerprint_of(option, function)
    if isinstance(function, torch.nn.Module):
        function = function.to(device).eval().requires_grad_(False)
    x = torch.zeros(1, channels, image_size, image_size, device=device)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    # A multiply-add is two FLOPs, and the backward pass to the input needs as many multiply-adds as the forward pass.
    # Therefore the FLOPs of the forward pass equal the multiply-adds of both.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = function(x, zero, zero)
    if logits.ndim != 2 or len(logits) != 1:
        raise ValueError(f"{option} returned shape {tuple(logits.shape)} for one image; logits [1, K] are expected")
    log_prob_gradient(lambda x, t: function(x, t, zero), x, zero, zero)  # raises an error if there is no gradient
    classes = tuple(getattr(function, "classes", map(str, range(logits.shape[1]))))
    return ImportedClassifier(function, classes, sha256, counter.get_total_flops())
