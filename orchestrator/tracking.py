"""Tracking of a job by its driver: metrics go to `metrics.jsonl` in its folder, and a thread sends them to MLflow.

A running job never waits for MLflow. A tag of the MLflow run has the number of records that the server has. So the next
start of the job sends the others, however long the server was unreachable and however the job ended.
"""

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from cluster.metrics import publish
from orchestrator import metrics_log, storage
from orchestrator.config import JobConfig, tracking_uri
from orchestrator.metrics_log import MetricsLog, Position, Record, read_records
from orchestrator.mlflow_run import MlflowRun, is_refused, reason, refusal
from orchestrator.redaction import redact_patterns

QUEUE_CAPACITY = 2_000  # artefacts in memory while the server is unreachable; more are dropped
RETRY_SECONDS = 5.0  # between two tries while the server is unreachable
POLL_SECONDS = 1.0  # between two reads of metrics.jsonl
REFUSALS_LOGGED = 5  # refused records that are logged; later ones are only counted
FIRST_RESPONSE_SECONDS = 20.0  # how long a job waits at its start to learn whether MLflow refuses it
PATIENCE_SECONDS = 60.0  # how long a job waits at its end for a server that accepts nothing
SENT = "tracking.json"  # file in the job's folder, which exists when MLflow has all records

