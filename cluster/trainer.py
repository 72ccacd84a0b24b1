"""Ray Train: the same loop on every worker of a process group, or in this process."""

import contextlib
import logging
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

from cluster.capacity import Resources, refuse_infeasible, wait_for_room, worker_resources
from cluster.metrics import publish

PROCESS_GROUP_TIMEOUT_S = 300  # a hung collective ends the attempt after this
POLL_SECONDS = 0.5
PREEMPTION_SECONDS = 2.0  # between two looks for a notice that a node goes away; Ray itself looks every 5

# A worker's error of these kinds would come again: no other attempt is made.
PERMANENT_ERRORS = (
    ValueError, TypeError, ArithmeticError, LookupError, FileNotFoundError, PermissionError, torch.OutOfMemoryError,
)  # fmt: skip

Record = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerContext:
    """All that a training loop knows of distribution."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[Record], None]  # hands numbers and pictures to the driver; never waits
    stopping: Callable[[], bool]  # whether the driver wants to stop; never waits
    streams_on_cluster: bool  # decode in the cluster's data tasks, or in this process
    preempted: Callable[[], bool] = lambda: False  # whether notice came that a node goes away, said once; never waits


def run_workers(
    loop: Callable[[WorkerContext], None],
    num_workers: int,
    on_record: Callable[[Record], None],
    cpus: int = 1,
    max_failures: int = 3,
    num_gpus: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run `loop` on `num_workers` workers (0: in this process) until it returns; True if it was asked to stop.

    Each worker has `cpus` CPUs and `num_gpus` GPUs, 0 or 1. All start together. While the cluster has no room for all
    of them, the log says what is waited for.

    A worker that dies takes its group with it; the group starts again, and `loop` finds its own place to go on from.
    It gives up after more than `max_failures` attempts in a row that reported no record with a larger "saved" number,
    and at once where another attempt would fail alike (PERMANENT_ERRORS). A node that announces its end does not count.
    SIGTERM, Ctrl-C, and `stop` once it returns True, ask all workers to stop at their next step. If `on_record` raises
    for a record, a warning says so, and the records after it are passed on.

    Raises:
        ValueError: the cluster can never hold all workers at once.
        RuntimeError: the loop failed; the message is the worker's own error.
    """
    signalled = threading.Event()

    def is_asked_to_stop() -> bool:
        return signalled.is_set() or stop()

    with _stop_signals(signalled.set):
        if num_workers == 0:
            _run_here(loop, _tolerant(on_record), is_asked_to_stop)
        else:
            resources = worker_resources(cpus, num_gpus)
            refuse_infeasible(resources, at_once=num_workers)
            _run_on_ray(loop, num_workers, _tolerant(on_record), max_failures, resources, is_asked_to_stop)
    return is_asked_to_stop()


