"""Run a training loop on every worker of a process group by Ray Train, or in this process."""

import contextlib
import logging
import logging.handlers
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from cluster.actor import summarize_loss
from cluster.capacity import Resources, refuse_infeasible, wait_for_room, worker_resources
from cluster.collectives import TIMEOUT
from cluster.metrics import publish
from cluster.relay import Record, Relay, relay_records, warn_on_error

PREEMPTION_SECONDS = 2.0  # between two checks for a preemption notice; Ray itself checks every 5 s

# Deterministic errors of a worker, which are not retried because another attempt would raise them again.
PERMANENT_ERRORS = (
    ValueError, TypeError, ArithmeticError, LookupError, FileNotFoundError, PermissionError, torch.OutOfMemoryError,
)  # fmt: skip

Loop = Callable[["WorkerContext"], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerContext:
    """Everything that a training loop knows about distribution."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[Record], None]  # sends numbers and pictures to the driver; never waits
    stopping: Callable[[], bool]  # returns whether the driver has asked to stop; never waits
    streams_on_cluster: bool  # whether data are read by Ray actors rather than in this process
    preempted: Callable[[], bool] = lambda: False  # returns True once for each preemption notice; never waits


def run_workers(
    loop: Loop,
    num_workers: int,
    on_record: Callable[[Record], None],
    num_cpus: int = 1,
    max_failures: int = 3,
    num_gpus: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run `loop` on `num_workers` workers (0: in this process) until it returns; return whether it was asked to stop.

    Each worker has `num_cpus` CPUs and `num_gpus` GPUs (0 or 1). All workers start together. While the cluster has no
    room for all of them, the log says what the job waits for.

    If a worker dies, the whole group starts again, and `loop` must find its last checkpoint. The training fails after
    more than `max_failures` consecutive attempts without progress, that is, without a record whose "saved" number is
    larger than before. PERMANENT_ERRORS are not retried. All workers are asked to stop at their next step by SIGTERM,
    by Ctrl-C, and when `stop` returns True. If `on_record` raises for a record, a warning is logged and the training
    continues.

    Raises:
        ValueError: the cluster can never hold all workers at once.
        RuntimeError: the loop failed; the message is the worker's own error.
    """
    signalled = threading.Event()

    def is_asked_to_stop() -> bool:
        return signalled.is_set() or stop()

    with _stop_signals(signalled.set):
        if num_workers == 0:
            device, report = torch.device("cuda" if num_gpus else "cpu"), warn_on_error(on_record)
            try:
                loop(WorkerContext(0, 1, device, report, is_asked_to_stop, streams_on_cluster=False))
            except ArithmeticError as error:
                raise RuntimeError(str(error)) from error
        else:
            resources = worker_resources(num_cpus, num_gpus)
            refuse_infeasible(resources, num_workers=num_workers)
            _run_on_ray(loop, num_workers, on_record, max_failures, resources, is_asked_to_stop)
    return is_asked_to_stop()


def _run_on_ray(
    loop: Loop,
    num_workers: int,
    on_record: Callable[[Record], None],
    max_failures: int,
    resources: Resources,
    stop: Callable[[], bool],
) -> None:
    from ray.train import TrainingFailedError

    relay = Relay()
    saved = -1  # the largest "saved" number of all attempts
    failures = 0  # consecutive attempts without progress
    while not stop() and wait_for_room(num_workers, resources, stop):
        attempt = _Attempt(on_record)
        try:
            with relay_records(relay, attempt.handle, stop):
                _fit(loop, relay, num_workers, resources)
            break
        except TrainingFailedError as error:
            if type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError":
                continue  # another job has taken the resources in the meantime
            reason = summarize_loss(attempt.reason) or _reason(error)
            failures = 1 if attempt.saved > saved else failures + 1
            saved = max(saved, attempt.saved)
            publish("train", {"failed_attempts": failures})
            if attempt.is_permanent or failures > max_failures:
                raise RuntimeError(f"training failed: {reason}") from error
            log.warning("an attempt failed, continuing from the last checkpoint: %s", reason)


class _Attempt:
    """The progress and the failure of one attempt, from the records of its workers."""

    def __init__(self, on_record: Callable[[Record], None]) -> None:
        self._on_record = on_record
        self.saved = -1  # the largest "saved" number
        self.reason = ""
        self.is_permanent = False

    def handle(self, record: Record) -> None:
        self.saved = max(self.saved, record.get("saved", -1))
        if "warning" in record:
            log.warning(record["warning"])
        elif "failure" not in record:
            self._on_record(record)
        elif not self.is_permanent:
            self.reason, self.is_permanent = record["failure"], record["permanent"]


def _fit(loop: Loop, relay: Relay, num_workers: int, resources: Resources) -> None:
    """Run Ray Train once, in a thread, because in the main thread it would handle Ctrl-C itself and save nothing."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="admiral-train-") as folder:
        trainer = TorchTrainer(
            _run_worker,
            train_loop_config={"loop": loop, "relay": relay},
            torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
            ),
            # Each attempt is a separate run of Ray Train, which keeps no state between them. Ray Train must not wait
            # for resources either, because it would wait silently, and a signal could not end the wait.
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )
        result: Future[Any] = Future()

        def fit() -> None:
            try:
                result.set_result(trainer.fit())
            except BaseException as error:  # noqa: BLE001 - raised again below
                result.set_exception(error)

        threading.Thread(target=fit, name="training", daemon=True).start()
        result.result()


def _reason(error: Exception) -> str:
    """Return one line with the last line of Ray's error about each failed worker."""
    failures = getattr(error, "worker_failures", {0: error})
    return "; ".join(
        f"worker {rank}: {summarize_loss(str(reason).strip().splitlines()[-1])}" for rank, reason in failures.items()
    )


def _run_worker(config: dict[str, Any]) -> None:
    """Run the loop in a worker of Ray Train, and report its warnings and its error to the driver."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    relay = config["relay"]
    for package in ("cluster", "orchestrator"):
        logging.getLogger(package).addHandler(_DriverHandler(relay))
    try:
        config["loop"](
            WorkerContext(
                context.get_world_rank(),
                context.get_world_size(),
                ray.train.torch.get_device(),
                relay.push,
                relay.stopping,
                streams_on_cluster=True,
                preempted=_preemption_notices(ray.train.get_preemption_info, context.get_world_rank()),
            )
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        relay.push({"failure": reason, "permanent": isinstance(error, PERMANENT_ERRORS)})
        raise


class _DriverHandler(logging.handlers.QueueHandler):
    """A log handler that sends warnings to the driver, because nobody reads the workers' logs."""

    queue: Any  # the relay

    def __init__(self, relay: Any) -> None:
        super().__init__(relay)
        self.setLevel(logging.WARNING)

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.push({"warning": record.getMessage()})


def _preemption_notices(get_info: Callable[[], Any], rank: int) -> Callable[[], bool]:
    """Return a function that returns True once for each new result of `get_info`.

    A thread calls `get_info`, because that call waits for all workers. Rank 0 logs the notice.
    """
    has_new = threading.Event()

    def watch() -> None:
        previous, is_warned = None, False
        while True:
            try:
                info = get_info()
            except Exception as error:  # noqa: BLE001 - a failed call must not lose a later notice
                if not is_warned:
                    log.warning("preemption notices cannot be read, trying again; the training continues: %s", error)
                info, is_warned = previous, True
            if info != previous:
                previous = info
                if rank == 0:
                    log.warning("preemption notice received, writing a checkpoint; the training continues: %s", info)
                has_new.set()
            time.sleep(PREEMPTION_SECONDS)

    def take_new() -> bool:
        was_set = has_new.is_set()
        has_new.clear()
        return was_set

    threading.Thread(target=watch, name="preemption", daemon=True).start()
    return take_new


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGTERM or Ctrl-C. The previous handlers receive the next one.

    Only the main thread can handle signals. In other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle_first(*_: object) -> None:
        restore()
        stop()

    for number in previous:
        signal.signal(number, handle_first)
    try:
        yield
    finally:
        restore()
