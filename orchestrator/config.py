"""What every job's config has, and how a folder is bound to one config."""

import os
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, Field

from cluster.session import is_submitted
from orchestrator import storage
from orchestrator.redaction import redact_tree

# What presets of the same names are in every job.
DIGITS = "the quickstart's 1,797 scanned digits, small enough for two cores"
IMAGES = "one's own images"

T = TypeVar("T")

# A field with this mark does not change results, so it may change whenever the job is started again. --help shows it.
MARK = "operational"
Operational = Annotated[T, MARK]
NOT_COMPARED = {"store", "output", "dry_run"}  # the same results, moved to another folder, are the same


class JobConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What every job has. The comment behind a field is its text in --help; one above fields is their heading."""

    remedy: ClassVar[str] = "choose another --output or the same config"  # if a folder was made with other settings

    # Every job
    store: Operational[str] = Field(
        default_factory=lambda: os.environ.get("ADMIRAL_STORE", "runs")
    )  # folder or URI that relative paths start from; default: $ADMIRAL_STORE, else runs
    tracking: Operational[bool] = (
        True  # log to MLflow; if false, metrics and artefacts are written to the output folder only
    )
    dry_run: bool = False  # print the resolved config and what the job would read, write and cost, then exit

    @property
    def operational(self) -> frozenset[str]:
        """Return the fields that may differ when the job is started again in the same folder."""
        return frozenset(name for name, field in type(self).model_fields.items() if MARK in field.metadata)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fields that change results, as JSON has them."""
        return self.model_dump(mode="json", exclude=NOT_COMPARED | self.operational)

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


NOTES = {"files", "parent", "extended"}  # parts of a config.json that no later attempt is compared with


def check_config(folder: str, config: JobConfig, finished: bool, **facts: Any) -> dict[str, Any]:
    """Check that a folder with `finished` work was made with this config; return its config.json, empty if none.

    Facts are what else changes results, such as hashes; one may replace a field, as a hash its file's path.

    Raises:
        ValueError: the folder has work that was made with another config; the message names the fields that differ.
    """
    found = read_config(folder)
    changes = _changes(found, config, facts) if found else ""
    if finished and changes:
        raise ValueError(
            f"{folder} was made with another config ({changes}); only what --help marks [operational] may change: "
            f"{config.remedy}"
        )
    return found


def check_or_write_config(
    folder: str, config: JobConfig, finished: bool, notes: dict[str, Any] | None = None, **facts: Any
) -> None:
    """Do as `check_config`, and bind the folder to this config if it has no finished work, whatever it was bound to.

    `notes` are written with the config and not compared: the file of weights that was taken for each path, and the
    like.
    """
    found = check_config(folder, config, finished, **facts)
    if finished and found:
        return
    if found and (changes := _changes(found, config, facts)):
        print(f"{folder} has nothing finished, so it takes the new config ({changes})")
    storage.write_json(storage.join(folder, "config.json"), _compared(config, facts) | (notes or {}))


def _compared(config: JobConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """By patterns only: what is written must not depend on the environment of the process that compares."""
    return redact_tree(config.fingerprint() | facts, whole=False)


def _changes(found: dict[str, Any], config: JobConfig, facts: dict[str, Any]) -> str:
    """Return how a config.json differs from a config; it may hold notes, and fields that older versions compared."""
    ignored = (NOTES | NOT_COMPARED | config.operational) - facts.keys()
    kept = {name: value for name, value in found.items() if name not in ignored}
    return differences(redact_tree(kept, whole=False), _compared(config, facts))


def noted_files(folder: str) -> dict[str, str]:
    """Return the files of weights that the folder's first attempt took, by their paths in its config."""
    return read_config(folder).get("files", {})


def read_config(folder: str) -> dict[str, Any]:
    """Return the folder's config.json; empty if there is none."""
    uri = storage.join(folder, "config.json")
    return storage.read_json(uri) if storage.exists(uri) else {}


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
