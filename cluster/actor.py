"""The process of a pool's worker: it holds the loaded worker, ends itself at a deadline, and its errors are sorted."""

import contextlib
import faulthandler
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

# CUDA errors that stay until the process ends. Memory that ran out is not among them.
DEVICE_ERROR = re.compile(
    "CUDA error|device-side assert|uncorrectable ECC|illegal memory access|NCCL|CUBLAS_STATUS_(INTERNAL|EXECUTION)|"
    "CUDNN_STATUS_(INTERNAL|EXECUTION|MAPPING)|cuDNN.*INTERNAL"
)


class WorkerActor:
    """What runs in an actor. The worker is made in `ready`, so that its errors come back as errors of a call."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_worker = make_worker
        self._work: Callable[[Any], Any] | None = None

    def is_there(self) -> str:
        """Return the node's name."""
        import ray

        return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:6]})"

    def ready(self, deadline: float) -> None:
        with _ending_after(deadline):
            if self._work is None:
                self._work = self._make_worker()

    def work(self, item: Any, deadline: float) -> Any:
        self.ready(deadline)  # it was restarted while it was idle, or by another mapping
        assert self._work is not None
        with _ending_after(deadline):
            return self._work(item)


@contextlib.contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    """Dump all stacks into the log of this process and end it if the block lasts longer, even inside of C code."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def restart_process(actor: Any) -> None:
    """End an actor's process; Ray starts a new one. Its running calls return with an error."""
    import ray

    ray.kill(actor, no_restart=False)


def is_raised(error: BaseException) -> bool:
    """Whether a call raised an error, and the process lives."""
    from ray.exceptions import RayTaskError

    return isinstance(error, RayTaskError)


def is_device_error(error: BaseException) -> bool:
    """Whether an error says that the process's GPU cannot be used any more."""
    cause = getattr(error, "cause", None)
    names = {kind.__name__ for kind in type(cause).__mro__}  # by name, because not every driver has torch
    if "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or bool(DEVICE_ERROR.search(str(cause)))


def reason_of(error: BaseException) -> str:
    """Return the type and message of what a worker raised in one line, or Ray's last line on how its process ended."""
    from ray.exceptions import ActorUnavailableError

    if is_raised(error) and (cause := getattr(error, "cause", None)) is not None:
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:500]
    if isinstance(error, ActorUnavailableError):  # Ray does not know yet why
        return "its process ended"
    return f"its process ended: {(str(error).strip().splitlines() or [''])[-1].strip()[:300]}"
