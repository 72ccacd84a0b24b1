"""Tracking of a job, from the driver only: numbers go to `metrics.jsonl` in its folder, and threads fill MLflow.

MLflow never holds the work up. How many records its server has is written in a tag of the run, so that the next start
of the job sends the rest, however long the server was away and whatever ended the job.
"""

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pydantic import BaseModel

from cluster.metrics import publish
from orchestrator import metrics_log, storage
from orchestrator.config import JobConfig, tracking_uri
from orchestrator.metrics_log import MetricsLog, Position, Record, read_records
from orchestrator.mlflow_run import MlflowRun, is_refused, reason, refusal
from orchestrator.redaction import redact, redact_patterns

QUEUE_CAPACITY = 2_000  # artefacts that wait in memory while the server is away; new ones beyond it are dropped
RETRY_SECONDS = 5.0  # between two tries while the server is away
POLL_SECONDS = 1.0  # between two looks for new numbers
FIRST_ANSWER_SECONDS = 20.0  # how long a job waits, before its first step, to learn whether it is refused
PATIENCE_SECONDS = 60.0  # how long the end of a job waits for a server that takes nothing
WARNINGS = 5  # about what is refused; the last line counts all
SENT = "tracking.json"  # in the job's folder: MLflow has all of its numbers

Send = Callable[[], object]  # record something; it may be called again after a failure

log = logging.getLogger(__name__)


