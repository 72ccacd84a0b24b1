"""Hashes of a training that must be equal: the final state, and the rows that its steps consumed."""

import hashlib
import json
import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch

from orchestrator import storage
from orchestrator.training.config import AdmConfig
from orchestrator.weights.network import load_network
from tests.orchestrator.training.runs import newest_checkpoint

RECORD = re.compile(r"(\d{12})-(\d{4})-of-(\d{4})-process-(\d+)-(\w+)\.json")


class AuditName(NamedTuple):
    """The parts of the name of an audit log: the step's position, and the worker that wrote it."""

    position: int
    rank: int
    world_size: int
    process: int
    attempt: str


def parse_audit_name(name: str) -> AuditName | None:
    """Parse the name of an audit log; return None for any other name."""
    if (match := RECORD.search(name)) is None:
        return None
    position, rank, world_size, process, attempt = match.groups()
    return AuditName(int(position), int(rank), int(world_size), int(process), attempt)


def state_hash(config: AdmConfig) -> str:
    """Return the SHA-256 of the final checkpoint: weights, every EMA, the optimizer and all other state.

    Check that the exported weights are equal to the EMAs in the checkpoint.
    """
    checkpoint = newest_checkpoint(config.path(config.output))
    assert checkpoint is not None and checkpoint.position == config.length, f"{config.output} has not finished"
    for rate in config.ema_rates:
        name = f"weights/images-{config.length:012d}-ema-{rate}.safetensors"
        network = load_network(storage.join(config.path(config.output), name)).module
        for key, parameter in network.named_parameters():
            assert torch.equal(parameter, checkpoint.tensors[f"ema-{rate}.{key}"]), f"{name} differs in {key}"
    digest = hashlib.sha256(json.dumps(checkpoint.facts, sort_keys=True).encode())
    for key in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def consumed(config: AdmConfig, first: int = 0) -> list[dict[str, Any]]:
    """Return every row that the steps consumed, in the order of the global batches, from position `first` on.

    Check that all attempts at a position consumed the same rows; with reduction=exact, also with bit-equal losses.
    """
    assert config.audit_dir is not None
    folder = config.path(config.audit_dir)
    of_position: dict[int, dict[int, dict[int, list]]] = defaultdict(lambda: defaultdict(dict))
    for name in storage.list_names(folder):
        log = parse_audit_name(name)
        assert log is not None, f"{name} is not an audit log of a step"
        if log.position < first:
            continue
        rows = _rows(storage.read_json(storage.join(folder, name)), log.position)
        earlier = of_position[log.position][log.world_size].setdefault(log.rank, rows)
        equal = earlier == rows if config.reduction == "exact" else _without_loss(earlier) == _without_loss(rows)
        assert equal, f"two attempts consumed different rows: {name}"
    assert sorted(of_position) == list(range(first, config.length, config.batch_size)), "steps are missing"
    return [row for position in sorted(of_position) for row in _global_batch(position, of_position[position])]


def _rows(content: dict[str, Any], position: int) -> list[dict[str, Any]]:
    return [{"position": position} | dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


def _global_batch(position: int, by_world_size: dict[int, dict[int, list]]) -> list[dict[str, Any]]:
    """Return the rows of a step over all workers; check that every number of workers consumed the same rows."""
    complete = [
        [row for rank in sorted(ranks) for row in ranks[rank]] for w, ranks in by_world_size.items() if len(ranks) == w
    ]
    assert complete, f"no attempt recorded the complete step at {position}"
    for world_size, ranks in by_world_size.items():
        rows_per_worker = len(complete[0]) // world_size
        for rank, rows in ranks.items():
            expected = complete[0][rank * rows_per_worker : (rank + 1) * rows_per_worker]
            assert _without_loss(rows) == _without_loss(expected), f"worker {rank} of {world_size} at {position}"
    return complete[0]


def _without_loss(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "loss"} for row in rows]


def order_hash(rows: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of the unsorted list of (position, sample, flip, t, CRC of pixels)."""
    return _hash_of(rows, "position", "sample", "flip", "t", "pixels")


def noise_hash(rows: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of the list of (position, sample, CRC of noise)."""
    return _hash_of(rows, "position", "sample", "noise")


def _hash_of(rows: list[dict[str, Any]], *names: str) -> str:
    return hashlib.sha256(json.dumps([[row[name] for name in names] for row in rows]).encode()).hexdigest()
