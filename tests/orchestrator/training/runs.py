"""What training runs leave behind, for the tests that look at it."""

from dataclasses import replace

from orchestrator.training.checkpoints import Checkpoint, read_newest


def newest_checkpoint(run: str) -> Checkpoint | None:
    """Return the newest usable checkpoint of `run`, or None if it has no checkpoints."""
    found = None
    for part in read_newest(run):
        found = replace(found, tensors=found.tensors | part.tensors) if found and part.tensors else part
    return found
