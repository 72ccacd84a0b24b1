"""What every job's config has, and how a folder is bound to one config."""

import json
import os
from typing import Any, Self

from pydantic import BaseModel, Field

from cluster.session import is_submitted
from orchestrator import storage
from orchestrator.redaction import redact_tree

# What presets of the same names are in every job.
DIGITS = "the quickstart's 1,797 scanned digits, small enough for two cores"
IMAGES = "one's own images"


class JobConfig(BaseModel, frozen=True, extra="forbid"):
    """What every job has. The comment behind a field is its text in --help; one above fields is their heading."""

    # Every job
    store: str = Field(
        default_factory=lambda: os.environ.get("ADMIRAL_STORE", "runs")
    )  # folder or URI under which all relative paths of this job lie; the environment's ADMIRAL_STORE, else runs
    tracking: bool = True  # send numbers and artefacts to MLflow; without it they lie in the output folder only
    dry_run: bool = False  # print the resolved config and what would be read and written, then stop

    @property
    def operational(self) -> frozenset[str]:
        """Fields of a job's own that do not change what comes out: they may differ when it is started again."""
        return frozenset()

    def starting_from(self, preset: Self) -> Self:
        """`preset` as it is changed by what this config refers to: where the command line starts from instead."""
        return preset

    def path(self, path: str) -> str:
        """Return a URI or absolute path as it is, with its `~` expanded; a relative one under the store.

        Raises:
            ValueError: the path is relative, the store too, and this is a submitted job, whose folder is a
                temporary copy of the checkout.
        """
        if storage.is_absolute(path):
            return storage.resolve(path) if path.startswith("~") else path
        if not storage.is_absolute(self.store) and is_submitted():
            raise ValueError(
                f"store={self.store!r} is relative, and this job runs in a temporary copy of the checkout: "
                "set ADMIRAL_STORE (or pass --store) to a URI or an absolute path that all nodes see"
            )
        return storage.join(storage.resolve(self.store), path)

    @property
    def shared(self) -> tuple[str, ...]:
        """The URIs that all nodes of a cluster must see alike: the store and, where it is used, the tracking server."""
        return self.path(""), *([tracking_uri(self)] if self.tracking else [])


def experiment_name() -> str:
    """Return the MLflow experiment of all jobs: MLFLOW_EXPERIMENT_NAME, else admiral."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "admiral"


def tracking_uri(config: JobConfig) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the store where that is local.

    Raises:
        ValueError: neither works here; the message says what to set.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        root = config.path("")
        if "://" in root:
            raise ValueError(
                f"store={config.store} is not a local folder, so MLFLOW_TRACKING_URI must be set, or pass --no-tracking"
            )
        os.makedirs(root, exist_ok=True)
        return f"sqlite:///{os.path.join(root, 'mlflow.db')}"
    if is_submitted() and given.startswith("sqlite:///") and not given.startswith("sqlite:////"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={given} is a relative path, and this job runs in a temporary copy of the checkout: "
            "pass a server's URI, or sqlite:////absolute/path"
        )
    return given


# Where results lie, and how many workers make them, does not change them.
OPERATIONAL = {"store", "dry_run", "tracking", "output", "num_workers", "cost"}


def check_or_write_config(folder: str, config: JobConfig, files: dict[str, str] | None = None, **facts: Any) -> None:
    """Record `config` and `facts` as the folder's own in its config.json, or check that they are what it holds already.

    Facts are what else changes results, such as hashes; one may replace a field, as a hash its file's path. `files` are
    noted for later attempts and not compared: the file of weights that was taken for each path.

    Raises:
        ValueError: the folder was made with another config; the message names the fields that differ.
    """
    # By patterns only: what is written must not depend on the environment of the process that compares.
    wanted = redact_tree(config.model_dump(mode="json", exclude=OPERATIONAL | config.operational) | facts, whole=False)
    uri = storage.join(folder, "config.json")
    if storage.put_if_absent(uri, json.dumps(wanted | ({"files": files} if files else {}), indent=2).encode()):
        return
    found = redact_tree(storage.read_json(uri), whole=False)
    found.pop("files", None)
    if changes := differences(found, wanted):
        raise ValueError(
            f"{folder} was made with another config ({changes}); choose another --output or the same config"
        )


def noted_files(folder: str) -> dict[str, str]:
    """Return the files of weights that the folder's first attempt took, by their paths in its config."""
    uri = storage.join(folder, "config.json")
    return storage.read_json(uri).get("files", {}) if storage.exists(uri) else {}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The leaves in which two nested dictionaries differ, in words; empty where they are equal."""
    there, here = _flat(found), _flat(wanted)
    differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    return ", ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in differing)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict with its paths as keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