Send = Callable[[], object]  # sends an artefact; may be called again after an error
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class _PermanentError(Exception):
    """MLflow refuses a request permanently. `error` is the error of the request."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Abandoned(Exception):
    """The job has ended and no longer waits for MLflow."""


class Tracker:
    """The record of a job's metrics and artefacts. Only `check`, `flush` and `finish` wait.

    One thread sends metrics and another one sends artefacts, because the artefact store may be another server. Without
    a `uri`, only `metrics.jsonl` is written.
    """

    def __init__(
        self, job: str, output: str, uri: str | None, config: BaseModel | None = None, parent: str = ""
    ) -> None:
        self._job, self._output, self._uri, self._config = job, output, uri or "", config
        self._log = MetricsLog(output)
        self._mlflow = MlflowRun(self._uri, job, output, parent)
        self._artifacts: queue.Queue[Send | None] = queue.Queue()
        self._recorded_children: set[tuple[str, int]] | None = None  # (name, step) in metrics.jsonl
        self._responded = threading.Event()  # the server has responded, or `check` has stopped waiting for it
        self._finishing = threading.Event()  # the job has ended; send the remaining records
        self._abandoned = threading.Event()  # stop sending
        self._refusal: Exception | None = None
        self._status = "FINISHED"
        self._sent = 0  # records that MLflow has
        self._refused = 0  # records and artefacts that MLflow refused
        self._dropped = 0  # artefacts that did not fit into the queue
        self._last_success = time.monotonic()
        self._threads = [threading.Thread(target=self._send_numbers, name="numbers", daemon=True)] if uri else []
        for thread in self._threads:
            thread.start()
        if config is not None:
            self.record("config.json", config.model_dump(mode="json"))

    @property
    def unsent(self) -> int:
        """Return the number of records that MLflow does not have."""
        return self._log.count - self._sent

    def check(self) -> None:
        """Wait for the first response of the server, for FIRST_RESPONSE_SECONDS at most.

        Raises:
            ValueError: the server refuses this job permanently; the message says what to do.
        """
        if self._uri:
            self._responded.wait(FIRST_RESPONSE_SECONDS)
            self._responded.set()
        if self._refusal is not None:
            self._log.close()
            raise ValueError(refusal(self._mlflow.server, self._refusal)) from self._refusal

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Record metrics at `step`, which counts images in a training and samples in a generation."""
        self._log.append(Record(_now(), step, {name: float(value) for name, value in values.items()}))
        publish(self._job, values)

    def flush(self) -> None:
        """Write all metrics to storage, from where pages read them."""
        self._log.flush()

    def picture(self, name: str, png: bytes) -> None:
        """Record a picture; `name` ends in .png."""
        self._put(partial(self._mlflow.log_picture, name, png))

    def record(self, name: str, content: dict[str, Any] | str) -> None:
        """Record a JSON document or a text, such as an HTML page."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        self._put(partial(self._mlflow.log_text, name, text))

    def child(
        self, name: str, parameters: dict[str, Any], history: dict[int, dict[str, float]], picture: bytes | None = None
    ) -> None:
        """Record a child run, such as a trial of a search, under its name.

        history: metrics by step. Steps that an earlier start of the job recorded are skipped.
        """
        if self._recorded_children is None:
            self._recorded_children = {(record.child, record.step) for record in read_records(self._output)}
        for step, values in history.items():
            if (name, step) not in self._recorded_children:
                self._recorded_children.add((name, step))
                self._log.append(Record(_now(), step, {key: float(value) for key, value in values.items()}, name))
        self._put(partial(self._mlflow.log_child, name, parameters, picture))

    def finish(self, status: str) -> None:
        """Send all records, then end the run with the status FINISHED, KILLED or FAILED.

        If the server accepts nothing for PATIENCE_SECONDS, leave the remaining records to the next start of the job.
        """
        self._log.close()
        self._artifacts.put(None)  # ends the thread that sends artefacts
        self._artifacts.task_done()  # because None does not count as an unfinished artefact
        self._status, self._last_success = status, time.monotonic()
        self._finishing.set()
        while any(thread.is_alive() for thread in self._threads):
            if time.monotonic() - self._last_success > PATIENCE_SECONDS:
                break
            time.sleep(0.02)
        self._abandoned.set()
        if self._uri:
            self._conclude()
        sent = storage.join(self._output, SENT)
        if self.unsent:
            if storage.exists(sent):  # because storage may forbid deletes, which would end a finished job with an error
                storage.delete(sent)
        elif self._log.count and status == "FINISHED" and not self._refused:
            storage.write_json(sent, {"mlflow": redact_patterns(self._uri), "run": self._mlflow.id})

    def _conclude(self) -> None:
        """Print the address of the run, and warn about records that MLflow does not have."""
        if self._mlflow.id:
            print(f"View run: {self._mlflow.page}")
        if self.unsent:
            uri = storage.join(self._output, metrics_log.NAME)
            message = "%d records are in %s and not in %s; the same command sends them once it responds"
            log.warning(message, self.unsent, uri, self._mlflow.server)
        if lost := self._artifacts.unfinished_tasks + self._dropped:
            log.warning("%d artefacts are not in %s", lost, self._mlflow.server)
        if self._refused:
            log.warning("%d records were refused and are not in %s", self._refused, self._mlflow.server)

    # ------------------------------------------------------------------------------------------ in the threads

    def _send_numbers(self) -> None:
        """Open the run, send the records of metrics.jsonl as they are written, and set the run's status at the end."""
        try:
            self._retry(partial(self._mlflow.open, self._config), self._mlflow.server)
            self._responded.set()
            artifact_thread = threading.Thread(target=self._send_artifacts, name="artefacts", daemon=True)
            artifact_thread.start()
            self._threads.append(artifact_thread)
            self._follow_log()
        except _Abandoned:
            pass
        except _PermanentError as refused:
            if self._responded.is_set():
                message = "%s takes no more records, the job continues: %s"
                log.warning(message, self._mlflow.server, reason(refused.error))
            else:
                self._refusal = refused.error
                self._responded.set()

    def _follow_log(self) -> None:
        """Send the records of metrics.jsonl that MLflow lacks, until the job has finished and all are sent."""
        position, first = Position(), None
        while True:
            is_finishing = self._finishing.is_set()
            records, next_position = self._retry(partial(self._log.read, position), self._output)
            if records:
                if first is None:
                    first = records[0]
                    sent = self._retry(partial(self._mlflow.records_sent, first), self._mlflow.server)
                    self._sent = min(sent, self._log.count)
                self._send(records[max(self._sent - position.number, 0) :])
                if next_position.number > self._sent:
                    self._retry(partial(self._mlflow.mark_sent, first, next_position.number), self._mlflow.server)
                    self._sent = next_position.number
                position = next_position
            elif is_finishing:
                self._retry(partial(self._mlflow.end, self._status), self._mlflow.server)
                return
            else:
                self._finishing.wait(POLL_SECONDS)

    def _send(self, records: list[Record]) -> None:
        """Send records. If MLflow refuses some of them, find these by bisection and leave them out."""
        if not records:
            return
        try:
            self._retry(partial(self._mlflow.log_numbers, records), self._mlflow.server)
        except _PermanentError as refused:
            if len(records) == 1:
                self._refuse(f"the numbers of step {records[0].step}", refused.error)
                return
            middle = len(records) // 2
            self._send(records[:middle])
            self._send(records[middle:])

    def _send_artifacts(self) -> None:
        """Send the artefacts one after another, in their order, until the job has finished."""
        with contextlib.suppress(_Abandoned):
            while (send := self._artifacts.get()) is not None:
                try:
                    self._retry(send, f"the artefact store of {self._mlflow.server}")
                except _PermanentError as refused:
                    self._refuse("an artefact", refused.error)
                self._artifacts.task_done()

    def _put(self, send: Send) -> None:
        """Add an artefact to the queue, or drop it if the queue is full."""
        if self._uri and self._artifacts.unfinished_tasks >= QUEUE_CAPACITY:
            self._dropped += 1
        elif self._uri:
            self._artifacts.put(send)

    def _retry(self, call: Callable[[], Result], server: str) -> Result:
        """Call `call` until it succeeds, and return its result. `server` names what is unreachable in the log.

        Before the first response of the server, errors that refuse the whole job are permanent, too. Later they may be
        temporary, such as those of a gateway while the server starts.

        Raises:
            _PermanentError: it can never succeed.
            _Abandoned: the job has ended.
        """
        is_warned = False
        while not self._abandoned.is_set():
            try:
                result = call()
            except Exception as error:
                if is_refused(error, opening=not self._responded.is_set()):
                    raise _PermanentError(error) from error
                if not is_warned:
                    message = "%s is unreachable; retrying in the background, the job continues: %s"
                    log.warning(message, server, reason(error))
                is_warned = True
                self._responded.set()
                self._abandoned.wait(RETRY_SECONDS)
            else:
                self._last_success = time.monotonic()
                return result
        raise _Abandoned

    def _refuse(self, record: str, error: Exception) -> None:
        """Count a record or an artefact that MLflow refused, and log the first ones."""
        if self._refused < REFUSALS_LOGGED:
            message = "%s refuses %s, which is left out there; the job continues and counts all such records: %s"
            log.warning(message, self._mlflow.server, record, reason(error))
        self._refused += 1


@contextlib.contextmanager
def tracked(job: str, config: JobConfig, output: str, parent: str = "") -> Iterator[Tracker]:
    """Yield the tracker of a job. All starts of a job with the same output folder share one MLflow run.

    parent: the run that this one continues, for a tag of the MLflow run.

    Raises:
        ValueError: MLflow refuses this job permanently; the message says what to do.
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
    """Send the metrics of a finished job that MLflow does not have. Raises what `tracked` does."""
    sent, numbers = storage.join(output, SENT), storage.join(output, metrics_log.NAME)
    if config.tracking and not storage.exists(sent) and storage.exists(numbers):
        with tracked(job, config, output):
            pass


def _now() -> int:
    return int(time.time() * 1000)
