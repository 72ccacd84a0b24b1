"""The base class of all job configs, and the check that an output folder belongs to a config."""

import os
from typing import Annotated, Any, ClassVar, Self, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel, Field, TypeAdapter

from cluster.session import is_submitted
from orchestrator import storage
from orchestrator.redaction import redact_tree

# Summaries of the presets that every job has.
DIGITS = "the quickstart's 1,797 scanned digits, small enough for two cores"
IMAGES = "your own images"
IMAGES_CPU = f"{IMAGES} at 16 pixels, on two CPU cores"
TWO_CORES = {"num_gpus": 0, "num_workers": 2}
IMAGENET = "ImageNet"
SIZES = (64, 128, 256, 512)  # pixels of the ImageNet presets

T = TypeVar("T")

# The mark of a field that does not change results, so that it may change at every restart. --help shows it.
MARK = "operational"
Operational = Annotated[T, MARK]
_ANY = TypeAdapter(Any)
NOT_COMPARED = {"store", "output", "dry_run"}  # a folder may be moved


class JobConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The fields of every job.

    --help shows the comment behind a field as its text, and a comment on the line above as a heading.
    """

    remedy: ClassVar[str] = "choose another --output or the same config"  # for a folder with another config

    # Every job
    store: Operational[str] = Field(
        default_factory=lambda: os.environ.get("ADMIRAL_STORE", "runs")
    )  # folder or URI to which paths are relative; default: $ADMIRAL_STORE, else runs
    tracking: Operational[bool] = True  # log to MLflow as well as to files in the output folder
    dry_run: bool = False  # print the resolved config and what the job would read, write and cost, then exit

    @property
    def operational(self) -> frozenset[str]:
        """Return the fields that may differ when the job is started again in the same folder."""
        return frozenset(name for name, field in type(self).model_fields.items() if MARK in field.metadata)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fields that change results, as JSON values."""
        return self.model_dump(mode="json", exclude=NOT_COMPARED | self.operational)

    def starting_from(self, preset: Self) -> Self:
        """Return the config to which the command line is applied: `preset`, or settings that this config refers to.

        An example is a generation with `--from-search`, which starts from the best settings of a search.
        """
        return preset

    def path(self, path: str) -> str:
        """Return the URI or the absolute path of `path`, which may be relative to the store, by `storage.resolve`.

        Raises:
            ValueError: path and store are relative and this is a submitted job, which runs in a temporary copy of the
                checkout.
        """
        if not storage.is_absolute(path):
            if not storage.is_absolute(self.store) and is_submitted():
                raise ValueError(
                    f"store={self.store} is relative, and this job runs in a temporary copy of the checkout; "
                    "set ADMIRAL_STORE or --store to a URI or to an absolute path that all nodes see"
                )
            path = storage.join(storage.resolve(self.store), path)
        return storage.resolve(path)

    @property
    def shared(self) -> tuple[str, ...]:
        """Return the URIs that must be the same on all nodes: the store and, if it is used, the tracking server."""
        return self.path(""), *([tracking_uri(self)] if self.tracking else [])


def experiment_name() -> str:
    """Return the MLflow experiment of all jobs: MLFLOW_EXPERIMENT_NAME, else admiral."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "admiral"


def tracking_uri(config: JobConfig) -> str:
    """Return MLFLOW_TRACKING_URI, or by default the URI of a SQLite file in a local store.

    Raises:
        ValueError: the store cannot have the file, or the variable has a relative path in a submitted job.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        root = storage.local_path(config.path(""))
        if root is None or "?" in root or unquote(root) != root:  # SQLAlchemy would open another file
            raise ValueError(
                f"store={config.store} is not a local folder, or its path has a ? or a %, so MLFLOW_TRACKING_URI must "
                "be set; or pass --no-tracking"
            )
        os.makedirs(root, exist_ok=True)
        return f"sqlite:///{os.path.join(root, 'mlflow.db')}"
    if is_submitted() and uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={uri} is a relative path, and this job runs in a temporary copy of the checkout; "
            "set it to the URI of a server or to sqlite:////ABSOLUTE/PATH"
        )
    return uri


NOTES = {"files", "parent", "extended"}  # fields of config.json that are recorded but not compared


def check_config(folder: str, config: JobConfig, finished: bool, **facts: Any) -> dict[str, Any]:
    """Check that the finished work of a folder was made with this config; return the folder's config.json, or {}.

    finished: whether the folder has finished work. facts: what else changes results, such as hashes of files; a fact
    with the name of a field replaces that field.

    Raises:
        ValueError: the finished work was made with another config; the message names the fields that differ.
    """
    stored = read_config(folder)
    changes = _changes(stored, config, facts) if stored else ""
    if finished and changes:
        raise ValueError(
            f"{folder} was made with another config ({changes}); only fields that --help marks [operational] may "
            f"change: {config.remedy}"
        )
    return stored


def check_or_write_config(
    folder: str, config: JobConfig, finished: bool, notes: dict[str, Any] | None = None, **facts: Any
) -> None:
    """Call `check_config`, and write config.json if the folder has no finished work.

    notes: written into config.json and not compared, such as the weight file that was chosen for each path.
    """
    stored = check_config(folder, config, finished, **facts)
    if finished and stored:
        return
    if stored and (changes := _changes(stored, config, facts)):
        print(f"{folder} has no finished work, so its config is replaced ({changes})")
    storage.write_json(storage.join(folder, "config.json"), _compared(config, facts) | (notes or {}))


def _compared(config: JobConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the compared values, redacted by patterns only, so that they do not depend on the environment."""
    return redact_tree(config.fingerprint() | facts, by_environment=False)


def _changes(stored: dict[str, Any], config: JobConfig, facts: dict[str, Any]) -> str:
    """Return how a config.json differs from a config in the values that are compared."""
    ignored = (NOTES | NOT_COMPARED | config.operational) - facts.keys()
    recorded = {name: value for name, value in _with_defaults(stored, config).items() if name not in ignored}
    return differences(redact_tree(recorded, by_environment=False), _compared(config, facts))


def _with_defaults(stored: dict[str, Any], config: BaseModel) -> dict[str, Any]:
    """Return the values of a config.json, and defaults for fields that the code did not have when it was written."""
    compared = config.fingerprint() if isinstance(config, JobConfig) else config.model_dump(mode="json")
    filled = dict(stored)
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name not in compared:
            continue
        if name not in stored and not field.is_required():
            filled[name] = _ANY.dump_python(field.get_default(call_default_factory=True), mode="json")
        elif isinstance(value, BaseModel) and isinstance(stored.get(name), dict):
            filled[name] = _with_defaults(stored[name], value)
    return filled


def noted_files(folder: str) -> dict[str, str]:
    """Return the weight files that the first attempt in a folder chose, by their paths in its config."""
    return read_config(folder).get("files", {})


def read_config(folder: str) -> dict[str, Any]:
    """Return the folder's config.json, or {}."""
    uri = storage.join(folder, "config.json")
    return storage.read_json(uri) if storage.exists(uri) else {}


def differences(stored: dict[str, Any], requested: dict[str, Any]) -> str:
    """Return the values in which two nested dicts differ, as `seed: 1 before, 2 now`; "" if they are equal."""
    before, now = flatten(stored), flatten(requested)
    differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name}: {before.get(name)} before, {now.get(name)} now" for name in differing)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict with dotted names as keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
