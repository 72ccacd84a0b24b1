"""CPUs and GPUs for workers: requests that no node can satisfy are refused, and waits are logged."""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from cluster.nodes import Node, nodes
from cluster.session import accelerator

WAIT_SECONDS = 30.0  # until the first log line about a wait; the pause then doubles each time
POLL_SECONDS = 0.5  # between two checks whether actors still wait
STATE_SECONDS = 10  # timeout of Ray's State API
NODE_GROUP = "ray.io/node-group"  # a label of nodes that Ray's autoscaler, its cluster launcher or KubeRay started

Resources = dict[str, float]

log = logging.getLogger(__name__)


def worker_resources(num_cpus: float, num_gpus: float) -> Resources:
    """Return the resources that one worker reserves, by Ray's names."""
    gpus = {"GPU": float(num_gpus)} if num_gpus else {}
    kind = {f"accelerator_type:{accelerator()}": 0.001} if num_gpus and accelerator() else {}
    return {"CPU": float(num_cpus)} | gpus | kind


def refuse_infeasible(resources: Resources, at_once: int = 1) -> None:
    """Check that the cluster can hold `at_once` workers at the same time, unless an autoscaler may add nodes.

    Raises:
        ValueError: it cannot, even if no other job runs; the message names the largest node.
    """
    candidates = [node for node in nodes() if node.resources.get("CPU")]
    if not candidates or _may_grow():  # if there is only the head, nodes have not joined yet
        return
    places = sum(_places(node, resources) for node in candidates)
    if places >= at_once:
        return
    if places:
        raise ValueError(
            f"all workers start together, each needs {_named(resources)} on one node, and the cluster has room for "
            f"{places} of {at_once}: lower --num-workers, or use a larger cluster"
        )
    largest = max(
        candidates, key=lambda node: [min(node.resources.get(n, 0), v) for n, v in reversed(resources.items())]
    )
    has = _named({name: largest.resources.get(name, 0) for name in resources})
    raise ValueError(
        f"a worker needs {_named(resources)} on one node, and the largest node, {largest}, has {has}: "
        "lower --num-threads or --num-gpus, or use a larger cluster"
    )


class WaitLog:
    """A log of what workers wait for, with pauses that double between the lines."""

    def __init__(self, resources: Resources) -> None:
        self._resources, self._next, self._pause = resources, time.monotonic() + WAIT_SECONDS, WAIT_SECONDS

    def update(self, waiting: int, count: int, otherwise: str) -> None:
        """Log a line if it is due. `otherwise` says what the job does while no worker has started."""
        if time.monotonic() < self._next:
            return
        consequence = "the others continue" if waiting < count else otherwise
        needs = _shortage(self._resources)
        log.warning("waiting for %d of %d workers: each needs %s; %s", waiting, count, needs, consequence)
        self._next, self._pause = time.monotonic() + self._pause, 2 * self._pause


def wait_for_room(count: int, resources: Resources, stop: Callable[[], bool]) -> bool:
    """Wait until the cluster has room for `count` workers at once; return False if `stop` returns True before.

    Meanwhile the request is in Ray's queue, where the autoscaler sees it, and the log says what the job waits for.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    request, wait_log = placement_group([resources] * count), WaitLog(resources)
    try:
        while not request.wait(timeout_seconds=1):
            if stop():
                return False
            wait_log.update(count, count, "the job starts when there is room for all of them")
        return True
    finally:
        remove_placement_group(request)


def report_waiting(actors: list[Any], resources: Resources, ended: threading.Event) -> None:
    """Log what actors wait for until all have started."""
    import ray

    waiting, wait_log = [actor.is_there.remote() for actor in actors], WaitLog(resources)
    while waiting and not ended.wait(POLL_SECONDS):
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        if waiting:
            wait_log.update(len(waiting), len(actors), "the job starts with the first of them")


def _places(node: Node, resources: Resources) -> int:
    """Return the number of workers that a node can hold if nothing else runs on it."""
    return int(min(node.resources.get(name, 0) // value for name, value in resources.items() if value))


def _may_grow() -> bool:
    import ray

    return any(NODE_GROUP in record.get("Labels", {}) for record in ray.nodes())


def _named(resources: Resources) -> str:
    counted = [f"{value:g} {name}s" for name, value in resources.items() if name in ("CPU", "GPU")]
    return " and ".join(counted) + "".join(f" of kind {n.split(':')[1]}" for n in resources if ":" in n)


def _shortage(resources: Resources) -> str:
    """Return as text what a worker needs, how much of it is free, and which jobs hold the rest."""
    import ray

    total, free, held = ray.cluster_resources(), ray.available_resources(), _held()
    parts = [f"{_named(resources)} on one node"]
    for kind in (name for name in ("CPU", "GPU") if name in resources):
        parts.append(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s are free")
        parts += [f"{job} holds {kinds[kind]:g} {kind}s" for job, kinds in held.items() if kinds[kind]]
    return ", ".join(parts)


def _held() -> dict[str, Counter[str]]:
    """Return the resources that each job holds, by the job's name, or nothing if there is no dashboard."""
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
    held: dict[str, Counter[str]] = {}
    for job_id, resources in [
        *((actor.job_id, actor.required_resources or {}) for actor in actors),
        *((group.creator_job_id, bundle["unit_resources"]) for group in groups for bundle in group.bundles or []),
    ]:
        held.setdefault(names.get(job_id, f"job {job_id}"), Counter()).update(resources)
    return held


def _job_name(job: Any) -> str:
    script = re.search(r"[\w.-]+\.py\b", job.entrypoint or "")
    return f"job {script[0] + ' ' if script else ''}({job.submission_id or job.job_id})"
