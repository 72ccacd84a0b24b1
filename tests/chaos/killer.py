"""Kill the processes of a training at planned moments.

The proxy makes each moment reproducible. It holds the request that marks the moment (the audit log of a step, a part of
a checkpoint, or its commit). Then the victim is killed, so that the held request never reaches the storage.
"""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import psutil

from orchestrator import storage
from orchestrator.training.config import AdmConfig
from tests.chaos.audit import AuditName, parse_audit_name
from tests.chaos.proxy import Proxy, Request, Rule

TIMEOUT_SECONDS = 180.0  # for a planned moment

Phase = Literal["mid-step", "mid-upload", "between upload and commit", "first step after a resume", "stop"]
Victim = Literal["any worker", "the driver"]


class Kill(NamedTuple):
    """A process to kill and the moment. `position` is that of the step or of the checkpoint, in images."""

    phase: Phase
    position: int
    victim: Victim = "any worker"


def random_plan(config: AdmConfig, count: int, seed: int, drivers: bool) -> list[Kill]:
    """Return `count` kills in random phases at increasing positions, all after the first checkpoint.

    If `drivers`, some kills are of the driver. There is at most one kill for each checkpoint, so that the training
    makes progress.
    """
    rng = random.Random(seed)
    marks = list(range(2 * config.checkpoint_every, config.length, config.checkpoint_every))
    if count > len(marks):
        raise ValueError(f"{count} kills do not fit into a training of {len(marks)} checkpoints")
    kills: list[Kill] = []
    phases: list[Phase] = []
    for mark in sorted(rng.sample(marks, count)):
        # Use all phases in random order before one is repeated. The first kill has no resume before it.
        if not phases:
            phases = ["mid-step", "mid-upload", "between upload and commit", "first step after a resume"]
        phase = rng.choice(phases if kills else phases[:3])
        phases.remove(phase)
        offset = rng.randrange(0, config.checkpoint_every, config.batch_size) if phase == "mid-step" else 0
        kills.append(Kill(phase, mark + offset, "the driver" if drivers and rng.random() < 0.3 else "any worker"))
    return kills


class Killer(threading.Thread):
    """A thread that carries out a plan during the training."""

    def __init__(self, proxy: Proxy, config: AdmConfig, plan: list[Kill], driver: Callable[[], int], seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self._proxy, self._config, self._plan, self._driver = proxy, config, plan, driver
        self._rng = random.Random(seed)
        self._seen = len(proxy.requests)
        self._workers: dict[int, AuditName] = {}  # rank -> its newest process
        self._ended: set[int] = set()  # processes of attempts that were killed
        self._training_over = threading.Event()
        self._done = 0  # kills of the plan that were carried out
        self._error: BaseException | None = None

    def run(self) -> None:
        """Carry out the kills in order; add the rule for the next moment before the held request is released."""
        try:
            rule = self._watch_for(self._plan[0])
            for number, kill in enumerate(self._plan, 1):
                request = self._await(kill, rule)
                self._learn_processes()
                if kill.phase == "first step after a resume":
                    log = parse_audit_name(request.target)
                    assert log is not None and log.position > 0, f"{kill}: the training did not resume"
                else:
                    self._await_checkpoint_before(kill)
                self._ended |= {worker.process for worker in self._workers.values()}
                held_rule = rule
                if number < len(self._plan):
                    rule = self._watch_for(self._plan[number])
                self._kill(kill)
                self._done = number
                self._proxy.remove(held_rule)
        except BaseException as error:  # noqa: BLE001 - raised by `check`, in the main thread
            self._error = error
            self._proxy.clear()

    def check(self) -> None:
        """Raise the error of the thread, or AssertionError if the training ended before all kills were carried out."""
        self._training_over.set()
        if self.is_alive():
            self.join()
        if self._error is not None:
            raise self._error
        assert self._done == len(self._plan), f"{self._done} of {len(self._plan)} kills were carried out"

    def _await(self, kill: Kill, rule: Rule) -> Request:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (request := rule.wait(0.2)) is None:
            if self._training_over.is_set():
                raise AssertionError(f"the training ended before {kill}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the moment of {kill} did not come within {TIMEOUT_SECONDS:g} s")
        return request

    def _watch_for(self, kill: Kill) -> Rule:
        checkpoint = rf"{re.escape(self._config.output)}/checkpoints/images-{kill.position:012d}"
        not_ended = "".join(f"(?!{process}-)" for process in sorted(self._ended))
        target = {
            "mid-step": rf"/{kill.position:012d}-.*-process-{not_ended}\d+",
            "stop": rf"/{kill.position:012d}-.*-process-{not_ended}\d+",
            "first step after a resume": rf"/\d{{12}}-\d+-of-\d+-process-{not_ended}\d+",
            "mid-upload": rf"{checkpoint}/state-.*partNumber",
            "between upload and commit": rf"{checkpoint}/commit-",
        }[kill.phase]
        return self._proxy.add("hold", "PUT", target, times=1)

    def _learn_processes(self) -> None:
        """Find the processes of the current attempt from the first audit logs of all its workers."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        self._workers = {rank: log for rank, log in self._workers.items() if log.process not in self._ended}
        while True:
            requests = self._proxy.requests
            for request in requests[self._seen :]:
                log = parse_audit_name(request.target) if f"{self._config.audit_dir}/" in request.target else None
                if log is not None and log.process not in self._ended:
                    self._workers[log.rank] = log
                self._seen += 1
            if self._workers and len(self._workers) == next(iter(self._workers.values())).world_size:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"only these workers of the attempt took a step: {self._workers}")
            time.sleep(0.02)

    def _await_checkpoint_before(self, kill: Kill) -> None:
        """Wait until the checkpoint before a kill is committed, so that the training can resume from it."""
        every = self._config.checkpoint_every
        position = (kill.position - 1) // every * every
        folder = storage.join(self._config.path(self._config.output), "checkpoints", f"images-{position:012d}")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not any(name.startswith("commit-") for name in storage.list_names(folder)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no checkpoint was committed in {folder}")
            time.sleep(0.05)

    def _kill(self, kill: Kill) -> None:
        if kill.phase == "stop":
            os.kill(self._driver(), signal.SIGTERM)
            time.sleep(2)  # the stop flag reaches the workers, none of which can end the step before
            return
        rank = self._rng.choice(sorted(self._workers))
        process = self._driver() if kill.victim == "the driver" else self._workers[rank].process
        if kill.victim == "the driver":  # its workers continue for some seconds, and must not write audit logs
            for worker in self._workers.values():
                self._proxy.add("stall", "PUT", f"-process-{worker.process}-")
        victim = psutil.Process(process)
        assert victim.status() != psutil.STATUS_ZOMBIE, f"{kill}: process {process} was already dead"
        victim.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            while victim.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)


@contextlib.contextmanager
def killing(
    proxy: Proxy, config: AdmConfig, plan: list[Kill], driver: Callable[[], int] = os.getpid, seed: int = 0
) -> Iterator[None]:
    """Carry out a plan while the context trains; AssertionError if the training ends before all kills."""
    killer = Killer(proxy, config, plan, driver, seed)
    killer.start()
    try:
        yield
    finally:
        killer.check()
