"""Training checkpoints on disk: written whole, committed by their last object, found by listing, pruned."""

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
from orchestrator.training.config import passes
from orchestrator.weights.network import write_tensors

FORMAT_VERSION = 1
FILE_BYTES = 256 << 20  # of a checkpoint's files: reading holds twice this beside the state itself

_NAME = re.compile(r"images-(?P<position>\d{12,})/(?P<kind>commit|state)-(?P<attempt>\w+)(-\d+)?\.(json|safetensors)")

log = logging.getLogger(__name__)


class UnusableCheckpoints(ValueError):
    """A run has checkpoints, and none of them can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a resume needs: tensors by name, and the position in images seen."""

    position: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # small JSON: skipped steps and the like


def save_checkpoint(run: str, checkpoint: Checkpoint, attempt: str = "") -> str:
    """Write `run`/checkpoints/images-N/, committed by its last object; return that object's URI.

    The tensors are written in a few files. All names hold `attempt` (by default a fresh one), so a dying writer of
    an earlier attempt cannot touch them, nor they its; only the commit object makes a checkpoint count.
    """
    folder, attempt, files = _folder(run, checkpoint.position), attempt or uuid.uuid4().hex[:12], {}
    for number, tensors in enumerate(_in_parts(checkpoint.tensors, FILE_BYTES)):
        name = f"state-{attempt}-{number:03d}.safetensors"
        files[name] = write_tensors(storage.join(folder, name), tensors)
    commit = {
        "format_version": FORMAT_VERSION,
        "position": checkpoint.position,
        "facts": checkpoint.facts,
        "files": files,  # SHA-256 of each
    }
    uri = storage.join(folder, f"commit-{attempt}.json")
    storage.put_if_absent(uri, storage.json_bytes(commit))
    return uri


def positions(run: str) -> list[int]:
    """Return where a run has committed checkpoints, in images seen, the newest first."""
    return list(dict.fromkeys(int(found["position"]) for _, found in _commits(run)))


def read_newest(run: str, at: int | None = None) -> Iterator[Checkpoint]:
    """Yield the newest usable checkpoint in parts, one for each of its files; nothing if the run has no checkpoints.

    at: only a checkpoint at this position, in images seen; None: any.

    A part without tensors comes first. If a file turns out to be damaged, the checkpoint before follows, again with
    such a part at its beginning.

    Raises:
        UnusableCheckpoints: there are checkpoints, but all are damaged or written in another format.
        OSError: storage failed, so nobody can tell what is there.
    """
    reasons = []
    for uri, found in _commits(run):
        if at not in (None, int(found["position"])):
            continue
        try:
            commit = _read_commit(uri)
            yield Checkpoint(commit["position"], {}, commit["facts"])
            for name, digest in commit["files"].items():
                tensors = _read_tensors(storage.join(uri.rpartition("/")[0], name), digest)
                yield Checkpoint(commit["position"], tensors, commit["facts"])
            return
        except (ValueError, KeyError, FileNotFoundError, safetensors.SafetensorError) as error:
            log.warning("checkpoint %s cannot be used (%s); trying the one before", uri, error)
            reasons.append(f"{uri} ({error})")
    if reasons:
        raise UnusableCheckpoints(
            f"{run} has checkpoints, but none can be used: {', '.join(reasons)}. Restore them, run the version of "
            "the code that wrote them, or pass --restart-from-scratch to start at image 0"
        )


def prune_checkpoints(run: str, newest: int, keep: int, keep_every: int | None = None) -> None:
    """Remove what the checkpoint at `newest` images, just written by the caller, makes superfluous.

    The `keep` newest stay, and the first past each multiple of `keep_every`. Files that no commit names are what dead
    attempts left. A commit goes before its files, so that no committed checkpoint ever lacks one. What is beyond
    `newest`, and what is not named like a checkpoint's object, is not touched.
    """
    root = storage.join(run, "checkpoints")
    matches = filter(None, map(_NAME.fullmatch, storage.list_names(root, recursive=True)))
    there = [(int(found["position"]), found["kind"], found["attempt"], found[0]) for found in matches]
    there = [found for found in there if found[0] <= newest]
    committed = {(position, attempt) for position, kind, attempt, _ in there if kind == "commit"}
    positions = sorted({position for position, _ in committed})
    kept = set(positions[-keep:])
    if keep_every:
        kept |= {position for before, position in pairwise([0, *positions]) if passes(keep_every, before, position)}
    for position, _, attempt, name in sorted(there, key=lambda found: found[1]):  # "commit" before "state"
        if position not in kept or (position, attempt) not in committed:
            storage.delete(storage.join(root, name))
    for position in {position for position, *_ in there} - kept:
        if not storage.list_names(_folder(run, position)):
            storage.delete(_folder(run, position) + "/")  # with what a dead attempt had only half written there


def _in_parts(tensors: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in parts of at most `most` bytes, or one tensor."""
    part, size = dict[str, Tensor](), 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > most:
            yield part
            part, size = {}, 0
        part[name], size = tensor, size + tensor.nbytes
    yield part


def _folder(run: str, position: int) -> str:
    return storage.join(run, "checkpoints", f"images-{position:012d}")


def _commits(run: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the URI and the parts of the name of every commit object, those with the most images first.

    Each folder is listed by itself: on a local disk a recursive listing leaves out what it cannot read.
    """
    root = storage.join(run, "checkpoints")
    for folder in reversed(storage.list_names(root)):
        for name in reversed(storage.list_names(storage.join(root, folder))):
            if (found := _NAME.fullmatch(folder + name)) and found["kind"] == "commit":
                yield storage.join(root, folder, name), found


def _read_commit(uri: str) -> dict[str, Any]:
    commit = storage.read_json(uri)
    if not isinstance(commit, dict):
        raise ValueError("it is not the commit object of a checkpoint")
    if commit["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={commit['format_version']}; this version of the code reads {FORMAT_VERSION}")
    return commit


def _read_tensors(uri: str, digest: str) -> dict[str, Tensor]:
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{uri} has another SHA-256 than its commit object says")
    return safetensors.torch.load(data)
