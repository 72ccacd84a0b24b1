"""Connections to Ray: to a running cluster, or to a local one that ends with the job."""

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

# Settings of Ray and gloo for every process: no usage reports, fewer messages, earlier checks.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every worker's print appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default notices a dead worker only after 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # then `capacity.wait_for_room` waits again
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints tables although verbose=0
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every worker of `uv run` builds an environment
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # else gloo warns of dead workers, which we report in one line
    "PYTHONWARNINGS": "ignore",
}
for _name, _value in QUIET_ENVIRONMENT.items():  # at import, because Ray reads some of them when it is imported
    os.environ.setdefault(_name, _value)

# For a local Ray only. A real cluster sets its own authentication mode and collects metrics.
LOCAL_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_enable_metrics_collection": "0"}

# Variables that go into the runtime environment, which Ray writes into logs and job metadata.
PUBLIC = ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS")
# Prefixes of variables that workers need as well. They may be secret, so an actor passes them on from its memory.
PRIVATE_PREFIXES = ("AWS_", "HF_", "ADMIRAL_")
KEEPER = "ADMIRAL_ENVIRONMENT_KEEPER"  # environment variable with the name of that actor
KEEPER_NAMESPACE = "admiral-environments"


def is_submitted() -> bool:
    """Return whether `ray job submit` started this job, so that its directory is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextlib.contextmanager
def session(
    num_cpus: float = 0,
    object_store_memory: int = 300 << 20,
    num_gpus: float = 0,
    shared: Iterable[str] = (),
) -> Iterator[None]:
    """Connect to Ray, or start a local cluster, and check that it can run the job. With 0 CPUs, do not use Ray.

    The session uses the cluster at `RAY_ADDRESS`, which is set in a submitted job. Otherwise it starts a local Ray and
    shuts it down at the end. A session within a session joins it. Until the process ends, SIGTERM raises
    KeyboardInterrupt.

    num_cpus, num_gpus: what the job uses at the same time. A local Ray has at least this many logical CPUs.
    object_store_memory: bytes of the object store of a local Ray.
    shared: URIs that must mean the same place on all nodes.

    Raises:
        ConnectionError: the cluster cannot be reached, or it rejects the token.
        RuntimeError: there is no cluster, and this machine has fewer GPUs.
        ValueError: one of `shared` is a file or a folder of one machine, and the cluster has several.
    """
    if not num_cpus:
        yield
        return
    is_local = not os.environ.get("RAY_ADDRESS")
    if is_local:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    elif _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # without this, Ray does not look for a token
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    if ray.is_initialized():
        refuse_unshared(shared)
        yield
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    private = {} if is_local else _private_environment()  # workers of a local Ray inherit the environment
    if is_local:
        options |= {
            "address": "local",  # else Ray joins a cluster that `ray start` has started on this machine
            "num_cpus": max(math.ceil(num_cpus), os.cpu_count() or 1),
            "object_store_memory": object_store_memory,
            "include_dashboard": False,
        }
    variables = _public_environment()
    if private:
        variables[KEEPER] = f"keeper-{uuid.uuid4().hex}"
    _connect(runtime_env={"env_vars": variables}, **options)
    _interrupt_on_sigterm()
    keeper = _start_keeper(variables[KEEPER], private) if private else None
    if is_local and (available := ray.cluster_resources().get("GPU", 0)) < num_gpus:
        ray.shutdown()
        advice = "lower --num-gpus or --num-workers, or submit the job to a cluster"
        raise RuntimeError(f"this machine has {available:g} GPUs and this job needs {num_gpus:g}: {advice}")
    for name in ("ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        refuse_unshared(shared)
        yield
    finally:
        del keeper  # ends the actor, which lives as long as its handle
        ray.shutdown()


def _has_token() -> bool:
    """Return whether there is a token where Ray looks for one."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return "RAY_AUTH_TOKEN" in os.environ or file.is_file()


def _connect(**options: Any) -> None:
    """Call `ray.init`, and silence Ray's messages about processes that ended, because Admiral logs its own.

    Raises:
        ConnectionError: the cluster cannot be reached, or it rejects the token.
    """
    import ray

    try:
        ray.init(**options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        state = "the token that was found is not the cluster's" if _has_token() else "no token was found"
        raise ConnectionError(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: the cluster does not respond, or needs a token ({state}); "
            "check the address, and set RAY_AUTH_TOKEN or save the token as ~/.ray/auth_token "
            "(`ray get-auth-token` on the head prints it)"
        ) from error
    ray._private.worker._worker_logs_enabled = False  # for the raylets, which `log_to_driver=False` does not silence


def _private_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PRIVATE_PREFIXES) and name != KEEPER}


def _public_environment() -> dict[str, str]:
    """Return the public variables for the workers, with the root of the checkout in PYTHONPATH.

    A submitted job has its working directory in the path already. Ray passes on the variables that the submission set,
    and rejects a variable that is set twice.
    """
    public = {name: os.environ[name] for name in PUBLIC if name in os.environ}
    if is_submitted():
        submitted = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]).get("runtime_env", {}).get("env_vars", {})
        return {name: value for name, value in public.items() if name not in submitted and name != "PYTHONPATH"}
    checkout = str(Path(__file__).resolve().parents[1])
    paths = [checkout, *filter(None, public.get("PYTHONPATH", "").split(os.pathsep))]
    return public | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _interrupt_on_sigterm() -> None:
    """Let SIGTERM end the job like Ctrl-C, whatever it waits for. Ray's own handler would exit with code 15."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


class _Keeper:
    """An actor that holds the driver's private variables in its memory for the workers."""

    def __init__(self) -> None:
        self._variables: dict[str, str] = {}

    def keep(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def variables(self) -> dict[str, str]:
        return self._variables


def _start_keeper(name: str, variables: dict[str, str]) -> Any:
    """Return a handle on a new actor that holds the variables. The actor ends when the handle is deleted."""
    import ray

    options = {"name": name, "namespace": KEEPER_NAMESPACE, "max_concurrency": 100} | on_this_node()
    keeper: Any = ray.remote(_Keeper).options(**options).remote()
    # Passed by a call rather than to the constructor, because Ray stores the arguments of constructors.
    ray.get(keeper.keep.remote(variables))
    return keeper


def on_this_node() -> dict[str, Any]:
    """Return the options for a task or an actor that runs on the node of this process and reserves no CPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def receive_environment() -> None:
    """Set the driver's private variables in a worker. In the driver, and when called again, do nothing."""
    if name := os.environ.get(KEEPER):
        import ray

        keeper: Any = ray.get_actor(name, namespace=KEEPER_NAMESPACE)
        os.environ.update(ray.get(keeper.variables.remote()))
        os.environ.pop(KEEPER, None)  # another thread may have done the same meanwhile


def address() -> str:
    """Return the address by which other processes of this machine join the session."""
    import ray

    return ray.get_runtime_context().gcs_address
