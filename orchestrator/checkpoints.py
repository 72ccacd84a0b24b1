"""What a training state and a network's weights are on disk."""

import hashlib
import itertools
import json
import logging
import re
import sys
import uuid
from collections.abc import Iterator
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
FILE_BYTES = 1 << 30  # of a checkpoint's files: what reading holds beside the state itself

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a resume needs: tensors by name, and the position in images seen."""

    position: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # small JSON: skipped steps and the like


def save_checkpoint(run: str, checkpoint: Checkpoint, attempt: str = "") -> str:
    """Write `run`/checkpoints/images-N/, committed by its last object; answer that object's URI.

    The tensors are streamed into a few files. All names hold `attempt` (by default a fresh one), so a dying writer of
    an earlier attempt cannot touch them, nor they its; only the commit object makes a checkpoint count.
    """
    folder, attempt = _folder(run, checkpoint.position), attempt or new_attempt()
    files = {}
    for number, tensors in enumerate(shared_out(checkpoint.tensors, FILE_BYTES)):
        name = f"state-{attempt}-{number:03d}.safetensors"
        files[name] = _write_tensors(storage.join(folder, name), tensors, {})
    commit = {
        "format_version": FORMAT_VERSION,
        "position": checkpoint.position,
        "facts": checkpoint.facts,
        "files": files,  # SHA-256 of each
    }
    uri = storage.join(folder, f"commit-{attempt}.json")
    storage.create_bytes(uri, storage.json_bytes(commit))
    return uri


def new_attempt() -> str:
    """A name that no other attempt at a training has."""
    return uuid.uuid4().hex[:12]


def latest_checkpoint(run: str) -> Checkpoint | None:
    """The newest committed checkpoint of `run` whose checksums hold; damaged ones are logged and passed over."""
    *_, found = [None, *read_newest(run)]
    return found


def read_newest(run: str) -> Iterator[Checkpoint | None]:
    """Read the latest checkpoint: None after each of its files, and at last the checkpoint, if there is one."""
    for uri in _commits(run):
        tensors: dict[str, Tensor] = {}
        try:
            commit = _read_commit(uri)
            for name, digest in commit["files"].items():
                tensors |= _read_tensors(storage.join(uri.rpartition("/")[0], name), digest)
                yield None
        except (ValueError, KeyError, FileNotFoundError, safetensors.SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); using the one before", uri, error)
            continue
        yield Checkpoint(commit["position"], tensors, commit["facts"])
        return


def prune_checkpoints(run: str, newest: int, keep: int, keep_every: int | None = None) -> None:
    """Remove what the checkpoint at `newest` images, just written by the caller, makes superfluous.

    The `keep` newest stay, and those at multiples of `keep_every`. Files that no commit names are what dead attempts
    left. A commit goes before its files, so that no committed checkpoint ever lacks one; what is beyond `newest` is
    not touched.
    """
    folder = storage.join(run, "checkpoints")
    names = storage.list_names(folder, recursive=True)
    committed = {(_position(name), _attempt(name)) for name in names if _is_commit(name)}
    positions = sorted({position for position, _ in committed if position <= newest}, reverse=True)
    kept = set(positions[:keep]) | {position for position in positions if keep_every and position % keep_every == 0}
    for name in sorted(names, key=_is_commit, reverse=True):
        position = _position(name)
        if position <= newest and not (position in kept and (position, _attempt(name)) in committed):
            storage.delete(storage.join(folder, name))
    for position in {_position(name) for name in names} - kept:
        if position <= newest:
            storage.delete(_folder(run, position) + "/")  # with what a dead attempt had only half written there


def shared_out(tensors: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in parts of at most `most` bytes, or one tensor."""
    part: dict[str, Tensor] = {}
    room = most
    for name, tensor in tensors.items():
        if part and tensor.nbytes > room:
            yield part
            part, room = {}, most
        part[name] = tensor
        room -= tensor.nbytes
    yield part


def _folder(run: str, position: int) -> str:
    return storage.join(run, "checkpoints", f"images-{position:012d}")


def _commits(run: str) -> list[str]:
    """URIs of all commit objects, those with most images first."""
    folder = storage.join(run, "checkpoints")
    names = [name for name in storage.list_names(folder, recursive=True) if _is_commit(name)]
    return [storage.join(folder, name) for name in sorted(names, reverse=True)]


def _is_commit(name: str) -> bool:
    return re.fullmatch(r"images-\d+/commit-\w+\.json", name) is not None


def _position(name: str) -> int:
    """The images in images-N/file; those of a foreign name are beyond all others, and so left alone."""
    found = re.match(r"images-(\d+)/(?:commit|state)-", name)
    return int(found[1]) if found else sys.maxsize


def _attempt(name: str) -> str:
    """The attempt in images-N/state-ATTEMPT-000.safetensors or images-N/commit-ATTEMPT.json."""
    return name.rpartition("/")[2].removesuffix(".json").split("-")[1]


def _read_commit(uri: str) -> dict[str, Any]:
    commit = storage.read_json(uri)
    if commit["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={commit['format_version']} is not the {FORMAT_VERSION} that this code reads")
    return commit


def _read_tensors(uri: str, digest: str) -> dict[str, Tensor]:
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{uri} has another SHA-256 than its commit object says")
    return safetensors.torch.load(data)


_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip


def _write_tensors(uri: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Stream a safetensors file, one tensor after the other; answer its SHA-256.

    The library's own writers take a local path or make one bytes object of everything.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind = _SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with storage.open_output(uri) as file:
        part: Any  # bytes, or memory of a tensor
        for part in itertools.chain([len(text).to_bytes(8, "little") + text], map(_raw, tensors.values())):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


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
    training: dict[str, Any] | None = None,
) -> None:
    """Stream a safetensors file that carries its architecture; an existing one is left as it is.

    `training` is small JSON on where the weights come from, such as the images seen.
    """
    if not storage.exists(uri):
        _write_tensors(uri, weights, _about(architecture, diffusion, classes, training))


def encode_weights(
    weights: dict[str, Tensor],
    architecture: UNetConfig | ClassifierConfig,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
) -> bytes:
    """The bytes of such a file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return safetensors.torch.save(tensors, metadata=_about(architecture, diffusion, classes))


def _about(
    architecture: UNetConfig | ClassifierConfig,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
    training: dict[str, Any] | None = None,
) -> dict[str, str]:
    """What a weights file says of itself, in the header."""
    about = {
        "format_version": FORMAT_VERSION,
        "kind": "classifier" if isinstance(architecture, ClassifierConfig) else "unet",
        "architecture": architecture.model_dump(mode="json"),
        "diffusion": diffusion.model_dump(mode="json"),
        "classes": list(classes),
        "training": training or {},
    }
    return {"admiral": json.dumps(about)}


def weights_about(uri: str) -> dict[str, Any]:
    """What a weights file says of itself, without reading its tensors.

    Raises:
        ValueError: it is not a weights file of Admiral's.
    """
    with storage.open_input(uri) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return json.loads(json.loads(file.read(length))["__metadata__"]["admiral"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{uri} is not a weights file of Admiral's: its header has no {error}") from error


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
