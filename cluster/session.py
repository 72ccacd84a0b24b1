"""Connecting to Ray: a running cluster where there is one, else a local one that ends with the job."""

import contextlib
import json
import logging
import math
import os
import signal
import threading
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
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # for CPUs and GPUs; then `wait_for_room` waits
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints boxes although told to be silent
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` has every worker build an environment of its own
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # else gloo warns of workers whose end is told in one line of ours
    "PYTHONWARNINGS": "ignore",
}
for _name, _value in QUIET_ENVIRONMENT.items():  # here, since Ray reads some of them once, when it is imported
    os.environ.setdefault(_name, _value)

# Only for a local Ray of this job's own: a real cluster sets its mode, and is watched.
LOCAL_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_enable_metrics_collection": "0"}

# All of the driver's environment that anybody may read: Ray writes a runtime environment into logs and job metadata.
PUBLIC = ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS")
# What workers need besides. It may hold secrets, today's or those of a later SDK, so it goes from memory to memory.
PRIVATE_PREFIXES = ("AWS_", "HF_", "ADMIRAL_")
KEEPER = "ADMIRAL_ENVIRONMENT_KEEPER"  # names the actor that hands it to a worker
KEEPER_NAMESPACE = "admiral-environments"


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

    Uses the cluster that `RAY_ADDRESS` names (a submitted job has it set); `cluster.capacity` says what is waited for
    there. Without one, starts a local Ray and shuts it down at the end: its logical CPUs are the machine's, or as many
    as are wanted, and its object store has `object_store_memory` bytes. A session inside a session joins it. Until the
    process ends, SIGTERM raises KeyboardInterrupt.

    Raises:
        ConnectionError: the cluster cannot be reached, or turns away who has no token.
        RuntimeError: this machine alone has fewer GPUs than are wanted.
        ValueError: one of `shared` is a file or a folder of one machine, and the cluster has several.
    """
    if not num_cpus:
        yield
        return
    alone = not os.environ.get("RAY_ADDRESS")
    for name, value in ({"RAY_AUTH_MODE": "token"} if _has_token() else LOCAL_ENVIRONMENT if alone else {}).items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    if ray.is_initialized():
        refuse_unshared(shared)
        yield
        return
    options: dict = {"logging_level": logging.ERROR, "log_to_driver": False}
    private = {} if alone else _private_environment()  # the workers of our own Ray inherit it
    if alone:
        options |= {
            "address": "local",  # else it joins any cluster that `ray start` left its mark of on this machine
            "num_cpus": max(math.ceil(num_cpus), os.cpu_count() or 1),
            "object_store_memory": object_store_memory,
            "include_dashboard": False,
        }
    keeper = {KEEPER: f"keeper-{uuid.uuid4().hex}"} if private else {}
    _connect(runtime_env={"env_vars": _public_environment() | keeper}, **options)
    _interrupt_on_sigterm()
    kept = _keep(private, keeper[KEEPER]) if private else None
    if alone and (there := ray.cluster_resources().get("GPU", 0)) < num_gpus:
        ray.shutdown()
        advice = "ask for less, or submit it to a cluster"
        raise RuntimeError(f"this machine has {there:g} GPUs and this job wants {num_gpus:g}: {advice}")
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        refuse_unshared(shared)
        yield
    finally:
        del kept
        ray.shutdown()


def _has_token() -> bool:
    """Return whether there is a token for the cluster at RAY_ADDRESS; Ray itself looks for one only on its own."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return bool(os.environ.get("RAY_ADDRESS")) and ("RAY_AUTH_TOKEN" in os.environ or file.is_file())


def _connect(**options: Any) -> None:
    """Call `ray.init`, and keep Ray's messages about processes that ended off the terminal: what matters we say."""
    import ray

    try:
        ray.init(**options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        state = "the token that was found is not the cluster's" if _has_token() else "no token was found"
        raise ConnectionError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: the cluster does not answer, or asks for a token ({state}); "
            "check the address, and set RAY_AUTH_TOKEN or save the token as ~/.ray/auth_token "
            "(`ray get-auth-token` on the head prints it)"
        ) from error
    ray._private.worker._worker_logs_enabled = False  # `log_to_driver` leaves the raylets' messages on


def accelerator() -> str | None:
    """The kind of GPU that workers ask for, as Ray names it, by ADMIRAL_ACCELERATOR; None = any."""
    return os.environ.get("ADMIRAL_ACCELERATOR") or None


def _private_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PRIVATE_PREFIXES) and name != KEEPER}


def _public_environment() -> dict[str, str]:
    """Return the checkout's root on the workers' path, and the driver's settings of Python and threads.

    A submitted job has its working directory there already, and Ray passes on what its submission set: Ray refuses
    a variable that is set twice.
    """
    public = {name: os.environ[name] for name in PUBLIC if name in os.environ}
    if is_submitted():
        submitted = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]).get("runtime_env", {}).get("env_vars", {})
        return {name: value for name, value in public.items() if name not in submitted and name != "PYTHONPATH"}
    checkout = str(Path(__file__).resolve().parents[1])
    paths = [checkout, *filter(None, public.get("PYTHONPATH", "").split(os.pathsep))]
    return public | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _interrupt_on_sigterm() -> None:
    """Have SIGTERM end the job as Ctrl-C does, whatever it waits for; Ray's own handler exits with code 15."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


class _Keeper:
    """Holds the driver's private variables in its memory, and hands them to workers."""

    def __init__(self) -> None:
        self._variables: dict[str, str] = {}

    def keep(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def variables(self) -> dict[str, str]:
        return self._variables


def _keep(variables: dict[str, str], name: str) -> Any:
    """Return an actor of this name that knows the variables; it lives as long as the handle."""
    import ray

    options = {"name": name, "namespace": KEEPER_NAMESPACE, "max_concurrency": 100} | on_this_node()
    keeper: Any = ray.remote(_Keeper).options(**options).remote()
    # By a call, not by the constructor: Ray keeps a constructor's arguments with the actor's record.
    ray.get(keeper.keep.remote(variables))
    return keeper


def on_this_node() -> dict[str, Any]:
    """Return the options of a task or an actor that runs on the node of this process, on CPUs that this process has
    reserved, or on none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def receive_environment() -> None:
    """In a worker, take over the driver's private variables; elsewhere, and the second time, do nothing."""
    if name := os.environ.get(KEEPER):
        import ray

        keeper: Any = ray.get_actor(name, namespace=KEEPER_NAMESPACE)
        os.environ.update(ray.get(keeper.variables.remote()))
        del os.environ[KEEPER]


def address() -> str:
    """The address by which other processes of this machine join the session."""
    import ray

    return ray.get_runtime_context().gcs_address
