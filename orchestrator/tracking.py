"""MLflow, from the driver only: one run for each job, through a bounded queue that never holds the work up."""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

from cluster.metrics import publish
from orchestrator.config import JobConfig, tracking_uri

EXPERIMENT = "admiral"  # the MLflow experiment of all jobs
QUEUE_CAPACITY = 20_000  # records that wait while the server is away; new ones beyond it are dropped and counted
BATCH_NUMBERS = 1_000  # in one request; MLflow takes no more
BATCH_PARAMETERS = 100  # likewise
LONGEST_PARAMETER = 6_000  # characters; MLflow takes no longer ones
RETRY_SECONDS = 5.0  # between two tries while the server is away
PATIENCE_SECONDS = 60.0  # how long the end of a job waits for a server that takes nothing
# What MLflow refuses like this, or we cannot even send, it would refuse for ever: it must not hold up the rest.
PERMANENT_CODES = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
PERMANENT_ERRORS = (TypeError, AttributeError, LookupError)

Send = Callable[[Any, str], None]  # client, run -> record something; it may be called again after a failure

log = logging.getLogger(__name__)


class Number(NamedTuple):
    """One value of one metric. Its moment is that of its making, so MLflow knows it when it is sent twice."""

    name: str
    value: float
    moment: int  # milliseconds since 1970
    step: int


class Tracker:
    """The hand of a job on its MLflow run. Every method returns at once; a thread does the talking.

    Records are sent in order, each until it is taken: while the server is away they wait, up to QUEUE_CAPACITY of them.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, identity: str, artifact_root: str | None) -> None:
        self.uri = uri
        self._place = (experiment, run_name, identity, artifact_root)
        self._waiting: deque[Send | list[Number]] = deque()
        self._untaken = 0  # records that are not in MLflow yet
        self._dropped = 0
        self._refused = 0
        self._news = threading.Condition()
        self._finishing = False
        self._last_taken = time.monotonic()
        self._run_id: str | None = None
        self._pictures: dict[str, str] = {}  # the latest of each folder: what the run's page opens with
        self._thread = threading.Thread(target=self._drain, name="tracking", daemon=True)
        self._thread.start()

    def parameters(self, config: JobConfig) -> None:
        """Record the resolved config: its leaves as parameters, which MLflow keeps as they were when the run began, and
        the whole, as it is now, as an artefact."""

        def send(client: Any, run: str) -> None:
            _log_parameters(client, run, dict(_leaves(config.model_dump(mode="json"))))
            client.log_text(run, config.model_dump_json(indent=2), "config.json")

        self._put(send)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Record numbers at `step` (images for training, samples for generation)."""
        moment = int(time.time() * 1000)
        self._put([Number(name, float(value), moment, step) for name, value in values.items()])
        publish(_job_and_output(self._place[2])[0], values)

    def picture(self, name: str, png: bytes) -> None:
        """Record a picture under `name`, which ends in .png."""

        def send(client: Any, run: str) -> None:
            _log_picture(client, run, name, png)
            self._pictures[name.rpartition("/")[0] or name] = name
            client.set_tag(run, "mlflow.note.content", description(self._place[2], run, list(self._pictures.values())))

        self._put(send)

    def record(self, name: str, content: dict[str, Any]) -> None:
        """Record a JSON document."""
        self._put(lambda client, run: client.log_text(run, json.dumps(content, indent=2), name))

    def child(
        self, name: str, parameters: dict[str, Any], history: dict[int, dict[str, float]], picture: bytes | None = None
    ) -> None:
        """Record a child run, such as one trial of a search; it is known by its name.

        history: numbers by step. What an earlier attempt recorded of them is not recorded twice.
        """
        moment = int(time.time() * 1000)

        def send(client: Any, run: str) -> None:
            from mlflow.entities import Metric, Param

            experiment = client.get_run(run).info.experiment_id
            child = _run_of(client, experiment, f"{run} {name}", name, {"mlflow.parentRunId": run})
            tags = client.get_run(child).data.tags
            client.log_batch(child, params=[Param(key, str(value)) for key, value in parameters.items()])
            if picture is not None and "admiral.picture" not in tags:
                _log_picture(client, child, "samples.png", picture)
                client.set_tag(child, "admiral.picture", "samples.png")
            for step, values in history.items():
                if f"admiral.step.{step}" not in tags:
                    client.log_batch(child, [Metric(key, float(v), moment, step) for key, v in values.items()])
                    client.set_tag(child, f"admiral.step.{step}", "recorded")
            client.set_terminated(child)

        self._put(send)

    def finish(self, status: str) -> None:
        """Hand everything over and end the run as FINISHED, KILLED or FAILED.

        Waits for as long as the server goes on taking records, and PATIENCE_SECONDS more.
        """
        with self._news:
            self._waiting.append(lambda client, run: client.set_terminated(run, status))
            self._untaken += 1
            self._finishing = True
            self._last_taken = time.monotonic()
            self._news.notify()
        while self._thread.is_alive() and time.monotonic() - self._last_taken < PATIENCE_SECONDS:
            self._thread.join(0.1)
        if self._thread.is_alive():
            log.warning("the tracking server did not answer; %d records are not in MLflow", self._untaken)
        if self._dropped:
            log.warning("%d records did not fit the tracking queue and are not in MLflow", self._dropped)
        if self._refused:
            log.warning("%d records were refused and are not in MLflow", self._refused)

    def _put(self, record: Send | list[Number]) -> None:
        with self._news:
            if len(self._waiting) >= QUEUE_CAPACITY:
                self._dropped += 1
                return
            self._waiting.append(record)
            self._untaken += 1
            self._news.notify()

    def _drain(self) -> None:
        """Send the oldest record until it is taken or refused, then the next, until the job has finished."""
        while (taken := self._oldest()) is not None:
            send, count = taken
            tries = 0
            while (error := self._try(send)) is not None:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if _is_permanent(error):
                    log.warning("MLflow refuses a record, which is left out: %s", reason)
                    self._refused += count
                    break
                if tries == 0:
                    log.warning("MLflow is away, and is tried again until the end: %s", reason)
                tries += 1
                time.sleep(RETRY_SECONDS)
            self._untaken -= count
            self._last_taken = time.monotonic()

    def _oldest(self) -> tuple[Send, int] | None:
        """What to send next, and how many records that is: numbers that follow each other go together."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._finishing)
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            if not isinstance(first, list):
                return first, 1
            numbers, count = first, 1
            while self._waiting and isinstance(more := self._waiting[0], list):
                if len(numbers) + len(more) > BATCH_NUMBERS:
                    break
                self._waiting.popleft()
                numbers, count = numbers + more, count + 1
        return partial(_log_numbers, numbers), count

    def _try(self, send: Send) -> Exception | None:
        """What kept a record from being sent; None where it was."""
        try:
            client, run = self._connect()
            send(client, run)
        except Exception as error:  # noqa: BLE001 - whatever tracking does, the work goes on
            return error
        return None

    def _connect(self) -> tuple[Any, str]:
        """The client and this job's run: the one that an earlier attempt opened, or a new one."""
        _quiet_mlflow()
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        if self._run_id is None:
            experiment, run_name, identity, artifact_root = self._place
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment, artifact_root)
            note = {"mlflow.note.content": description(identity, "", [])}
            self._run_id = _run_of(client, number, identity, run_name, note)
            client.update_run(self._run_id, status="RUNNING")
        return client, self._run_id


