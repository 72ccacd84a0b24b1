"""Room for the workers of a pool: what no node can ever hold is refused, and what is waited for is logged."""

import logging
import threading
from typing import Any

from cluster.nodes import nodes

WAIT_SECONDS = 30.0  # until the log first says what is waited for; the pause then doubles each time
NODE_GROUP = "ray.io/node-group"  # a label of nodes that Ray's autoscaler, its cluster launcher or KubeRay started

log = logging.getLogger(__name__)


def refuse_infeasible(num_cpus: float, num_gpus: float) -> None:
    """Check that some node of the cluster can hold one worker, unless nodes may still come.

    Raises:
        ValueError: no node has so many CPUs and GPUs; the message names the largest node.
    """
    there = [node for node in nodes() if node.cpus]
    if not there or _may_grow():  # where only the head is there, nodes are still to come
        return
    if not any(node.cpus >= num_cpus and node.gpus >= num_gpus for node in there):
        largest = max(there, key=lambda node: (min(node.gpus, num_gpus), node.cpus))
        raise ValueError(
            f"a worker needs {_named(num_cpus, num_gpus)} on one node, and the largest node, {largest}, has "
            f"{_named(largest.cpus, largest.gpus)}: lower --num-threads or --num-gpus, or use a larger cluster"
        )


def report_waiting(actors: list[Any], num_cpus: float, num_gpus: float, ended: threading.Event) -> None:
    """Log, at first after 30 s and then more and more seldom, what actors wait for; return when all have started."""
    import ray

    waiting = [actor.is_there.remote() for actor in actors]
    pause = WAIT_SECONDS
    while waiting and not ended.wait(pause):
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        if waiting:
            free = _free("CPU") + (f" and {_free('GPU')}" if num_gpus else "")
            rest = "the others go on" if len(waiting) < len(actors) else "the job starts with the first of them"
            needs = _named(num_cpus, num_gpus)
            counts = f"{len(waiting)} of {len(actors)} workers"
            log.warning("waiting for %s: each needs %s on one node, %s; %s", counts, needs, free, rest)
        pause *= 2


def _may_grow() -> bool:
    import ray

    return any(NODE_GROUP in record.get("Labels", {}) for record in ray.nodes())


def _named(num_cpus: float, num_gpus: float) -> str:
    return f"{num_cpus:g} CPUs and {num_gpus:g} GPUs"


def _free(kind: str) -> str:
    import ray

    return f"{ray.available_resources().get(kind, 0):g} of {ray.cluster_resources().get(kind, 0):g} {kind}s are free"
