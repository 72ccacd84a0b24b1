"""Ray Train: the same loop on every worker of a process group, or in this process."""

import contextlib
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

PROCESS_GROUP_TIMEOUT_S = 300  # a hung collective ends the attempt after this
POLL_SECONDS = 0.5

Record = dict[str, Any]


@dataclass(frozen=True)
class WorkerContext:
    """All that a training loop knows of distribution."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[Record], None]  # hands numbers and pictures to the driver; never waits
    stopping: Callable[[], bool]  # whether the driver wants to stop; never waits
    streams_on_cluster: bool  # decode in the cluster's data tasks, or in this process


def run_workers(
    loop: Callable[[WorkerContext], None],
    num_workers: int,
    on_record: Callable[[Record], None],
    max_failures: int = 3,
    use_gpu: bool = False,
) -> bool:
    """Run `loop` on `num_workers` workers (0: in this process) until it returns; True if it was asked to stop.

    A worker that dies takes its group with it; the group starts again, at most `max_failures` times, and `loop`
    finds its own place to go on from. SIGTERM and Ctrl-C ask all workers to stop at their next step.

    Raises:
        RuntimeError: the loop failed; the message is the worker's own error.
    """
    if num_workers == 0:
        return _run_here(loop, on_record)
    return _run_on_ray(loop, num_workers, on_record, max_failures, use_gpu)


def _run_here(loop: Callable[[WorkerContext], None], on_record: Callable[[Record], None]) -> bool:
    wanted = threading.Event()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _stop_signals(wanted.set):
        loop(WorkerContext(0, 1, device, on_record, wanted.is_set, streams_on_cluster=False))
    return wanted.is_set()


def _run_on_ray(
    loop: Callable[[WorkerContext], None],
    num_workers: int,
    on_record: Callable[[Record], None],
    max_failures: int,
    use_gpu: bool,
) -> bool:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.relay import Relay

    relay, wanted = Relay(), threading.Event()

    def stop() -> None:
        wanted.set()
        threading.Thread(target=relay.stop, daemon=True).start()  # a signal handler must not wait on Ray

    with tempfile.TemporaryDirectory(prefix="admiral-train-") as folder:
        trainer = TorchTrainer(
            _enter,
            train_loop_config={"loop": loop, "relay": relay},
            torch_config=TorchConfig(timeout_s=PROCESS_GROUP_TIMEOUT_S),
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            # Ray Train keeps no state of ours, so each call is a run of its own name in a folder of its own.
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        )
        with _stop_signals(stop), _relayed(relay, on_record):
            try:
                trainer.fit()
            except WorkerGroupError as error:
                reasons = {str(reason).strip().splitlines()[-1] for reason in error.worker_failures.values()}
                raise RuntimeError(f"training failed: {'; '.join(sorted(reasons))}") from error
    return wanted.is_set()


def _enter(config: dict[str, Any]) -> None:
    """The first lines in a worker: find out who it is, then run the loop."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    relay = config["relay"]
    config["loop"](
        WorkerContext(
            context.get_world_rank(),
            context.get_world_size(),
            ray.train.torch.get_device(),
            relay.push,
            relay.stopping,
            streams_on_cluster=True,
        )
    )


@contextlib.contextmanager
def _relayed(relay: Any, on_record: Callable[[Record], None]) -> Iterator[None]:
    """While inside, a thread passes what the workers report to `on_record`; at the end, the rest."""
    over = threading.Event()

    def pump() -> None:
        while not over.wait(POLL_SECONDS):
            for record in relay.pull():
                on_record(record)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for record in relay.pull():
            on_record(record)


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, the first SIGTERM or Ctrl-C calls `stop`, and the next does what it did before.

    Elsewhere than in the main thread signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def put_back() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def first(*_: object) -> None:
        put_back()
        stop()

    for number in previous:
        signal.signal(number, first)
    try:
        yield
    finally:
        put_back()