@contextlib.contextmanager
def tracked(job: str, config: JobConfig, output: str) -> Iterator[Tracker]:
    """The job's MLflow run, one for each output folder however often the job is started again."""
    uri = tracking_uri(config)
    tracker = Tracker(
        uri,
        experiment=EXPERIMENT,
        run_name=f"{job} {'/'.join(output.rstrip('/').split('/')[-2:])}",
        identity=f"{job} {output}",
        artifact_root=_artifact_root(config),
    )
    tracker.parameters(config)
    try:
        yield tracker
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    tracker.finish("FINISHED")


def description(identity: str, run: str, pictures: list[str]) -> str:
    """What a run's page opens with, in Markdown: the job, where its outputs lie, and its latest pictures."""
    job, output = _job_and_output(identity)
    lines = [f"Admiral, **{job}**: outputs in `{output}`, the whole config in the artefact `config.json`."]
    lines += [f"![{name}](get-artifact?path={quote(name)}&run_uuid={run})" for name in pictures]
    return "\n\n".join(lines)


def _job_and_output(identity: str) -> tuple[str, str]:
    """The two parts of an identity: a job's name has no slash, and an output has one."""
    found = re.match(r"([^/]*) (.*)", identity)
    return (found[1], found[2]) if found else (identity, "")


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of each field."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)


def _log_parameters(client: Any, run: str, values: dict[str, str]) -> None:
    from mlflow.entities import Param

    there = client.get_run(run).data.params  # what is there cannot be changed
    new = [
        Param(name, value if len(value) <= LONGEST_PARAMETER else "long: see config.json")
        for name, value in values.items()
        if name not in there
    ]
    for first in range(0, len(new), BATCH_PARAMETERS):
        client.log_batch(run, params=new[first : first + BATCH_PARAMETERS])


def metric_history(identity: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric of the job with this identity, by MLFLOW_TRACKING_URI; empty where there is none."""
    _quiet_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], f"tags.`admiral.identity` = '{identity}'", max_results=1)
    history = client.get_metric_history(runs[0].info.run_id, name) if runs else []
    return sorted((metric.step, metric.value) for metric in history)


def _run_of(client: Any, experiment: str, identity: str, name: str, tags: dict[str, str]) -> str:
    """The run of this identity, from an earlier attempt or made now: an answer may have been lost."""
    found = client.search_runs([experiment], f"tags.`admiral.identity` = '{identity}'", max_results=1)
    if found:
        return found[0].info.run_id
    return client.create_run(experiment, run_name=name, tags={"admiral.identity": identity} | tags).info.run_id


def _log_numbers(numbers: list[Number], client: Any, run: str) -> None:
    from mlflow.entities import Metric

    for begin in range(0, len(numbers), BATCH_NUMBERS):  # one record alone may hold more
        some = numbers[begin : begin + BATCH_NUMBERS]
        client.log_batch(run, metrics=[Metric(n.name, n.value, n.moment, n.step) for n in some])


def _is_permanent(error: Exception) -> bool:
    """Whether the same record would fail again, server or not."""
    return getattr(error, "error_code", None) in PERMANENT_CODES or isinstance(error, PERMANENT_ERRORS)


def _artifact_root(config: JobConfig) -> str | None:
    """Where pictures go: beside the SQLite file, or (None) where the server puts them."""
    uri = tracking_uri(config)
    return (
        os.path.join(os.path.dirname(uri.removeprefix("sqlite:///")), "mlflow") if uri.startswith("sqlite:") else None
    )


def _log_picture(client: Any, run: str, name: str, png: bytes) -> None:
    import io

    from PIL import Image

    client.log_image(run, Image.open(io.BytesIO(png)), artifact_file=name)


def _quiet_mlflow() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # blind ones would make a second run where an answer was lost
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