def _run_here(
    loop: Callable[[WorkerContext], None], on_record: Callable[[Record], None], stop: Callable[[], bool]
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loop(WorkerContext(0, 1, device, on_record, stop, streams_on_cluster=False))
    except ArithmeticError as error:
        raise RuntimeError(str(error)) from error


def _run_on_ray(
    loop: Callable[[WorkerContext], None],
    num_workers: int,
    on_record: Callable[[Record], None],
    max_failures: int,
    resources: Resources,
    stop: Callable[[], bool],
) -> None:
    from ray.train import TrainingFailedError

    from cluster.relay import Relay

    relay = Relay()
    saved, failures = -1, 0
    while not stop():
        news = _News()
        try:
            with _relayed(relay, news.around(on_record), stop):
                _attempt(loop, relay, num_workers, resources)
            break
        except TrainingFailedError as error:
            if _has_no_room(error):
                wait_for_room(num_workers, resources, stop)
                continue
            reason = news.reason or _first_reason(error)
            failures = 1 if news.saved > saved else failures + 1
            saved = max(saved, news.saved)
            publish("train", {"failed_attempts": failures})
            if news.permanent or failures > max_failures:
                raise RuntimeError(f"training failed: {reason}") from error
            log.warning("an attempt failed, going on from the last checkpoint: %s", reason)


def _attempt(loop: Callable[[WorkerContext], None], relay: Any, num_workers: int, resources: Resources) -> None:
    """One run of Ray Train, in a thread of its own: in the main one it would take Ctrl-C, and save nothing."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory(prefix="admiral-train-") as folder:
        trainer = TorchTrainer(
            _enter,
            train_loop_config={"loop": loop, "relay": relay},
            torch_config=TorchConfig(timeout_s=PROCESS_GROUP_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
            ),
            # Ray Train keeps no state of ours, so each call is a run of its own name in a folder of its own. It does
            # not wait for room itself: it would do so silently, and a signal could not end it.
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )
        ended: Future[None] = Future()

        def fit() -> None:
            try:
                trainer.fit()
                ended.set_result(None)
            except BaseException as error:  # noqa: BLE001 - raised again below
                ended.set_exception(error)

        threading.Thread(target=fit, name="training", daemon=True).start()
        ended.result()


def _tolerant(on_record: Callable[[Record], None]) -> Callable[[Record], None]:
    """Return `on_record` with a warning in place of an error."""

    def call(record: Record) -> None:
        try:
            on_record(record)
        except Exception as error:  # noqa: BLE001 - one record must not cost those after it, nor the training
            reason = f"{type(error).__name__}: {error}"
            log.warning("a record of the training could not be handled, the training goes on: %s", reason)

    return call


class _News:
    """What the records of one attempt tell of its progress and its end."""

    def __init__(self) -> None:
        self.saved = -1
        self.reason = ""
        self.permanent = False

    def around(self, on_record: Callable[[Record], None]) -> Callable[[Record], None]:
        """`on_record`, listening."""

        def heard(record: Record) -> None:
            self.saved = max(self.saved, record.get("saved", -1))
            if "warning" in record:
                log.warning(record["warning"])
                return
            if "failure" in record and not self.permanent:
                self.reason, self.permanent = record["failure"], record["permanent"]
            on_record(record)

        return heard


def _has_no_room(error: Exception) -> bool:
    """Whether no worker was started because the cluster had no room for all of them."""
    return type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError"


def _first_reason(error: Exception) -> str:
    """What Ray says of the workers' ends, in one line."""
    failures = getattr(error, "worker_failures", {0: error})
    return "; ".join(f"worker {rank}: {str(reason).strip().splitlines()[-1]}" for rank, reason in failures.items())


def _enter(config: dict[str, Any]) -> None:
    """The first lines in a worker: find out who it is, then run the loop."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    relay = config["relay"]
    for package in ("cluster", "orchestrator"):
        logging.getLogger(package).addHandler(_ToDriver(relay))
    try:
        config["loop"](
            WorkerContext(
                context.get_world_rank(),
                context.get_world_size(),
                ray.train.torch.get_device(),
                relay.push,
                relay.stopping,
                streams_on_cluster=True,
                preempted=_PreemptionNotice(ray.train.get_preemption_info, context.get_world_rank()),
            )
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        relay.push({"failure": reason, "permanent": isinstance(error, PERMANENT_ERRORS)})
        raise


class _ToDriver(logging.Handler):
    """Hands warnings to the driver, where somebody sees them."""

    def __init__(self, relay: Any) -> None:
        super().__init__(logging.WARNING)
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._relay.push({"warning": record.getMessage()})
        except Exception:  # noqa: BLE001 - as logging's own handlers do: a message must not end what it reports on
            self.handleError(record)


class _PreemptionNotice:
    """Asks `get_info`, which waits for all workers, in a thread; tells every new answer once, and logs it at rank 0."""

    def __init__(self, get_info: Callable[[], Any], rank: int) -> None:
        self._get_info, self._rank, self._new = get_info, rank, threading.Event()
        threading.Thread(target=self._watch, name="preemption", daemon=True).start()

    def _watch(self) -> None:
        seen, failed = None, False
        while True:
            try:
                info = self._get_info()
            except Exception as error:  # noqa: BLE001 - one failed call must not cost a later notice
                if not failed:
                    log.warning("notices of preemption cannot be read, trying again; the training goes on: %s", error)
                info, failed = seen, True
            if info != seen:
                seen = info
                if self._rank == 0:
                    log.warning("notice came that a node goes away: %s", info)
                self._new.set()
            time.sleep(PREEMPTION_SECONDS)

    def __call__(self) -> bool:
        said = self._new.is_set()
        self._new.clear()
        return said


@contextlib.contextmanager
def _relayed(relay: Any, on_record: Callable[[Record], None], stop: Callable[[], bool]) -> Iterator[None]:
    """While inside, a thread passes workers' records to `on_record`, and asks them to stop once `stop` returns True.

    A call to the relay that fails is warned of once and made again; at the end come the records that are left.
    """
    over, warned = threading.Event(), set[str]()

    def exchange() -> None:
        try:
            if stop():
                relay.stop()
            records = relay.pull()
        except Exception as error:  # noqa: BLE001 - see above
            if str(error) not in warned:
                log.warning("the workers' records cannot be fetched, trying again; the training goes on: %s", error)
                warned.add(str(error))
            return
        for record in records:
            on_record(record)

    def pump() -> None:
        while not over.wait(POLL_SECONDS):
            exchange()

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        exchange()


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, the first SIGTERM or Ctrl-C calls `stop`, and the next does what it did before.

    Elsewhere than in the main thread signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def first(*_: object) -> None:
        restore()
        stop()

    for number in previous:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()
