"""How a training goes on: in its own folder, to a larger length, or from one of its checkpoints in a new run."""

import logging

import torch

from cluster.collectives import Group
from orchestrator import storage
from orchestrator.config import check_config, check_or_write_config, differences, read_config
from orchestrator.training import checkpoints
from orchestrator.training.checkpoints import Checkpoint, UnusableCheckpoints
from orchestrator.training.config import Config
from orchestrator.training.state import TrainingState, learning_rate

log = logging.getLogger(__name__)


def check_folder(config: Config) -> str:
    """Check that the run's folder may go on with this config; return how the learning rate of a longer run goes on.

    That is empty unless the learning rate falls towards an end that is now moved.

    Raises:
        ValueError: the run has checkpoints of another config, or beyond its end.
    """
    run = config.path(config.output)
    there, found = checkpoints.positions(run), read_config(run)
    if not there:
        return ""
    if there[0] > config.length:
        raise ValueError(
            f"--total-images {config.total_images}: {run} is already at {there[0]:,} images; pass as many or more"
        )
    before, course = found.get("total_images", config.total_images), ""
    if before < config.total_images and config.lr_schedule == found.get("lr_schedule") == "linear":
        shorter = config.model_copy(update={"total_images": before})
        course = (
            f"at {there[0]:,} images the learning rate goes on from {learning_rate(config, there[0]):.3g} (it was "
            f"{learning_rate(shorter, there[0]):.3g}) and falls linearly to zero at {config.total_images:,}"
        )
        if not config.extend:
            raise ValueError(
                f"--total-images {config.total_images}: {run} was made with {before}, where its learning rate reaches "
                f"zero; pass --extend to make it longer: {course}"
            )
    check_config(run, shorter if course else config, finished=True)
    if config.reduction == "exact" and found.get("num_threads", config.num_threads) != config.num_threads:
        log.warning(
            "--num-threads %d, but %s was begun with %d: with --reduction exact the weights will differ in their last "
            "bits from those of an undisturbed run; the training goes on",
            config.num_threads, run, found["num_threads"],
        )  # fmt: skip
    return course


def bind(config: Config) -> None:
    """Check the run's folder and write its config, which it is bound to from the first checkpoint on.

    Raises what `check_folder` does.
    """
    course, run = check_folder(config), config.path(config.output)
    there, found = checkpoints.positions(run), read_config(run)
    if course:
        extended = [*found.get("extended", []), {"at": there[0], "total_images": found["total_images"]}]
        changed = found | {"total_images": config.total_images, "extended": extended}
        storage.write_json(storage.join(run, "config.json"), changed)
        print(f"{run} is extended from {found['total_images']:,} to {config.total_images:,} images: {course}")
    else:
        check_or_write_config(run, config, bool(there), {"num_threads": config.num_threads})


def branch_off(config: Config, eval_images: int) -> Config:
    """Copy the state at a checkpoint of the config's run into the new run `config.branch`; return that run's config.

    Averages that the run lacks begin with its weights. Nothing is copied if the new run has checkpoints already.

    Raises:
        ValueError: there is no such checkpoint, or it does not fit the config, or the new run is another one.
    """
    assert config.branch is not None
    source, at = config.path(config.output), config.branch_at
    child = config.model_copy(update={"output": config.branch, "branch": None, "branch_at": None})
    run = child.path(child.output)
    if checkpoints.positions(run):
        if parent_of(run).rpartition(" at ")[0] != source:
            raise ValueError(f"--branch {config.branch} is a run of its own already: choose a new folder")
        return child
    if not (there := checkpoints.positions(source)):
        raise ValueError(f"--branch {config.branch}: {source} has no checkpoint to branch off; train it first")
    if at not in (None, *there):
        raise ValueError(f"--branch-at {at}: the checkpoints of {source} are at {', '.join(map(str, there))} images")
    state = TrainingState(child, torch.device("cpu"), eval_images)
    fresh_scale = state.log2_loss_scale
    try:
        state.restore(source, Group(0, 1), at, branching=True)
    except UnusableCheckpoints:
        raise
    except ValueError as error:
        raise ValueError(
            f"--branch {config.branch}: {error}. A branch keeps the network and its optimizer; to start from the "
            "weights alone pass --init-from"
        ) from error
    if state.position % child.batch_size:
        raise ValueError(
            f"--batch-size {child.batch_size}: {source} branches off at {state.position} images, which is no multiple"
        )
    if child.dtype != "float16" or not state.log2_loss_scale:
        state.log2_loss_scale = fresh_scale
    there_config, here = read_config(source), child.fingerprint()
    changes = differences({name: there_config[name] for name in here.keys() & there_config.keys()}, here)
    notes = {"num_threads": child.num_threads, "parent": {"run": source, "images": state.position}}
    check_or_write_config(run, child, False, notes)
    checkpoints.save_checkpoint(run, Checkpoint(state.position, state.tensors(), state.facts()))
    print(f"{run} branches off {source} at {state.position:,} images ({changes or 'nothing changed'})")
    return child


def parent_of(run: str) -> str:
    """Return which run this one branched off, and where; empty if it did not."""
    parent = read_config(run).get("parent")
    return f"{parent['run']} at {parent['images']} images" if parent else ""
