"""Connecting to Ray: a running cluster where there is one, else a local one that ends with the job."""

import contextlib
import json
import logging
import math
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.nodes import refuse_unshared

# A user can do nothing about what these would print, and nothing leaves the machine unasked.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every worker's print appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a worker's end is seen; the default is 2 s
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints boxes although told to be silent
    "PYTHONWARNINGS": "ignore",
}

# Only for a local Ray of this job's own: a real cluster sets its mode, and is watched.
LOCAL_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_enable_metrics_collection": "0"}

log = logging.getLogger(__name__)

# What every worker needs of the driver's environment.
FORWARDED_PREFIXES = ("AWS_", "HF_", "ADMIRAL_", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS")
# Of these, what nobody may read: it never enters a runtime environment, which Ray writes into logs and job metadata.
SECRETS = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
)
KEEPER = "ADMIRAL_SECRETS_KEEPER"  # names the actor that hands them to a worker
KEEPER_NAMESPACE = "admiral-secrets"


def is_submitted() -> bool:
    """True inside a job that `ray job submit` started: its directory is a copy that goes away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextlib.contextmanager
def session(
    num_cpus: float = 0,
    object_store_memory: int = 300 << 20,
    num_gpus: float = 0,
    shared: Iterable[str] = (),
) -> Iterator[None]:
    """Connect to Ray, or start a local cluster, and check that it can run the job; with 0 CPUs Ray is not used.

    The job needs so many CPUs and GPUs at once, and `shared` are URIs that all nodes must see alike.

    Uses the cluster that `RAY_ADDRESS` names (a submitted job has it set), and says so where it is smaller: the job
    then waits for the autoscaler. Without one, starts a local Ray and shuts it down at the end: its logical CPUs are
    the machine's, or as many as are wanted, and its object store has `object_store_memory` bytes. A session inside a
    session joins it.

    Raises:
        RuntimeError: this machine alone has fewer GPUs than are wanted.
        ValueError: one of `shared` is a file or a folder of one machine, and the cluster has several.
    """
    if not num_cpus:
        yield
        return
    for name, value in (QUIET_ENVIRONMENT | ({} if "RAY_ADDRESS" in os.environ else LOCAL_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    if ray.is_initialized():
        refuse_unshared(shared)
        yield
        return
    options: dict = {"logging_level": logging.ERROR, "log_to_driver": False}
    secrets = {name: os.environ[name] for name in SECRETS if name in os.environ}
    alone = not os.environ.get("RAY_ADDRESS")
    if alone:
        secrets = {}  # our own workers inherit them
        options |= {
            "address": "local",  # else it joins any cluster that `ray start` left its mark of on this machine
            "num_cpus": max(math.ceil(num_cpus), os.cpu_count() or 1),
            "object_store_memory": object_store_memory,
            "include_dashboard": False,
        }
    keeper = {KEEPER: f"keeper-{uuid.uuid4().hex}"} if secrets else {}
    ray.init(runtime_env={"env_vars": _forwarded_environment() | keeper}, **options)
    kept = _keep(secrets, keeper[KEEPER]) if secrets else None
    for kind, wanted in {"CPU": num_cpus, "GPU": num_gpus}.items():
        if (there := ray.cluster_resources().get(kind, 0)) < wanted and alone:
            ray.shutdown()
            advice = "ask for less, or submit it to a cluster"
            raise RuntimeError(f"this machine has {there:g} {kind}s and this job wants {wanted:g}: {advice}")
        if there < wanted:
            words = "the cluster has %g %ss and this job wants %g: it waits until more nodes come"
            log.warning(words, there, kind, wanted)
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        refuse_unshared(shared)
        yield
    finally:
        del kept
        ray.shutdown()


def accelerator() -> str | None:
    """The kind of GPU that workers ask for, as Ray names it, by ADMIRAL_ACCELERATOR; None = any."""
    return os.environ.get("ADMIRAL_ACCELERATOR") or None


def _forwarded_environment() -> dict[str, str]:
    """The checkout's root on the workers' path, and the driver's storage settings.

    A submitted job has its working directory there already, and what its submission set travels by itself: Ray
    refuses to be told it twice.
    """
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_PREFIXES)}
    forwarded = {name: value for name, value in forwarded.items() if name not in SECRETS}
    if is_submitted():
        told = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]).get("runtime_env", {}).get("env_vars", {})
        return {name: value for name, value in forwarded.items() if name not in told and name != "PYTHONPATH"}
    checkout = str(Path(__file__).resolve().parents[1])
    paths = [checkout, *filter(None, forwarded.get("PYTHONPATH", "").split(os.pathsep))]
    forwarded["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return forwarded


class _Keeper:
    """Holds the driver's secrets in its memory, and hands them to workers."""

    def __init__(self) -> None:
        self._secrets: dict[str, str] = {}

    def keep(self, secrets: dict[str, str]) -> None:
        self._secrets = secrets

    def tell(self) -> dict[str, str]:
        return self._secrets


def _keep(secrets: dict[str, str], name: str) -> Any:
    """An actor of this name that knows the secrets; it lives as long as the handle."""
    import ray

    options = {"name": name, "namespace": KEEPER_NAMESPACE, "max_concurrency": 100} | beside_driver()
    keeper: Any = ray.remote(_Keeper).options(**options).remote()
    # By a call, not by the constructor: Ray keeps a constructor's arguments with the actor's record.
    ray.get(keeper.keep.remote(secrets))
    return keeper


def beside_driver() -> dict[str, Any]:
    """Options of an actor that must live as long as this process: on its node, whatever happens to others."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def receive_secrets() -> None:
    """In a worker, take over the driver's credentials; elsewhere, and the second time, do nothing."""
    if name := os.environ.get(KEEPER):
        import ray

        keeper: Any = ray.get_actor(name, namespace=KEEPER_NAMESPACE)
        os.environ.update(ray.get(keeper.tell.remote()))
        del os.environ[KEEPER]


def address() -> str:
    """The address by which other processes of this machine join the session."""
    import ray

    return ray.get_runtime_context().gcs_address