class Tracker:
    """The handle of a job on its metrics and its MLflow run. Only `check`, `flush` and `finish` wait.

    One thread sends the numbers, another the artefacts, so that neither waits for the other's store. Without a `uri`
    nothing is sent, and only `metrics.jsonl` is written.
    """

    def __init__(
        self, job: str, output: str, uri: str | None, config: BaseModel | None = None, parent: str = ""
    ) -> None:
        self._job, self._output, self._uri, self._config = job, output, uri or "", config
        self._log = MetricsLog(output)
        self._mlflow = MlflowRun(self._uri, job, output, parent)
        self._artifacts: queue.SimpleQueue[Send | None] = queue.SimpleQueue()
        self._put_artifacts = self._settled_artifacts = 0  # each counted by one thread only
        self._known_children: set[tuple[str, int]] | None = None  # (name, step) that metrics.jsonl has
        self._answered, self._finishing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._refusal: Exception | None = None
        self._status = "FINISHED"
        self._sent = self._refused = self._dropped = 0  # records of numbers; records and artefacts; artefacts
        self._last_taken = time.monotonic()
        self._threads = [threading.Thread(target=self._send_numbers, name="numbers", daemon=True)] if uri else []
        for thread in self._threads:
            thread.start()
        if config is not None:
            self.record("config.json", config.model_dump(mode="json"))

    @property
    def unsent(self) -> int:
        """Records of numbers that MLflow does not have yet."""
        return self._log.count - self._sent

    def check(self) -> None:
        """Wait for the server's first answer.

        Raises:
            ValueError: it would refuse this job for ever; the message says what to do.
        """
        if self._uri:
            self._answered.wait(FIRST_ANSWER_SECONDS)
            self._answered.set()
        if self._refusal is not None:
            self._log.close()
            raise ValueError(refusal(self._mlflow.where, self._refusal)) from self._refusal

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Record numbers at `step` (images for training, samples for generation)."""
        self._log.append(Record(_now(), step, {name: float(value) for name, value in values.items()}))
        publish(self._job, values)

    def flush(self) -> None:
        """Write the numbers so far into the job's folder, where a page reads them."""
        self._log.flush()

    def picture(self, name: str, png: bytes) -> None:
        """Record a picture under `name`, which ends in .png."""
        self._put(partial(self._mlflow.log_picture, name, png))

    def record(self, name: str, content: dict[str, Any] | str) -> None:
        """Record a JSON document, or a text such as a page."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        self._put(partial(self._mlflow.log_text, name, text))

    def child(
        self, name: str, parameters: dict[str, Any], history: dict[int, dict[str, float]], picture: bytes | None = None
    ) -> None:
        """Record a child run, such as one trial of a search; it is known by its name.

        history: numbers by step. What an earlier attempt recorded of them is not recorded twice.
        """
        if self._known_children is None:
            self._known_children = {(record.child, record.step) for record in read_records(self._output)}
        for step, values in history.items():
            if (name, step) not in self._known_children:
                self._known_children.add((name, step))
                self._log.append(Record(_now(), step, {key: float(value) for key, value in values.items()}, name))
        self._put(partial(self._mlflow.log_child, name, parameters, picture))

    def finish(self, status: str) -> None:
        """Hand everything over and end the run as FINISHED, KILLED or FAILED.

        Waits for as long as the server goes on taking records, and PATIENCE_SECONDS more.
        """
        self._log.close()
        self._artifacts.put(None)
        self._status, self._last_taken = status, time.monotonic()
        self._finishing.set()
        while any(thread.is_alive() for thread in self._threads):
            if time.monotonic() - self._last_taken > PATIENCE_SECONDS:
                break
            time.sleep(0.02)
        self._abandoned.set()
        if self._uri:
            self._conclude()
        sent = storage.join(self._output, SENT)
        if self.unsent:
            storage.delete(sent)
        elif self._log.count and status == "FINISHED" and not self._refused:
            storage.write_json(sent, {"mlflow": redact_patterns(self._uri), "run": self._mlflow.id})

    def _conclude(self) -> None:
        """Say where the run is, and what MLflow does not have in the end."""
        if self._mlflow.id and self._mlflow.page:
            print(f"View run: {self._mlflow.page}")
        elif self._mlflow.id:
            print(f"View run: mlflow ui --backend-store-uri {redact(self._uri)}")
        if self.unsent:
            place = storage.join(self._output, metrics_log.NAME)
            words = "%d records are in %s and not in %s; the same command sends them once it answers"
            log.warning(words, self.unsent, place, self._mlflow.where)
        if lost := self._put_artifacts - self._settled_artifacts + self._dropped:
            log.warning("%d artefacts are not in %s", lost, self._mlflow.where)
        if self._refused:
            log.warning("%d records were refused and are not in %s", self._refused, self._mlflow.where)

    # ------------------------------------------------------------------------------------------ in the threads

    def _send_numbers(self) -> None:
        """Open the run, send the records of metrics.jsonl as they come, and at the end set the run's status."""
        if not self._open():
            return
        publishing = threading.Thread(target=self._send_artifacts, name="artefacts", daemon=True)
        publishing.start()
        self._threads.append(publishing)
        position, first = Position(), None
        while not self._abandoned.is_set():
            last_look = self._finishing.is_set()
            records, behind = self._read(position)
            if first is None and records:
                first = records[0]
                self._recall(first)
            if first is not None and records:
                self._send(records[max(self._sent - position.number, 0) :])
                self._mark(first, behind.number)
                position = behind
            elif last_look:
                self._until_taken(partial(self._mlflow.end, self._status), self._mlflow.where)
                return
            else:
                self._finishing.wait(POLL_SECONDS)

    def _open(self) -> bool:
        """Open the run; return False if the first answer is that this job is refused for ever."""
        opening = partial(self._mlflow.open, self._config)
        while (error := self._until_taken(opening, self._mlflow.where, opening=True)) is not None:
            if not self._answered.is_set():
                self._refusal = error
                self._answered.set()
                return False
            log.warning("%s. The job continues, and its numbers are kept", refusal(self._mlflow.where, error))
            self._abandoned.wait(10 * RETRY_SECONDS)
        self._answered.set()
        return bool(self._mlflow.id)

    def _read(self, position: Position) -> tuple[list[Record], Position]:
        """Return the records behind `position`, none if there are none yet, and the position behind them."""
        found: list[tuple[list[Record], Position]] = []
        self._until_taken(lambda: found.append(self._log.read(position)), self._output)
        return found[0] if found else ([], position)

    def _recall(self, first: Record) -> None:
        """Ask MLflow how many records it has of the file that begins with this one."""

        def ask() -> None:
            self._sent = min(self._mlflow.records_sent(first), self._log.count)

        self._until_taken(ask, self._mlflow.where)

    def _mark(self, first: Record, count: int) -> None:
        if not self._abandoned.is_set() and count > self._sent:
            self._until_taken(partial(self._mlflow.mark_sent, first, count), self._mlflow.where)
            self._sent = count

    def _send(self, records: list[Record]) -> None:
        """Send records; leave those out that are refused, and only those."""
        error = self._until_taken(partial(self._mlflow.log_numbers, records), self._mlflow.where) if records else None
        if error is not None and len(records) > 1:
            middle = len(records) // 2
            self._send(records[:middle])
            self._send(records[middle:])
        elif error is not None:
            self._refuse(f"the numbers of step {records[0].step}", error)

    def _send_artifacts(self) -> None:
        """Send the oldest artefact until it is taken or refused, then the next, until the job has finished."""
        while (send := self._artifacts.get()) is not None:
            error = self._until_taken(send, f"the artefact store of {self._mlflow.where}")
            if self._abandoned.is_set():
                return
            self._settled_artifacts += 1
            if error is not None:
                self._refuse("an artefact", error)

    def _put(self, send: Send) -> None:
        if not self._uri:
            return
        if self._put_artifacts - self._settled_artifacts >= QUEUE_CAPACITY:
            self._dropped += 1
            return
        self._put_artifacts += 1
        self._artifacts.put(send)

    def _until_taken(self, send: Callable[[], object], what: str, opening: bool = False) -> Exception | None:
        """Call `send` until it succeeds or the job gives up; return the error if it can never succeed."""
        away = False
        while not self._abandoned.is_set():
            try:
                send()
            except Exception as error:  # noqa: BLE001 - whatever tracking does, the work goes on
                if is_refused(error, opening):
                    return error
                if not away:
                    words = "%s is unreachable; retrying in the background, the job continues: %s"
                    log.warning(words, what, reason(error))
                away = True
                self._answered.set()
                self._abandoned.wait(RETRY_SECONDS)
            else:
                self._last_taken = time.monotonic()
                return None
        return None

    def _refuse(self, what: str, error: Exception) -> None:
        self._refused += 1
        if self._refused <= WARNINGS:
            words = "%s refuses %s, which is left out there; the job continues: %s"
            log.warning(words, self._mlflow.where, what, reason(error))


@contextlib.contextmanager
def tracked(job: str, config: JobConfig, output: str, parent: str = "") -> Iterator[Tracker]:
    """The job's tracker: one MLflow run for each output folder, however often the job is started again.

    parent: what this run continues, for a tag of the MLflow run.

    Raises:
        ValueError: MLflow would refuse this job for ever; the message says what to do.
    """
    tracker = Tracker(job, output, tracking_uri(config) if config.tracking else None, config, parent)
    tracker.check()
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    tracker.finish("FINISHED")


def catch_up(job: str, config: JobConfig, output: str) -> None:
    """Send to MLflow what the finished job of this folder could not. Raises what `tracked` does."""
    sent, numbers = storage.join(output, SENT), storage.join(output, metrics_log.NAME)
    if config.tracking and not storage.exists(sent) and storage.exists(numbers):
        with tracked(job, config, output):
            pass


def _now() -> int:
    return int(time.time() * 1000)
