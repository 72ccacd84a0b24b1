"""What a training state and a network's weights are on disk."""

import hashlib
import json
import logging
import uuid
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models.diffusion import DiffusionConfig
from models.unet import ClassifierConfig, NoisyClassifier, UNetConfig, make_unet
from orchestrator import storage

FORMAT_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a resume needs: tensors by name, and the position in images seen."""

    position: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # small JSON: skipped steps and the like


def save_checkpoint(run: str, checkpoint: Checkpoint) -> str:
    """Write `run`/checkpoints/images-N/, committed by its last object; answer its URI.

    The tensors lie under a name of this attempt's own, so a dying writer of an earlier attempt cannot touch them;
    only the commit object, created once, makes the checkpoint count.
    """
    folder = storage.join(run, "checkpoints", f"images-{checkpoint.position:012d}")
    name = f"state-{uuid.uuid4().hex[:12]}.safetensors"
    data = safetensors.torch.save({key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()})
    storage.write_bytes(storage.join(folder, name), data)
    commit = {
        "format_version": FORMAT_VERSION,
        "position": checkpoint.position,
        "facts": checkpoint.facts,
        "files": {name: hashlib.sha256(data).hexdigest()},
    }
    storage.create_bytes(storage.join(folder, "commit.json"), json.dumps(commit, indent=2).encode())
    return folder


def latest_checkpoint(run: str) -> Checkpoint | None:
    """The newest committed checkpoint of `run` whose checksums hold; damaged ones are logged and passed over."""
    folder = storage.join(run, "checkpoints")
    commits = [name for name in storage.list_names(folder, recursive=True) if name.endswith("/commit.json")]
    for name in sorted(commits, reverse=True):
        uri = storage.join(folder, name)
        try:
            return _read_checkpoint(uri)
        except (ValueError, KeyError, FileNotFoundError, safetensors.SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before", uri, error)
    return None


def _read_checkpoint(commit_uri: str) -> Checkpoint:
    commit = storage.read_json(commit_uri)
    if commit["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={commit['format_version']} is not the {FORMAT_VERSION} that this code reads")
    tensors: dict[str, Tensor] = {}
    for name, digest in commit["files"].items():
        data = storage.read_bytes(storage.join(commit_uri.removesuffix("commit.json"), name))
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name} has another SHA-256 than its commit object says")
        tensors |= safetensors.torch.load(data)
    return Checkpoint(commit["position"], tensors, commit["facts"])


@dataclass(frozen=True)
class Network:
    """A network as its file tells it: weights, architecture, the diffusion that it was trained for, its classes."""

    module: nn.Module
    architecture: UNetConfig | ClassifierConfig
    diffusion: DiffusionConfig
    classes: tuple[str, ...]
    sha256: str  # of the file


def save_weights(
    uri: str,
    weights: dict[str, Tensor],
    architecture: UNetConfig | ClassifierConfig,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
) -> None:
    """Write a safetensors file that carries its architecture; an existing one is left as it is."""
    about = {
        "format_version": FORMAT_VERSION,
        "kind": "classifier" if isinstance(architecture, ClassifierConfig) else "unet",
        "architecture": architecture.model_dump(mode="json"),
        "diffusion": diffusion.model_dump(mode="json"),
        "classes": list(classes),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    storage.create_bytes(uri, safetensors.torch.save(tensors, metadata={"admiral": json.dumps(about)}))


def latest_weights(run: str) -> str:
    """The URI of the newest weights of a training run.

    Raises:
        FileNotFoundError: the run has no weights.
    """
    folder = storage.join(run, "weights")
    names = sorted(name for name in storage.list_names(folder) if name.endswith(".safetensors"))
    if not names:
        raise FileNotFoundError(f"{run}: no weights there; has the training finished?")
    return storage.join(folder, names[-1])


def load_network(uri: str, device: torch.device | str = "cpu") -> Network:
    """Read a network from a safetensors file, or the newest of a training run, in evaluation mode.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or a tensor is missing, extra or misshapen; the message names it.
    """
    uri = uri if uri.endswith(".safetensors") else latest_weights(uri)
    data = storage.read_bytes(uri)
    try:
        weights = safetensors.torch.load(data)
        about = json.loads(_metadata(data)["admiral"])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{uri} is not a weights file of Admiral's: {error}") from error
    architecture: UNetConfig | ClassifierConfig
    if about["kind"] == "classifier":
        architecture = ClassifierConfig.model_validate(about["architecture"])
    else:
        architecture = UNetConfig.model_validate(about["architecture"])
    module = build(architecture)
    _check_names(uri, module, weights)
    module.load_state_dict(weights)
    module.to(device).eval().requires_grad_(False)
    diffusion = DiffusionConfig.model_validate(about["diffusion"])
    return Network(module, architecture, diffusion, tuple(about["classes"]), hashlib.sha256(data).hexdigest())


def build(architecture: UNetConfig | ClassifierConfig) -> nn.Module:
    """The network that a config describes, with fresh weights."""
    if isinstance(architecture, ClassifierConfig):
        return NoisyClassifier(architecture)
    return make_unet(architecture)


def _check_names(uri: str, module: nn.Module, weights: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{uri}: tensor {name} {wanted[name]} is missing")
        if name not in wanted:
            raise ValueError(f"{uri}: tensor {name} {found[name]} does not belong to this architecture")
        if wanted[name] != found[name]:
            raise ValueError(f"{uri}: tensor {name} has shape {found[name]}, the architecture wants {wanted[name]}")


def _metadata(data: bytes) -> dict[str, str]:
    """The string metadata in a safetensors header: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})
