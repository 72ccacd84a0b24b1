"""Tracking of a job, in the driver only: numbers go to `metrics.jsonl` in its folder, and threads fill MLflow from it.

The job never waits for MLflow. A tag of the MLflow run holds the number of records that the server has, so the next
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
REFUSALS_NAMED = 5  # refused records that are named in the log; later ones are only counted
FIRST_ANSWER_SECONDS = 20.0  # how long a job waits at its start to learn whether MLflow refuses it
PATIENCE_SECONDS = 60.0  # how long a job waits at its end for a server that takes nothing
SENT = "tracking.json"  # file in the job's folder that says that MLflow has all numbers

Send = Callable[[], object]  # sends an artefact; may be called again after an error
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class _PermanentError(Exception):
    """MLflow refuses a request for ever; `error` is its answer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _GivenUp(Exception):
    """The job has ended and does not wait for MLflow any more."""


class Tracker:
    """Records the metrics and artefacts of a job. Only `check`, `flush` and `finish` wait.

    One thread sends numbers and another one artefacts, because the artefact store may be another server. Without a
    `uri` only `metrics.jsonl` is written.
    """

    def __init__(
        self, job: str, output: str, uri: str | None, config: BaseModel | None = None, parent: str = ""
    ) -> None:
        self._job, self._output, self._uri, self._config = job, output, uri or "", config
        self._log = MetricsLog(output)
        self._mlflow = MlflowRun(self._uri, job, output, parent)
        self._artifacts: queue.Queue[Send | None] = queue.Queue()
        self._known_children: set[tuple[str, int]] | None = None  # (name, step) in metrics.jsonl
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
        """Return the number of records that MLflow does not have."""
        return self._log.count - self._sent

    def check(self) -> None:
        """Wait for the first answer of the server.

        Raises:
            ValueError: the server refuses this job for ever; the message says what to do.
        """
        if self._uri:
            self._answered.wait(FIRST_ANSWER_SECONDS)
            self._answered.set()
        if self._refusal is not None:
            self._log.close()
            raise ValueError(refusal(self._mlflow.where, self._refusal)) from self._refusal

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Record metrics at `step`, in images for a training and in samples for a generation."""
        self._log.append(Record(_now(), step, {name: float(value) for name, value in values.items()}))
        publish(self._job, values)

    def flush(self) -> None:
        """Write all metrics so far to storage, from where pages read them."""
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
        """Record a child run, such as a trial of a search, by its name.

        history: metrics by step; steps that an earlier attempt recorded are skipped.
        """
        if self._known_children is None:
            self._known_children = {(record.child, record.step) for record in read_records(self._output)}
        for step, values in history.items():
            if (name, step) not in self._known_children:
                self._known_children.add((name, step))
                self._log.append(Record(_now(), step, {key: float(value) for key, value in values.items()}, name))
        self._put(partial(self._mlflow.log_child, name, parameters, picture))

    def finish(self, status: str) -> None:
        """End the run with the status FINISHED, KILLED or FAILED, after all records are sent.

        Stops waiting if the server takes nothing for PATIENCE_SECONDS.
        """
        self._log.close()
        self._artifacts.put(None)  # ends their thread
        self._artifacts.task_done()  # it is not one of the artefacts, which are counted
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
            if storage.exists(sent):  # otherwise storage that forbids deletes would end a finished job with an error
                storage.delete(sent)
        elif self._log.count and status == "FINISHED" and not self._refused:
            storage.write_json(sent, {"mlflow": redact_patterns(self._uri), "run": self._mlflow.id})

    def _conclude(self) -> None:
        """Print where the run is; warn about records that MLflow does not have."""
        if self._mlflow.id:
            print(f"View run: {self._mlflow.page}")
        if self.unsent:
            place = storage.join(self._output, metrics_log.NAME)
            message = "%d records are in %s and not in %s; the same command sends them once it responds"
            log.warning(message, self.unsent, place, self._mlflow.where)
        if lost := self._artifacts.unfinished_tasks + self._dropped:
            log.warning("%d artefacts are not in %s", lost, self._mlflow.where)
        if self._refused:
            log.warning("%d records were refused and are not in %s", self._refused, self._mlflow.where)

    # ------------------------------------------------------------------------------------------ in the threads

    def _send_numbers(self) -> None:
        """Open the run, send the records of metrics.jsonl as they are written, and set the run's status at the end."""
        try:
            self._retry(partial(self._mlflow.open, self._config), self._mlflow.where)
            self._answered.set()
            publishing = threading.Thread(target=self._send_artifacts, name="artefacts", daemon=True)
            publishing.start()
            self._threads.append(publishing)
            self._follow_log()
        except _GivenUp:
            pass
        except _PermanentError as refused:
            if self._answered.is_set():
                message = "%s takes no more records, the job continues: %s"
                log.warning(message, self._mlflow.where, reason(refused.error))
            else:
                self._refusal = refused.error
                self._answered.set()

    def _follow_log(self) -> None:
        """Send the records of metrics.jsonl that MLflow lacks, until the job has finished and all are sent."""
        position, first = Position(), None
        while True:
            is_finishing = self._finishing.is_set()
            records, following = self._retry(partial(self._log.read, position), self._output)
            if records:
                if first is None:
                    first = records[0]
                    sent = self._retry(partial(self._mlflow.records_sent, first), self._mlflow.where)
                    self._sent = min(sent, self._log.count)
                self._send(records[max(self._sent - position.number, 0) :])
                if following.number > self._sent:
                    self._retry(partial(self._mlflow.mark_sent, first, following.number), self._mlflow.where)
                    self._sent = following.number
                position = following
            elif is_finishing:
                self._retry(partial(self._mlflow.end, self._status), self._mlflow.where)
                return
            else:
                self._finishing.wait(POLL_SECONDS)

    def _send(self, records: list[Record]) -> None:
        """Send records. If MLflow refuses some of them, leave only those out."""
        if not records:
            return
        try:
            self._retry(partial(self._mlflow.log_numbers, records), self._mlflow.where)
        except _PermanentError as refused:
            if len(records) == 1:
                self._refuse(f"the numbers of step {records[0].step}", refused.error)
                return
            middle = len(records) // 2
            self._send(records[:middle])
            self._send(records[middle:])

    def _send_artifacts(self) -> None:
        """Send the artefacts in their order until the job has finished. Each is sent or refused before the next."""
        with contextlib.suppress(_GivenUp):
            while (send := self._artifacts.get()) is not None:
                try:
                    self._retry(send, f"the artefact store of {self._mlflow.where}")
                except _PermanentError as refused:
                    self._refuse("an artefact", refused.error)
                self._artifacts.task_done()

    def _put(self, send: Send) -> None:
        if self._uri and self._artifacts.unfinished_tasks >= QUEUE_CAPACITY:
            self._dropped += 1
        elif self._uri:
            self._artifacts.put(send)

    def _retry(self, call: Callable[[], Result], what: str) -> Result:
        """Call `call` until it succeeds, and return its result.

        Before the first answer of the server, errors that refuse the whole job are permanent too. Later they may be
        temporary, such as those of a gateway while the server starts.

        Raises:
            _PermanentError: it can never succeed.
            _GivenUp: the job has ended.
        """
        away = False
        while not self._abandoned.is_set():
            try:
                result = call()
            except Exception as error:
                if is_refused(error, opening=not self._answered.is_set()):
                    raise _PermanentError(error) from error
                if not away:
                    message = "%s is unreachable; retrying in the background, the job continues: %s"
                    log.warning(message, what, reason(error))
                away = True
                self._answered.set()
                self._abandoned.wait(RETRY_SECONDS)
            else:
                self._last_taken = time.monotonic()
                return result
        raise _GivenUp

    def _refuse(self, what: str, error: Exception) -> None:
        if self._refused < REFUSALS_NAMED:
            message = "%s refuses %s, which is left out there; the job continues and counts all such records: %s"
            log.warning(message, self._mlflow.where, what, reason(error))
        self._refused += 1


@contextlib.contextmanager
def tracked(job: str, config: JobConfig, output: str, parent: str = "") -> Iterator[Tracker]:
    """Yield the tracker of a job. All starts of a job with the same output folder share one MLflow run.

    parent: the run that this one continues, for a tag of the MLflow run.

    Raises:
        ValueError: MLflow refuses this job for ever; the message says what to do.
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
