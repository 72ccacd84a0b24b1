"""What a training leaves to sample from: files of weights beneath the run's weights/."""

import re
from typing import NamedTuple

from orchestrator import storage
from orchestrator.training.checkpoints import Checkpoint
from orchestrator.training.config import Config
from orchestrator.weights.network import save_weights


def snapshot_uris(run: str, config: Config, position: int) -> dict[str, str]:
    """Where the weights at `position` images lie, by the average's name, in the order of writing.

    Power-function averages, which are there to be put together, lie apart in weights/power/.
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
    """The last object that a training writes."""
    *_, last = snapshot_uris(run, config, config.length).values()
    return last


def is_due(config: Config, position: int) -> bool:
    """Whether weights are to be kept of `position` images: at the marks and at the end."""
    marked = config.snapshot_every is not None and config.passes(config.snapshot_every, position)
    return marked or position >= config.length


def write_snapshots(run: str, config: Config, classes: tuple[str, ...], state: Checkpoint) -> None:
    """Write every average in a training state (or, where there is none, its weights); what is there already stays."""
    for name, uri in snapshot_uris(run, config, state.position).items():
        prefix = "model." if name == "raw" else f"{name}."
        weights = {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
        training = {"images": state.position, "updates": state.facts["updates"], "average": name}
        save_weights(uri, weights, config.model, config.diffusion, classes, training)


class Snapshot(NamedTuple):
    """Weights that a training has kept."""

    images: int
    average: str  # "ema-0.9999", "raw"; of a post-hoc average "posthoc-0.05"
    name: str  # beneath the run's weights/


def snapshots(run: str) -> list[Snapshot]:
    """Return the weights that a run has kept, oldest first, without its power-function averages."""
    names = storage.list_names(storage.join(run, "weights"))
    found = [(name, re.fullmatch(r"images-(\d+)-(.+)\.safetensors", name)) for name in names]
    return sorted(Snapshot(int(parts[1]), parts[2], name) for name, parts in found if parts)


def power_snapshots(run: str) -> list[tuple[int, float, str]]:
    """Images, sigma_rel and URI of every power-function average that a run has kept, oldest first."""
    folder = storage.join(run, "weights", "power")
    found = []
    for name in storage.list_names(folder):
        if parts := re.fullmatch(r"images-(\d+)-([\d.]+)\.safetensors", name):
            found.append((int(parts[1]), float(parts[2]), storage.join(folder, name)))
    return found
