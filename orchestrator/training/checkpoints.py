"""Training checkpoints in storage: each is a folder of files, and is valid once its commit object exists."""

import hashlib
import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from orchestrator import storage
from orchestrator.training.config import passes_multiple
from orchestrator.weights.network import write_tensors

FORMAT_VERSION = 1
FILE_BYTES = 256 << 20  # maximum size of a file; reading a checkpoint needs twice as much memory beside the state

_NAME = re.compile(r"images-(?P<position>\d{12,})/(?P<kind>commit|state)-(?P<attempt>\w+)(-\d+)?\.(json|safetensors)")

log = logging.getLogger(__name__)


class UnusableCheckpoints(ValueError):
    """A run has checkpoints, but none of them can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training at `position` images."""

    position: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # the rest of the state as JSON, such as the number of skipped steps


def save_checkpoint(run: str, checkpoint: Checkpoint, attempt: str = "") -> str:
    """Write the files of a checkpoint to `run`/checkpoints/images-N/, then its commit object; return the latter's URI.

    All names contain `attempt` (by default a random id), so two writers never write the same object.
    """
    folder, attempt = _folder(run, checkpoint.position), attempt or uuid.uuid4().hex[:12]
    digests = {}
    for number, tensors in enumerate(_split(checkpoint.tensors, FILE_BYTES)):
        name = f"state-{attempt}-{number:03d}.safetensors"
        digests[name] = write_tensors(storage.join(folder, name), tensors)
    commit = {"format_version": FORMAT_VERSION, "position": checkpoint.position, "facts": checkpoint.facts}
    uri = storage.join(folder, f"commit-{attempt}.json")
    storage.put_if_absent(uri, storage.json_bytes(commit | {"files": digests}))
    return uri


def positions(run: str) -> list[int]:
    """Return the positions, in images, of the committed checkpoints of a run, newest first."""
    return list(dict.fromkeys(int(match["position"]) for _, match in _commits(run)))


def read_newest(run: str, at: int | None = None) -> Iterator[Checkpoint]:
    """Yield the newest usable checkpoint in parts, one for each of its files; nothing if the run has no checkpoints.

    A part without tensors comes before the files. If a file is damaged, the previous checkpoint follows, which begins
    with a part without tensors, too.

    at: use only a checkpoint at this position in images; None = any.

    Raises:
        UnusableCheckpoints: there are checkpoints, but all are damaged or written in another format.
        OSError: the storage failed, so it is unknown which checkpoints exist.
    """
    reasons = []
    for uri, match in _commits(run):
        if at not in (None, int(match["position"])):
            continue
        try:
            commit = storage.read_json(uri)
            if (version := commit["format_version"]) != FORMAT_VERSION:
                raise ValueError(f"format_version={version}; this version of the code reads {FORMAT_VERSION}")
            yield Checkpoint(commit["position"], {}, commit["facts"])
            for name, digest in commit["files"].items():
                tensors = _read_tensors(storage.join(uri.rpartition("/")[0], name), digest)
                yield Checkpoint(commit["position"], tensors, commit["facts"])
            return
        except (ValueError, KeyError, FileNotFoundError, safetensors.SafetensorError) as error:
            log.warning("checkpoint %s cannot be used (%s); trying the previous one", uri, error)
            reasons.append(f"{uri} ({error})")
    if reasons:
        raise UnusableCheckpoints(
            f"{run} has checkpoints, but none can be used: {', '.join(reasons)}. Restore the files, run the version "
            "of the code that wrote them, or pass --restart-from-scratch to start at image 0"
        )


def prune_checkpoints(run: str, newest: int, keep: int, keep_every: int | None = None) -> None:
    """Remove old checkpoints, and files of attempts that died before their commit.

    The `keep` newest checkpoints stay, and the first one after each multiple of `keep_every` images. A commit object is
    removed before its files, so that a committed checkpoint is always complete. Checkpoints beyond `newest`, which
    the caller has just written, and objects with other names are left alone.
    """
    root = storage.join(run, "checkpoints")
    matches = filter(None, map(_NAME.fullmatch, storage.list_names(root, recursive=True)))
    objects = [(int(match["position"]), match) for match in matches]
    objects = [(position, match) for position, match in objects if position <= newest]
    committed = {(position, match["attempt"]) for position, match in objects if match["kind"] == "commit"}
    committed_positions = sorted({position for position, _ in committed})
    kept = set(committed_positions[-keep:])
    if keep_every:
        steps = pairwise([0, *committed_positions])
        kept |= {position for before, position in steps if passes_multiple(keep_every, before, position)}
    for position, match in sorted(objects, key=lambda entry: entry[1]["kind"]):  # "commit" before "state"
        if position not in kept or (position, match["attempt"]) not in committed:
            storage.delete(storage.join(root, match[0]))
    for position in {position for position, _ in objects} - kept:
        if not storage.list_names(_folder(run, position)):
            storage.delete(_folder(run, position) + "/")  # with temporary files of writers that were killed


def _split(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in parts of at most `max_bytes`; a larger tensor is a part of its own."""
    part, size = dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _folder(run: str, position: int) -> str:
    return storage.join(run, "checkpoints", f"images-{position:012d}")


def _commits(run: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the URI and the matched name of every commit object, the newest checkpoint first.

    Each folder is listed separately, because a recursive listing of a local disk skips folders that it cannot read.
    """
    root = storage.join(run, "checkpoints")
    for folder in reversed(storage.list_names(root)):
        for name in reversed(storage.list_names(storage.join(root, folder))):
            if (match := _NAME.fullmatch(folder + name)) and match["kind"] == "commit":
                yield storage.join(root, folder, name), match


def _read_tensors(uri: str, digest: str) -> dict[str, Tensor]:
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"the SHA-256 of {uri} is not the one in its commit object")
    return safetensors.torch.load(data)
