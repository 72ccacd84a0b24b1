"""CPUs and GPUs for workers: refuse requests that no node can satisfy, and log what workers wait for."""

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from cluster.nodes import Node, nodes

WAIT_SECONDS = 30.0  # until the first log line about a wait; the pause then doubles each time
POLL_SECONDS = 0.5  # between two checks whether actors still wait
STATE_SECONDS = 10  # timeout of Ray's State API
NODE_GROUP = "ray.io/node-group"  # a label of nodes that Ray's autoscaler, its cluster launcher or KubeRay started

Resources = dict[str, float]  # by Ray's names: CPU, GPU, accelerator_type:H100

log = logging.getLogger(__name__)


def worker_resources(num_cpus: float, num_gpus: float) -> Resources:
    """Return the resources that one worker reserves, by Ray's names."""
    resources = {"CPU": float(num_cpus)}
    if num_gpus:
        resources["GPU"] = float(num_gpus)
        if kind := os.environ.get("ADMIRAL_ACCELERATOR"):  # by Ray's name, such as H100
            resources[f"accelerator_type:{kind}"] = 0.001  # selects nodes of this kind; 1,000 workers fit on one
    return resources


def refuse_infeasible(resources: Resources, num_workers: int = 1) -> None:
    """Check that the cluster can hold `num_workers` workers at the same time, unless an autoscaler may add nodes.

    Raises:
        ValueError: it cannot, even if no other job runs; the message has the number of workers that it can hold, or
            the largest node.
    """
    candidates = [node for node in nodes() if node.resources.get("CPU")]
    if not candidates or _may_grow():  # without candidates, only the head has started, and nodes have yet to join
        return
    capacity = sum(  # of all nodes, if nothing else runs on them
        int(min(node.resources.get(name, 0) // value for name, value in resources.items() if value))
        for node in candidates
    )
    if capacity >= num_workers:
        return
    if capacity:
        raise ValueError(
            f"all workers start together, each needs {_describe(resources)} on one node, and the cluster has room for "
            f"{capacity} of {num_workers}: lower --num-workers, or use a larger cluster"
        )

    def usable(node: Node) -> list[float]:
        """Return how much of each resource a worker could use on a node, GPUs before CPUs."""
        return [min(node.resources.get(name, 0), value) for name, value in reversed(resources.items())]

    largest = max(candidates, key=usable)
    available = _describe({name: largest.resources.get(name, 0) for name in resources})
    raise ValueError(
        f"a worker needs {_describe(resources)} on one node, and the largest node, {largest}, has {available}: "
        "lower --num-threads or --num-gpus, or use a larger cluster"
    )


class WaitLog:
    """A log of what workers wait for. The pause between two lines doubles each time."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._due = time.monotonic() + WAIT_SECONDS  # time of the next line
        self._pause = WAIT_SECONDS  # between that line and the one after it

    def update(self, num_waiting: int, num_workers: int, if_all_wait: str) -> None:
        """Log a line if it is due. `if_all_wait` says what the job does while no worker has started."""
        if time.monotonic() < self._due:
            return
        consequence = "the others continue" if num_waiting < num_workers else if_all_wait
        needs = _shortage(self._resources)
        log.warning("waiting for %d of %d workers: each needs %s; %s", num_waiting, num_workers, needs, consequence)
        self._due, self._pause = time.monotonic() + self._pause, 2 * self._pause


def wait_for_room(num_workers: int, resources: Resources, stop: Callable[[], bool]) -> bool:
    """Wait until the cluster has room for all workers at once; return False if `stop` returns True before that.

    A placement group puts the request into Ray's queue, where the autoscaler sees it. It reserves nothing after this
    returns. Meanwhile the log says what the job waits for.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    request, wait_log = placement_group([resources] * num_workers), WaitLog(resources)
    try:
        while not request.wait(timeout_seconds=1):
            if stop():
                return False
            wait_log.update(num_workers, num_workers, "the job starts when there is room for all of them")
        return True
    finally:
        remove_placement_group(request)


def report_waiting(actors: list[Any], resources: Resources, ended: threading.Event) -> None:
    """Log what actors of a pool wait for, until all have started or `ended` is set."""
    import ray

    waiting, wait_log = [actor.node_name.remote() for actor in actors], WaitLog(resources)
    while waiting and not ended.wait(POLL_SECONDS):
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        if waiting:
            wait_log.update(len(waiting), len(actors), "the job starts with the first of them")


def _may_grow() -> bool:
    """Return whether an autoscaler may manage this cluster."""
    import ray

    return any(NODE_GROUP in record.get("Labels", {}) for record in ray.nodes())


def _describe(resources: Resources) -> str:
    """Return the resources as text: 2 CPUs and 1 GPUs of kind H100."""
    counts = [f"{value:g} {name}s" for name, value in resources.items() if name in ("CPU", "GPU")]
    kinds = [f" of kind {name.split(':')[1]}" for name in resources if ":" in name]
    return " and ".join(counts) + "".join(kinds)


def _shortage(resources: Resources) -> str:
    """Return as text what a worker needs, how much of it is free, and which jobs hold the rest."""
    import ray

    total, free, used = ray.cluster_resources(), ray.available_resources(), _used_by_job()
    parts = [f"{_describe(resources)} on one node"]
    for kind in (name for name in ("CPU", "GPU") if name in resources):
        parts.append(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s are free")
        parts += [f"{job} holds {counts[kind]:g} {kind}s" for job, counts in used.items() if counts[kind]]
    return ", ".join(parts)


def _used_by_job() -> dict[str, Counter[str]]:
    """Return the resources that each job holds, by the job's name, or an empty dict if there is no dashboard."""
    import ray
    from ray.util.state import list_actors, list_jobs, list_placement_groups

    address = ray.get_runtime_context().gcs_address
    options: dict[str, Any] = {"address": address, "detail": True, "timeout": STATE_SECONDS, "limit": 10_000}
    try:
        names = {job.job_id: _job_name(job) for job in list_jobs(**options)}
        actors = list_actors(filters=[("state", "=", "ALIVE")], **options)
        groups = list_placement_groups(filters=[("state", "=", "CREATED")], **options)
    except Exception as error:  # noqa: BLE001 - the log line then says only what is free
        log.debug("Ray's State API does not respond: %s", error)
        return {}
    used: dict[str, Counter[str]] = {}
    for job_id, resources in [
        *((actor.job_id, actor.required_resources or {}) for actor in actors),
        *((group.creator_job_id, bundle["unit_resources"]) for group in groups for bundle in group.bundles or []),
    ]:
        used.setdefault(names.get(job_id, f"job {job_id}"), Counter()).update(resources)
    return used


def _job_name(job: Any) -> str:
    """Return a job's script and id, without its arguments, which may contain secrets."""
    script = re.search(r"[\w.-]+\.py\b", job.entrypoint or "")
    return f"job {script[0] + ' ' if script else ''}({job.submission_id or job.job_id})"
