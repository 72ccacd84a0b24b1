"""Kills the processes of a training at the moments that a plan names, and keeps account of what it hit.

Moments are made certain, not waited for: the proxy holds the request that marks one (the record of a step, a part of a
checkpoint, its commit), the victim is killed while it is held, and what is held never reaches the storage.
"""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import psutil

from orchestrator import storage
from orchestrator.training.config import AdmConfig
from tests.chaos.audit import Recorded, recorded
from tests.chaos.proxy import Proxy, Request, Rule

PATIENCE_SECONDS = 180.0  # for a moment to come

Phase = Literal["mid-step", "mid-upload", "between upload and commit", "first step after a resume", "stop"]
Victim = Literal["any worker", "the driver"]


class Kill(NamedTuple):
    """What to kill, and when. `position` in images: of the step, or of the checkpoint that is being written."""

    phase: Phase
    position: int
    victim: Victim = "any worker"


@dataclass
class Account:
    """What was really hit."""

    kills: Counter[str] = field(default_factory=Counter)  # by phase and victim
    stops: int = 0

    @property
    def by_phase(self) -> dict[str, int]:
        counts = Counter[str]()
        for kind, number in self.kills.items():
            counts[kind.split(" of ")[0]] += number
        return dict(counts)


def random_plan(config: AdmConfig, count: int, seed: int, drivers: bool) -> list[Kill]:
    """So many kills in random phases at rising positions, from after the first checkpoint to the end of the training.

    Where `drivers`, some hit the driver. At most one for each checkpoint, so that the training gets on.
    """
    rng = random.Random(seed)
    marks = list(range(2 * config.checkpoint_every, config.length, config.checkpoint_every))
    if count > len(marks):
        raise ValueError(f"{count} kills do not fit a training of {len(marks)} checkpoints")
    kills: list[Kill] = []
    phases: list[Phase] = ["mid-step", "mid-upload", "between upload and commit", "first step after a resume"]
    for mark in sorted(rng.sample(marks, count)):
        # All phases have their turn, in random order; there is a resume only after a kill.
        if not kills or not phases:
            phases = ["mid-step", "mid-upload", "between upload and commit", "first step after a resume"]
        phase = rng.choice(phases if kills else phases[:3])
        phases.remove(phase)
        later = rng.randrange(0, config.checkpoint_every, config.batch_size) if phase == "mid-step" else 0
        kills.append(Kill(phase, mark + later, "the driver" if drivers and rng.random() < 0.3 else "any worker"))
    return kills


class Killer(threading.Thread):
    """Carries a plan out, beside the training."""

    def __init__(
        self, proxy: Proxy, config: AdmConfig, plan: list[Kill], driver: Callable[[], int], seed: int = 0
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self._proxy, self._config, self._plan, self._driver = proxy, config, plan, driver
        self._rng = random.Random(seed)
        self._seen = len(proxy.requests)
        self._workers: dict[int, Recorded] = {}  # rank -> the newest process known
        self._ended: set[int] = set()  # processes of attempts that were hit
        self._training_over = threading.Event()
        self.account = Account()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Every kill of the plan, one after the other. The next moment is watched for before this one is let go."""
        try:
            rule = self._watch_for(self._plan[0])
            for number, kill in enumerate(self._plan, 1):
                request = self._await(kill, rule)
                self._learn_processes()
                if kill.phase == "first step after a resume":
                    assert (who := recorded(request.target)) and who.position > 0, f"{kill}: nothing was resumed"
                else:
                    self._await_checkpoint_before(kill)
                self._ended |= {worker.process for worker in self._workers.values()}
                held, rule = rule, self._watch_for(self._plan[number]) if number < len(self._plan) else rule
                self._hit(kill)
                self._proxy.remove(held)
        except BaseException as error:  # noqa: BLE001 - raised by `check`, in the main thread
            self.error = error
            self._proxy.clear()

    def check(self) -> None:
        """The training is over: raise what went wrong; AssertionError where it ended before the plan did."""
        self._training_over.set()
        if self.is_alive():
            self.join()
        if self.error is not None:
            raise self.error
        done = sum(self.account.kills.values()) + self.account.stops
        assert done == len(self._plan), f"{done} of {len(self._plan)} kills were carried out"

    def _await(self, kill: Kill, rule: Rule) -> Request:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (request := rule.wait(0.2)) is None:
            if self._training_over.is_set():
                raise AssertionError(f"the training came to its end before {kill}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{kill} did not come to pass in {PATIENCE_SECONDS:g} s")
        return request

    def _watch_for(self, kill: Kill) -> Rule:
        checkpoint = rf"{re.escape(self._config.output)}/checkpoints/images-{kill.position:012d}"
        others = "".join(f"(?!{process}-)" for process in sorted(self._ended))
        target = {
            "mid-step": rf"/{kill.position:012d}-.*-process-{others}\d+",
            "stop": rf"/{kill.position:012d}-.*-process-{others}\d+",
            "first step after a resume": rf"/\d{{12}}-\d+-of-\d+-process-{others}\d+",
            "mid-upload": rf"{checkpoint}/state-.*partNumber",
            "between upload and commit": rf"{checkpoint}/commit-",
        }[kill.phase]
        return self._proxy.add("hold", "PUT", target, times=1)

    def _learn_processes(self) -> None:
        """Find out who takes part in the attempt of now, from the first records of all its workers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        self._workers = {rank: who for rank, who in self._workers.items() if who.process not in self._ended}
        while True:
            requests = self._proxy.requests
            for request in requests[self._seen :]:
                who = recorded(request.target) if f"{self._config.audit_dir}/" in request.target else None
                if who is not None and who.process not in self._ended:
                    self._workers[who.rank] = who
                self._seen += 1
            if self._workers and len(self._workers) == next(iter(self._workers.values())).world_size:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"of this attempt only these workers took a step: {self._workers}")
            time.sleep(0.02)

    def _await_checkpoint_before(self, kill: Kill) -> None:
        """Wait for a commit, so that there is something to resume from."""
        every = self._config.checkpoint_every
        wanted = (kill.position - 1) // every * every
        folder = storage.join(self._config.path(self._config.output), "checkpoints", f"images-{wanted:012d}")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(name.startswith("commit-") for name in storage.list_names(folder)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no checkpoint was committed in {folder}")
            time.sleep(0.05)

    def _hit(self, kill: Kill) -> None:
        if kill.phase == "stop":
            os.kill(self._driver(), signal.SIGTERM)
            time.sleep(2)  # for the wish to reach the workers, of which none can end the step meanwhile
            self.account.stops += 1
            return
        rank = self._rng.choice(sorted(self._workers))
        process = self._driver() if kill.victim == "the driver" else self._workers[rank].process
        if kill.victim == "the driver":  # its workers live on for seconds, and would train on; they may write on
            for worker in self._workers.values():
                self._proxy.add("stall", "PUT", f"-process-{worker.process}-")
        victim = psutil.Process(process)
        assert victim.status() != psutil.STATUS_ZOMBIE, f"{kill}: process {process} was dead before"
        victim.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            while victim.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        self.account.kills[f"{kill.phase} of {kill.victim}"] += 1
