"""Continuing a training: in its own folder, to a larger length, or from one of its checkpoints in a new run."""

import logging

import torch

from cluster.collectives import Group
from orchestrator import storage
from orchestrator.config import check_config, check_or_write_config, differences, read_config
from orchestrator.training import checkpoints
from orchestrator.training.checkpoints import Checkpoint, UnusableCheckpoints
from orchestrator.training.config import Config
from orchestrator.training.snapshots import snapshots
from orchestrator.training.state import TrainingState, learning_rate

log = logging.getLogger(__name__)


def check_folder(config: Config) -> str:
    """Check that the run in the output folder can continue with this config.

    If the training becomes longer and its learning rate falls linearly to zero, return a description of how the
    learning rate changes, else "".

    Raises:
        ValueError: the run has checkpoints or weights that were made with another config, or that are beyond
            `total_images`; or it has weights before `total_images`, but no checkpoint with which to continue.
    """
    run = config.path(config.output)
    positions, stored = checkpoints.positions(run), read_config(run)
    finished = positions or [snapshot.images for snapshot in reversed(snapshots(run))]
    if not finished:
        return ""
    if finished[0] > config.length:
        raise ValueError(
            f"--total-images {config.total_images}: {run} is already at {finished[0]:,} images; pass at least that many"
        )
    if not positions and finished[0] < config.length:
        raise ValueError(
            f"--output {config.output}: {run} has weights at {finished[0]:,} images, but no checkpoint with which to "
            "continue; restore its checkpoints, or start a new run from the weights by another --output and --init-from"
        )
    old_length, change = stored.get("total_images", config.total_images), ""
    if old_length < config.total_images and config.lr_schedule == stored.get("lr_schedule") == "linear":
        shorter = config.model_copy(update={"total_images": old_length})
        change = (
            f"at {finished[0]:,} images the learning rate changes from {learning_rate(shorter, finished[0]):.3g} to "
            f"{learning_rate(config, finished[0]):.3g}, and then falls linearly to zero at {config.total_images:,}"
        )
        if not config.extend:
            raise ValueError(
                f"--total-images {config.total_images}: the learning rate of {run} falls to zero at {old_length} "
                f"images; pass --extend to train longer: {change}"
            )
    check_config(run, shorter if change else config, finished=True)
    if config.reduction == "exact" and stored.get("num_threads", config.num_threads) != config.num_threads:
        log.warning(
            "--num-threads %d, but %s was started with %d: with --reduction exact the last bits of the weights will "
            "differ from those of a run that was not interrupted; the training continues",
            config.num_threads, run, stored["num_threads"],
        )  # fmt: skip
    return change


def check_and_write_config(config: Config) -> None:
    """Check the run's folder and write its config.json, which later attempts must match once there is a checkpoint.

    Raises what `check_folder` does.
    """
    change, run = check_folder(config), config.path(config.output)
    positions, stored = checkpoints.positions(run), read_config(run)
    finished, length = bool(positions or snapshots(run)), {"total_images": config.total_images}
    if not finished or not stored:
        check_or_write_config(run, config, finished, length | {"num_threads": config.num_threads})
        return
    updated = stored | length
    if change:
        extension = {"at": positions[0], "total_images": stored["total_images"]}
        updated["extended"] = [*stored.get("extended", []), extension]
        print(f"{run} is extended from {stored['total_images']:,} to {config.total_images:,} images: {change}")
    if updated != stored:
        storage.write_json(storage.join(run, "config.json"), updated)


def branch_off(config: Config) -> Config:
    """Copy a checkpoint of the run in `config.output` to the new run `config.branch`; return the new run's config.

    Averages that the checkpoint lacks start at its weights. The losses of the best evaluation are not copied, because
    the new run may evaluate other images or another loss. If the new run has checkpoints, nothing is copied.

    Raises:
        ValueError: there is no such checkpoint, it does not fit the config, or the new run is not a branch of this run.
    """
    assert config.branch is not None
    source, at = config.path(config.output), config.branch_at
    child = config.model_copy(update={"output": config.branch, "branch": None, "branch_at": None})
    run = child.path(child.output)
    if checkpoints.positions(run):
        parent = read_config(run).get("parent", {})
        if parent.get("run") != source or at not in (None, parent["images"]):
            where = "" if at is None else f" at {at} images"
            raise ValueError(f"--branch {config.branch} is not a branch of {source}{where}; choose a new folder")
        return child
    if not (positions := checkpoints.positions(source)):
        raise ValueError(f"--branch {config.branch}: {source} has no checkpoint; train it first")
    if at not in (None, *positions):
        raise ValueError(
            f"--branch-at {at}: the checkpoints of {source} are at {', '.join(map(str, positions))} images"
        )
    state = TrainingState(child, torch.device("cpu"))
    initial_scale = state.log2_loss_scale
    try:
        state.restore(source, Group(0, 1), at, branching=True)
    except UnusableCheckpoints:
        raise
    except ValueError as error:
        raise ValueError(
            f"--branch {config.branch}: {error}. A branch keeps the network and the optimizer; pass --init-from to "
            "start from the weights alone"
        ) from error
    if state.position % child.batch_size:
        raise ValueError(
            f"--batch-size {child.batch_size}: the branch starts at {state.position} images, which is not a multiple; "
            "pass a divisor, or --branch-at the position of another checkpoint"
        )
    if child.dtype != "float16" or not state.log2_loss_scale:  # the checkpoint of another dtype has the scale 0
        state.log2_loss_scale = initial_scale
    source_config, own_fields = read_config(source), child.fingerprint()
    changes = differences({name: source_config[name] for name in own_fields.keys() & source_config.keys()}, own_fields)
    notes = {"num_threads": child.num_threads, "parent": {"run": source, "images": state.position}}
    check_or_write_config(run, child, False, notes)
    checkpoints.save_checkpoint(run, Checkpoint(state.position, state.tensors(), state.facts()))
    print(f"{run} branches off {source} at {state.position:,} images ({changes or 'nothing changed'})")
    return child


def parent_of(run: str) -> str:
    """Return the run of which this one is a branch and the position of the checkpoint, or ""."""
    parent = read_config(run).get("parent")
    return f"{parent['run']} at {parent['images']} images" if parent else ""
