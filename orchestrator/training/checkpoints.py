"""Training checkpoints on disk: written whole, committed by their last object, found by listing, pruned."""

import hashlib
import logging
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from orchestrator import storage
from orchestrator.weights.network import write_tensors

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
    """Write `run`/checkpoints/images-N/, committed by its last object; return that object's URI.

    The tensors are streamed into a few files. All names hold `attempt` (by default a fresh one), so a dying writer of
    an earlier attempt cannot touch them, nor they its; only the commit object makes a checkpoint count.
    """
    folder, attempt = _folder(run, checkpoint.position), attempt or new_attempt()
    files = {}
    for number, tensors in enumerate(shared_out(checkpoint.tensors, FILE_BYTES)):
        name = f"state-{attempt}-{number:03d}.safetensors"
        files[name] = write_tensors(storage.join(folder, name), tensors, {})
    commit = {
        "format_version": FORMAT_VERSION,
        "position": checkpoint.position,
        "facts": checkpoint.facts,
        "files": files,  # SHA-256 of each
    }
    uri = storage.join(folder, f"commit-{attempt}.json")
    storage.put_if_absent(uri, storage.json_bytes(commit))
    return uri


def new_attempt() -> str:
    """A name that no other attempt at a training has."""
    return uuid.uuid4().hex[:12]


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
