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
from orchestrator.state_dicts import check_tensors, decode_state_dict, released_entry

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
    folder = _folder(run, checkpoint.position)
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


def read_checkpoint(run: str, position: int) -> Checkpoint:
    """The checkpoint of `run` at `position` images.

    Raises:
        FileNotFoundError: none was committed there, or a file of it is missing.
        ValueError: it is damaged.
    """
    return _read_checkpoint(storage.join(_folder(run, position), "commit.json"))


def _folder(run: str, position: int) -> str:
    return storage.join(run, "checkpoints", f"images-{position:012d}")


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
    storage.create_bytes(uri, encode_weights(weights, architecture, diffusion, classes))


def encode_weights(
    weights: dict[str, Tensor],
    architecture: UNetConfig | ClassifierConfig,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
) -> bytes:
    """The bytes of such a file."""
    about = {
        "format_version": FORMAT_VERSION,
        "kind": "classifier" if isinstance(architecture, ClassifierConfig) else "unet",
        "architecture": architecture.model_dump(mode="json"),
        "diffusion": diffusion.model_dump(mode="json"),
        "classes": list(classes),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return safetensors.torch.save(tensors, metadata={"admiral": json.dumps(about)})


def latest_weights(run: str, kind: str | None = None) -> str:
    """The URI of the newest weights of a training run; of `kind` ("ema-0.9999", "raw"), or of the last kind by name.

    Raises:
        FileNotFoundError: the run has no weights.
        ValueError: it has none of this kind.
    """
    folder = storage.join(run, "weights")
    names = sorted(name for name in storage.list_names(folder) if name.endswith(".safetensors"))
    if not names:
        raise FileNotFoundError(f"{run}: no weights there; has the training finished?")
    if kind is None:
        return storage.join(folder, names[-1])
    kinds = {name.removesuffix(".safetensors").split("-", 2)[-1]: name for name in names}  # the newest of each
    if kind not in kinds:
        raise ValueError(f"{run} has no weights {kind!r}; it has {', '.join(kinds)}")
    return storage.join(folder, kinds[kind])


def load_network(uri: str, device: torch.device | str = "cpu", like: str | None = None) -> Network:
    """Read a network in evaluation mode: a safetensors file, the newest of a training run, or a released `.pt` file.

    A `.pt` file (float32, or float16 which is widened) does not tell its architecture: its name must be that of a
    released one, or `like` be the zoo's name for it. Its classes have no names but their indices.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or a tensor is missing, extra or misshapen; the message names it.
    """
    if uri.endswith(".pt"):
        return _load_released(uri, device, like)
    if like is not None:
        raise ValueError(f"like={like!r} is for .pt files; {uri} carries its architecture")
    uri = uri if uri.endswith(".safetensors") else latest_weights(uri)
    data = storage.read_bytes(uri)
    try:
        weights = safetensors.torch.load(data)
        about = json.loads(_metadata(data)["admiral"])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version={about['format_version']} is not {FORMAT_VERSION}")
        kind = ClassifierConfig if about["kind"] == "classifier" else UNetConfig
        architecture = kind.model_validate(about["architecture"])
        diffusion = DiffusionConfig.model_validate(about["diffusion"])
        classes = tuple(about["classes"])
    except KeyError as error:
        raise ValueError(f"{uri} is not a weights file of Admiral's: its header has no {error}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{uri} is not a weights file of Admiral's: {error}") from error
    module = _filled(uri, architecture, weights, device)
    return Network(module, architecture, diffusion, classes, hashlib.sha256(data).hexdigest())


def _load_released(uri: str, device: torch.device | str, like: str | None) -> Network:
    entry = released_entry(uri, like)
    data = storage.read_bytes(uri)
    module = _filled(uri, entry.network, decode_state_dict(uri, data), device)
    classes = tuple(str(index) for index in range(entry.network.num_classes or 0))
    return Network(module, entry.network, entry.diffusion, classes, hashlib.sha256(data).hexdigest())


def _filled(
    uri: str, architecture: UNetConfig | ClassifierConfig, weights: dict[str, Tensor], device: torch.device | str
) -> nn.Module:
    """The network with these weights as float32, in evaluation mode, on `device`."""
    with torch.device("meta"):  # shapes only: weights that are replaced at once need not be drawn
        module = build(architecture)
    check_tensors(uri, module.state_dict(), weights)
    module.to_empty(device=device).load_state_dict(weights)
    return module.eval().requires_grad_(False)


def build(architecture: UNetConfig | ClassifierConfig) -> nn.Module:
    """The network that a config describes, with fresh weights."""
    if isinstance(architecture, ClassifierConfig):
        return NoisyClassifier(architecture)
    return make_unet(architecture)


def _metadata(data: bytes) -> dict[str, str]:
    """The string metadata in a safetensors header: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})
