"""The MLflow run of a job: requests to the server, and the classification of its errors."""

import io
import logging
import os
import re
import threading
import time
from typing import Any
from urllib.parse import quote

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel

from orchestrator.config import experiment_name, flatten
from orchestrator.metrics_log import Record
from orchestrator.redaction import command, redact, redact_patterns

BATCH_NUMBERS = 1_000  # MLflow's limit for the metrics of a request
BATCH_PARAMETERS = 100  # MLflow's limit for the parameters of a request
LONGEST_PARAMETER = 6_000  # MLflow's limit in characters
CURSOR = "admiral.records"  # tag: time of the first record of metrics.jsonl, and number of records that MLflow has
IDENTITY = "admiral.identity"  # tag by which a restarted job finds its run
# By default MLflow 3 opens an experiment in its view for traces of language models. The tag and the query of the link
# select the view for model training.
KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "?workflowType=machine_learning"
REFUSED_RECORD = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}  # error codes that refuse a record
REFUSED_RECORD |= {"RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
DENIED = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
REFUSED_JOB = REFUSED_RECORD | DENIED | {"ENDPOINT_NOT_FOUND", "NOT_FOUND"}  # error codes that refuse the job
# Messages with the same meanings, because gateways send no error codes, and databases and file stores have others.
DENIED_MESSAGE = re.compile("(?i)unauthorized|forbidden|not authenticated|authentication failed")
UNKNOWN_ADDRESS = re.compile("MLFLOW_ALLOW_FILE_STORE|unsupported URI|Can't load plugin")
UNUSABLE_DATABASE = re.compile(
    "unable to open database file|readonly database|not in a valid JSON format|CERTIFICATE_VERIFY_FAILED"
)
RACE = re.compile("(?i)unique constraint|duplicate entry")  # another driver of this run wrote the same row
PROGRAMMING_ERRORS = (TypeError, AttributeError, LookupError, ImportError, NameError, UnidentifiedImageError)
FILE_ERRORS = (FileNotFoundError, NotADirectoryError, PermissionError)  # about the folder of a SQLite file


class Refused(Exception):
    """An error that refuses this job permanently. Its message is "PROBLEM; ADVICE"."""


class MlflowRun:
    """The MLflow run of a job and its child runs, on the server or in the database at `uri`.

    All methods wait for the server and raise its errors. After an error they may be called again.
    """

    def __init__(self, uri: str, job: str, output: str, parent: str = "") -> None:
        self.server = f"MLflow at {redact(uri)}"
        self.id = self._experiment = ""
        self._uri, self._job, self._output, self._parent = uri, job, output, parent
        self._client: Any = None
        self._pictures: dict[str, str] = {}  # the latest picture of each folder, for the description of the run
        self._children: dict[str, str] = {}  # id of each child run by its name
        self._lock = threading.Lock()  # guards _children, which two threads change

    def open(self, config: BaseModel | None) -> None:
        """Find the run or create it, and set its tags and parameters.

        Raises:
            Refused: the experiment was deleted.
        """
        _prepare_mlflow(self._uri)
        from mlflow import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.git_utils import get_git_commit

        client = MlflowClient(self._uri)
        experiment = _find_or_create_experiment(client, self._uri)
        tags = {"mlflow.note.content": description(self._job, self._output, "", [])}
        if commit := get_git_commit(__file__):
            tags["mlflow.source.git.commit"] = commit
        tags = resolve_tags(tags)  # adds the user and the source, as `mlflow.start_run` does
        name = f"{self._job} {'/'.join(self._output.rstrip('/').split('/')[-2:])}"
        run = _find_or_create_run(client, experiment.experiment_id, f"{self._job} {self._output}", name, tags)
        client.update_run(run, status="RUNNING")
        client.set_tag(run, "admiral.command", command())
        if self._parent:
            client.set_tag(run, "admiral.parent", redact(self._parent))
        if config is not None:
            _log_parameters(client, run, config.model_dump(mode="json"))
        self._client, self.id, self._experiment = client, run, experiment.experiment_id

    @property
    def page(self) -> str:
        """Return the URL of the run's page, or the command that shows it if MLflow is a local database."""
        if not self._uri.startswith("http"):
            return f"mlflow ui --backend-store-uri {redact(self._uri)}"
        server = re.sub("(://)[^/]*@", r"\1", self._uri).rstrip("/")
        return f"{server}/#/experiments/{self._experiment}/runs/{self.id}{VIEW}"

    def records_sent(self, first: Record) -> int:
        """Return how many records of metrics.jsonl the server has. `first` is its first record, which identifies it."""
        first_time, _, count = self._client.get_run(self.id).data.tags.get(CURSOR, "").partition(" ")
        return int(count) if first_time == str(first.time) else 0

    def mark_sent(self, first: Record, count: int) -> None:
        """Set the number that `records_sent` returns."""
        self._client.set_tag(self.id, CURSOR, f"{first.time} {count}")

    def log_numbers(self, records: list[Record]) -> None:
        """Send records to the run and its children. MLflow ignores metrics that it already has."""
        from mlflow.entities import Metric

        numbers: dict[str, list[Metric]] = {}
        for record in records:
            points = [Metric(name, value, record.time, record.step) for name, value in record.metrics.items()]
            numbers.setdefault(record.child, []).extend(points)
        for child, points in numbers.items():
            run = self._child(child) if child else self.id
            for first in range(0, len(points), BATCH_NUMBERS):
                self._client.log_batch(run, metrics=points[first : first + BATCH_NUMBERS])

    def log_text(self, name: str, text: str) -> None:
        """Send a text as an artefact."""
        self._client.log_text(self.id, redact(text), name)

    def log_picture(self, name: str, png: bytes) -> None:
        """Send a picture as an artefact, and show it in the description of the run.

        The description shows only the latest picture of each folder.
        """
        _log_picture(self._client, self.id, name, png)
        self._pictures[name.rpartition("/")[0] or name] = name
        text = description(self._job, self._output, self.id, list(self._pictures.values()))
        self._client.set_tag(self.id, "mlflow.note.content", text)

    def log_child(self, name: str, parameters: dict[str, Any], picture: bytes | None) -> None:
        """Send the parameters and the picture of a child run, and set its status to FINISHED."""
        child = self._child(name)
        _log_parameters(self._client, child, parameters)
        if picture is not None and "admiral.picture" not in self._client.get_run(child).data.tags:
            _log_picture(self._client, child, "samples.png", picture)
            self._client.set_tag(child, "admiral.picture", "samples.png")
        self._client.set_terminated(child)

    def end(self, status: str) -> None:
        """Set the run's status: FINISHED, KILLED or FAILED."""
        self._client.set_terminated(self.id, status)

    def _child(self, name: str) -> str:
        """Return the id of the child run of this name; create it if it does not exist."""
        with self._lock:
            if name not in self._children:
                tags = {"mlflow.parentRunId": self.id}
                self._children[name] = _find_or_create_run(
                    self._client, self._experiment, f"{self.id} {name}", name, tags
                )
            return self._children[name]


def description(job: str, output: str, run: str, pictures: list[str]) -> str:
    """Return the description of a run in Markdown: job, output folder, command and latest pictures."""
    lines = [f"Admiral, **{job}**: outputs in `{output}`, the whole config in the artefact `config.json`."]
    lines += [f"```\n{command()}\n```"]
    lines += [f"![{name}](get-artifact?path={quote(name)}&run_uuid={run})" for name in pictures]
    return redact("\n\n".join(lines))


def response_seconds(uri: str) -> float:
    """Return the seconds that the server takes to respond to a request of a job, with the job's credentials."""
    _prepare_mlflow(uri)
    from mlflow import MlflowClient

    begin = time.perf_counter()
    MlflowClient(uri).get_experiment_by_name(experiment_name())
    return time.perf_counter() - begin


def is_refused(error: Exception, opening: bool) -> bool:
    """Return whether an error is permanent, so that the same request would fail again.

    opening: also count errors that refuse the whole job. After the first response of the server they may be temporary,
    such as an expired token.
    """
    text, code = str(error), getattr(error, "error_code", "")
    if RACE.search(text):
        return False
    if isinstance(error, (Refused, *PROGRAMMING_ERRORS)):
        return True
    if not opening:
        return code in REFUSED_RECORD
    matches = any(pattern.search(text) for pattern in (DENIED_MESSAGE, UNKNOWN_ADDRESS, UNUSABLE_DATABASE))
    return matches or code in REFUSED_JOB or isinstance(error, FILE_ERRORS)


def reason(error: Exception) -> str:
    """Return the first line of an error, redacted."""
    if isinstance(error, OSError) and error.strerror:
        return redact(f"{error.filename}: {error.strerror}")
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    text = re.sub(r"^API request to .*\(Caused by \w+\((.*)\)\)$", r"\1", text)  # urllib3 wraps the cause
    return redact(re.sub(r"\[Errno -?\d+\] |^\"|\"$", "", text))[:400]


def refusal(server: str, error: Exception) -> str:
    """Return one line that says why `server` refuses the job and what to do."""
    problem, advice = reason(error), "set MLFLOW_TRACKING_URI to a server's address or to sqlite:////PATH/mlflow.db"
    if isinstance(error, Refused):
        problem, _, advice = problem.partition("; ")
    elif UNKNOWN_ADDRESS.search(str(error)):
        problem = "MLflow 3 does not accept such an address"
    elif getattr(error, "error_code", "") in DENIED or DENIED_MESSAGE.search(str(error)):
        advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return f"{server} refuses this job: {problem}; {advice}, or pass --no-tracking"


def _find_or_create_experiment(client: Any, uri: str) -> Any:
    """Return the experiment of all jobs; create it if it does not exist.

    Raises:
        Refused: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            artifacts = None  # the server selects the location
            if uri.startswith("sqlite:///"):
                artifacts = os.path.join(os.path.dirname(uri.removeprefix("sqlite:///")), "mlflow")
            client.create_experiment(name, artifacts, tags=KIND)
        except MlflowException:
            if client.get_experiment_by_name(name) is None:  # else another job has created it meanwhile
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        restore = f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        raise Refused(f"experiment {name} is deleted; restore it by {restore}, or set MLFLOW_EXPERIMENT_NAME")
    for key, value in KIND.items():
        if key not in experiment.tags:  # created by an earlier version or by hand
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment


def _find_or_create_run(client: Any, experiment: str, identity: str, name: str, tags: dict[str, str]) -> str:
    """Return the id of the run with this identity. Create it unless an earlier start or a lost request has."""
    # MLflow's filters have no escapes, so quotes are percent-encoded.
    identity = re.sub(r"[\"'`\\%\x00-\x1f]", lambda match: quote(match[0]), redact_patterns(identity))
    if runs := client.search_runs([experiment], f"tags.`{IDENTITY}` = '{identity}'", max_results=1):
        return runs[0].info.run_id
    tags = {key: redact(value) for key, value in tags.items()} | {IDENTITY: identity}
    return client.create_run(experiment, run_name=redact_patterns(name), tags=tags).info.run_id


def _log_parameters(client: Any, run: str, values: dict[str, Any]) -> None:
    """Log the values of a nested dict by dotted names, without those that the run has already."""
    from mlflow.entities import Param

    logged = client.get_run(run).data.params  # MLflow does not let parameters change
    texts = {name: redact(str(value)) for name, value in flatten(values).items() if name not in logged}
    short = {name: text if len(text) <= LONGEST_PARAMETER else "long: see config.json" for name, text in texts.items()}
    parameters = [Param(name, text) for name, text in short.items()]
    for first in range(0, len(parameters), BATCH_PARAMETERS):
        client.log_batch(run, params=parameters[first : first + BATCH_PARAMETERS])


def _log_picture(client: Any, run: str, name: str, png: bytes) -> None:
    client.log_image(run, Image.open(io.BytesIO(png)), artifact_file=name)


def _prepare_mlflow(uri: str) -> None:
    """Silence MLflow and switch off its retries, because the caller retries."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the URL may contain a password
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # a retry would create a second run if a response is lost
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not uri.startswith("http"):
        import mlflow.store.db.utils

        mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # ten retries would take two minutes without a log line
