"""The actor that holds a worker of a pool, and the classification of its errors."""

import contextlib
import faulthandler
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

# CUDA errors that persist until the process ends. Running out of memory is not one of them.
DEVICE_ERROR = re.compile(
    "CUDA error|device-side assert|uncorrectable ECC|illegal memory access|NCCL|CUBLAS_STATUS_(INTERNAL|EXECUTION)|"
    "CUDNN_STATUS_(INTERNAL|EXECUTION|MAPPING)|cuDNN.*INTERNAL"
)
# What Ray and gloo say about a lost worker, and what it means.
LOSS_MESSAGES = {
    "node has died": "its node was lost",
    "worker process has died": "its process was killed, perhaps because the node ran out of memory",
    "gloo/transport": "the connection to another worker was lost",
}


class WorkerActor:
    """A Ray actor that holds one worker of a pool.

    The worker is created by a call of `ready` rather than by the constructor, so that its errors reach the caller and
    do not end the actor.
    """

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_worker = make_worker
        self._work: Callable[[Any], Any] | None = None

    def node_name(self) -> str:
        """Return the address and the short id of the node of this process."""
        import ray

        return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:6]})"

    def ready(self, deadline: float) -> None:
        """Create the worker if it does not exist. End this process if that takes longer than `deadline` seconds."""
        with _deadline(deadline):
            if self._work is None:
                self._work = self._make_worker()

    def work(self, item: Any, deadline: float) -> Any:
        """Return the result of an item. End this process if that takes longer than `deadline` seconds."""
        self.ready(deadline)  # creates the worker if this process was restarted while idle, or by another mapping
        assert self._work is not None
        with _deadline(deadline):
            return self._work(item)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Write all stacks to this process's log and end the process, even in C code, if the block lasts longer."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def restart_process(actor: Any) -> None:
    """End an actor's process. Its running calls return errors, and Ray starts a new process."""
    import ray

    ray.kill(actor, no_restart=False)


def is_task_error(error: BaseException) -> bool:
    """Return whether the code of a call raised this error, so that the actor's process is still alive."""
    from ray.exceptions import RayTaskError

    return isinstance(error, RayTaskError)


def is_device_error(error: BaseException) -> bool:
    """Return whether an error means that this process can no longer use its GPU."""
    cause = getattr(error, "cause", None)
    class_names = {base.__name__ for base in type(cause).__mro__}  # by name, because not every driver has torch
    if "OutOfMemoryError" in class_names:
        return False
    return "AcceleratorError" in class_names or bool(DEVICE_ERROR.search(str(cause)))


def reason_of(error: BaseException) -> str:
    """Return one line with the error that a worker raised, or with how its process ended according to Ray."""
    from ray.exceptions import ActorUnavailableError

    if is_task_error(error) and (cause := getattr(error, "cause", None)) is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:500]
    if isinstance(error, ActorUnavailableError):  # Ray does not know the cause yet
        return "its process ended"
    last_line = (str(error).strip().splitlines() or [""])[-1].strip()
    summary = summarize_loss(last_line)
    return summary if summary != last_line else f"its process ended: {last_line[:300]}"


def summarize_loss(message: str) -> str:
    """Return a short text for a message of Ray or gloo about a lost worker; return any other message unchanged."""
    return next((meaning for phrase, meaning in LOSS_MESSAGES.items() if phrase in message), message)
