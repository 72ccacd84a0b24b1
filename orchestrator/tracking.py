"""MLflow, from the driver only: one run for each job, through a bounded queue that never holds the work up."""

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from cluster.session import is_submitted
from orchestrator.config import JobConfig

EXPERIMENT = "admiral"  # the MLflow experiment of all jobs
QUEUE_CAPACITY = 20_000  # records; beyond it the oldest wait, and new ones are dropped and counted
RETRY_SECONDS = 5.0  # between two tries while the server is away
PATIENCE_SECONDS = 60.0  # how long the end of a job waits for the server

log = logging.getLogger(__name__)


class Tracker:
    """The hand of a job on its MLflow run. Every method returns at once; a thread does the talking."""

    def __init__(self, uri: str, experiment: str, run_name: str, identity: str, artifact_root: str | None) -> None:
        self.uri = uri
        self._place = (experiment, run_name, identity, artifact_root)
        self._queue: queue.Queue[Callable[[Any, str], None] | None] = queue.Queue(QUEUE_CAPACITY)
        self._lost = 0
        self._run_id: str | None = None
        self._pictures: dict[str, str] = {}  # the latest of each folder: what the run's page opens with
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def parameters(self, config: JobConfig) -> None:
        """Record the resolved config: its leaves as tags of the run, and the whole as an artefact."""
        self._put(lambda client, run: client.log_text(run, config.model_dump_json(indent=2), "config.json"))

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Record numbers at `step` (images for training, samples for generation)."""
        moment = int(time.time() * 1000)

        def send(client: Any, run: str) -> None:
            from mlflow.entities import Metric

            client.log_batch(run, metrics=[Metric(name, float(v), moment, step) for name, v in values.items()])

        self._put(send)

    def picture(self, name: str, png: bytes) -> None:
        """Record a picture under `name`, which ends in .png."""

        def send(client: Any, run: str) -> None:
            import io

            from PIL import Image

            client.log_image(run, Image.open(io.BytesIO(png)), artifact_file=name)
            self._pictures[name.rpartition("/")[0] or name] = name
            client.set_tag(run, "mlflow.note.content", description(self._place[2], run, list(self._pictures.values())))

        self._put(send)

    def record(self, name: str, content: dict[str, Any]) -> None:
        """Record a JSON document."""
        self._put(lambda client, run: client.log_text(run, json.dumps(content, indent=2), name))

    def child(self, name: str, values: dict[str, float], parameters: dict[str, Any]) -> None:
        """Record a finished child run, such as one trial of a search."""

        def send(client: Any, run: str) -> None:
            experiment = client.get_run(run).info.experiment_id
            child = client.create_run(experiment, run_name=name, tags={"mlflow.parentRunId": run}).info.run_id
            for key, value in parameters.items():
                client.log_param(child, key, value)
            for key, number in values.items():
                client.log_metric(child, key, float(number))
            client.set_terminated(child)

        self._put(send)

    def finish(self, status: str) -> None:
        """Hand everything over and end the run as FINISHED, KILLED or FAILED; waits at most PATIENCE_SECONDS."""
        self._put(lambda client, run: client.set_terminated(run, status))
        self._queue.put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            log.warning("the tracking server did not answer; %d records are not in MLflow", self._queue.qsize())
        if self._lost:
            log.warning("%d records did not fit the tracking queue and are not in MLflow", self._lost)

    def _put(self, send: Callable[[Any, str], None]) -> None:
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self._lost += 1

    def _drain(self) -> None:
        while (send := self._queue.get()) is not None:
            tries = 0
            while not self._sent(send, warn=tries == 0):
                tries += 1
                time.sleep(RETRY_SECONDS)

    def _sent(self, send: Callable[[Any, str], None], warn: bool) -> bool:
        try:
            client, run = self._connect()
            send(client, run)
        except Exception as error:  # noqa: BLE001 - whatever tracking does, the work goes on
            if warn:
                log.warning("MLflow is away, and is tried again until the end: %s", str(error).splitlines()[0])
            return False
        return True

    def _connect(self) -> tuple[Any, str]:
        """The client and this job's run: the one that an earlier attempt opened, or a new one."""
        _quiet_mlflow()
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        if self._run_id is None:
            experiment, run_name, identity, artifact_root = self._place
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment, artifact_root)
            runs = client.search_runs([number], f"tags.`admiral.identity` = '{identity}'", max_results=1)
            if runs:
                self._run_id = runs[0].info.run_id
                client.update_run(self._run_id, status="RUNNING")
            else:
                tags = {"admiral.identity": identity, "mlflow.note.content": description(identity, "", [])}
                self._run_id = client.create_run(number, run_name=run_name, tags=tags).info.run_id
        return client, self._run_id


@contextlib.contextmanager
def tracked(job: str, config: JobConfig, output: str) -> Iterator[Tracker]:
    """The job's MLflow run, one for each output folder however often the job is started again."""
    tracker = Tracker(
        tracking_uri(config),
        experiment=EXPERIMENT,
        run_name=f"{job} {output.rstrip('/').rsplit('/', 1)[-1]}",
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
    job, _, output = identity.partition(" ")
    lines = [f"Admiral, **{job}**: outputs in `{output}`, the whole config in the artefact `config.json`."]
    lines += [f"![{name}](get-artifact?path={quote(name)}&run_uuid={run})" for name in pictures]
    return "\n\n".join(lines)


def tracking_uri(config: JobConfig) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the store where that is local.

    Raises:
        ValueError: neither works here; the message says what to set.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        root = config.path("")
        if "://" in root:
            raise ValueError(f"store={config.store} is not a local folder, so MLFLOW_TRACKING_URI must be set")
        os.makedirs(root, exist_ok=True)
        return f"sqlite:///{os.path.join(root, 'mlflow.db')}"
    if is_submitted() and given.startswith("sqlite:///") and not given.startswith("sqlite:////"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={given} is a relative path, and this job runs in a temporary copy of the checkout: "
            "pass a server's URI, or sqlite:////absolute/path"
        )
    return given


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


def _artifact_root(config: JobConfig) -> str | None:
    """Where pictures go: beside the SQLite file, or (None) where the server puts them."""
    uri = tracking_uri(config)
    return (
        os.path.join(os.path.dirname(uri.removeprefix("sqlite:///")), "mlflow") if uri.startswith("sqlite:") else None
    )


def _quiet_mlflow() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
