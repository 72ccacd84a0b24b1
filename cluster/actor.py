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
# Words of Ray and gloo about a worker that is lost, and what they mean.
LOSSES = {
    "node has died": "its node was lost",
    "worker process has died": "its process was killed, perhaps because the node ran out of memory",
    "gloo/transport": "the connection to another worker was lost",
}


class WorkerActor:
    """The actor of a worker. The worker is created in `ready`, so that its errors are errors of a call."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_worker = make_worker
        self._work: Callable[[Any], Any] | None = None

    def is_there(self) -> str:
        """Return the name of the node."""
        import ray

        return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:6]})"

    def ready(self, deadline: float) -> None:
        with _ending_after(deadline):
            if self._work is None:
                self._work = self._make_worker()

    def work(self, item: Any, deadline: float) -> Any:
        self.ready(deadline)  # if it was restarted while it was idle, or by another mapping
        assert self._work is not None
        with _ending_after(deadline):
            return self._work(item)


@contextlib.contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    """If the block lasts longer, write all stacks to this process's log and end the process, even inside C code."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def restart_process(actor: Any) -> None:
    """End an actor's process. Its running calls return errors, and Ray starts a new process."""
    import ray

    ray.kill(actor, no_restart=False)


def is_raised(error: BaseException) -> bool:
    """Return whether a call raised an error in a process that is still alive."""
    from ray.exceptions import RayTaskError

    return isinstance(error, RayTaskError)


def is_device_error(error: BaseException) -> bool:
    """Return whether an error means that this process can no longer use its GPU."""
    cause = getattr(error, "cause", None)
    names = {kind.__name__ for kind in type(cause).__mro__}  # by name, because not every driver has torch
    if "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or bool(DEVICE_ERROR.search(str(cause)))


def reason_of(error: BaseException) -> str:
    """Return in one line the error that a worker raised, or how its process ended according to Ray."""
    from ray.exceptions import ActorUnavailableError

    if is_raised(error) and (cause := getattr(error, "cause", None)) is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:500]
    if isinstance(error, ActorUnavailableError):  # Ray does not know the cause yet
        return "its process ended"
    words = (str(error).strip().splitlines() or [""])[-1].strip()
    return meaning if (meaning := in_short(words)) != words else f"its process ended: {words[:300]}"


def in_short(reason: str) -> str:
    """Return the meaning of what Ray or gloo say about a lost worker, or else the reason itself."""
    return next((meaning for words, meaning in LOSSES.items() if words in reason), reason)
