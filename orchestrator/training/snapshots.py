"""Snapshots of a training: weights files in the folder weights/ of the run."""

from collections.abc import Iterator
from typing import NamedTuple

from orchestrator import storage
from orchestrator.training.checkpoints import Checkpoint
from orchestrator.training.config import Config
from orchestrator.weights.network import SNAPSHOT, save_weights


def snapshot_uris(run: str, config: Config, position: int) -> dict[str, str]:
    """Return the URIs of the weights at `position` images by the name of the average, in the order of writing.

    Power-function averages, which post-hoc EMA combines, are in weights/power/.
    """
    images = f"images-{position:012d}"
    if not config.ema_rates:
        return {"raw": storage.join(run, "weights", f"{images}-raw.safetensors")}
    powers = {
        f"power-{s}": storage.join(run, "weights", "power", f"{images}-{s}.safetensors") for s in config.power_emas
    }
    return powers | {
        f"ema-{rate}": storage.join(run, "weights", f"{images}-ema-{rate}.safetensors") for rate in config.ema_rates
    }


def final_weights(run: str, config: Config) -> str:
    """Return the URI of the last weights file that a training writes."""
    *_, last = snapshot_uris(run, config, config.length).values()
    return last


def is_snapshot_due(config: Config, position: int) -> bool:
    """Return whether a snapshot is due at `position` images: every snapshot_every images and at the end."""
    at_interval = config.snapshot_every is not None and config.is_due(config.snapshot_every, position)
    return at_interval or position >= config.length


def write_snapshots(run: str, config: Config, classes: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """Write the averages in a checkpoint, or its weights if it has no averages; existing files are kept."""
    for name, uri in snapshot_uris(run, config, checkpoint.position).items():
        prefix = "model." if name == "raw" else f"{name}."
        weights = {key.removeprefix(prefix): t for key, t in checkpoint.tensors.items() if key.startswith(prefix)}
        training = {"images": checkpoint.position, "updates": checkpoint.facts["updates"], "average": name}
        save_weights(uri, weights, config.model, config.diffusion, classes, training)


class Snapshot(NamedTuple):
    """A weights file of a training."""

    images: int
    average: str  # "ema-0.9999", "raw", or "posthoc-0.05" for a post-hoc average
    name: str  # of the file in weights/


def snapshots(run: str) -> list[Snapshot]:
    """Return the snapshots of a run, oldest first, without its power-function averages."""
    return sorted(_list_snapshots(storage.join(run, "weights")))


def power_snapshots(run: str) -> list[tuple[int, float, str]]:
    """Return (images, sigma_rel, URI) of every power-function average of a run, oldest first."""
    folder = storage.join(run, "weights", "power")
    snapshots = _list_snapshots(folder)
    return [(images, float(sigma_rel), storage.join(folder, name)) for images, sigma_rel, name in snapshots]


def _list_snapshots(folder: str) -> Iterator[Snapshot]:
    for name in storage.list_names(folder):
        if match := SNAPSHOT.fullmatch(name):
            yield Snapshot(int(match["images"]), match["kind"], name)
