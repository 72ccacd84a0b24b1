"""The nodes of the cluster: their resources, a call on each of them, shared folders, and the network between them."""

import os
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from cluster.servers import free_port

Result = TypeVar("Result")
HEAD_RESOURCE = "node:__internal_head__"
SHARED_SECONDS = 60.0  # within which a node must look for a file; a node that does not respond is not reported


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    is_head: bool
    resources: dict[str, float] = field(compare=False)  # in total, by Ray's names

    @property
    def cpus(self) -> float:
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)

    def __str__(self) -> str:
        return f"{self.address} ({'head' if self.is_head else self.id[:6]})"


def nodes() -> list[Node]:
    """Return all nodes that are alive, the head first, or an empty list without a session."""
    ray: Any = sys.modules.get("ray")  # a process that has not imported Ray has no session
    if ray is None or not ray.is_initialized():
        return []
    alive = []
    for record in ray.nodes():
        if record["Alive"]:
            resources = record["Resources"]
            alive.append(Node(record["NodeID"], record["NodeManagerAddress"], HEAD_RESOURCE in resources, resources))
    return sorted(alive, key=lambda node: (not node.is_head, node.address, node.id))


def on_each(targets: list[Node], function: Callable[[Node], Result], timeout: float) -> dict[Node, Result | Exception]:
    """Call `function(node)` in a process on each node at the same time; return each node's result or error.

    If a node does not respond within `timeout` seconds, its error is a TimeoutError. The calls reserve no CPU, so they
    also run on nodes without CPUs for work and on nodes that are fully used.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(lambda node: function(node))  # so that `function` may be any callable, such as a partial
    calls = {
        node: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(node)
        for node in targets
    }
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout)
    results: dict[Node, Result | Exception] = {}
    for node, call in calls.items():
        try:
            results[node] = ray.get(call, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(call, force=True)
            results[node] = TimeoutError(f"no response within {timeout:g} s")
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            results[node] = cause if isinstance(cause, Exception) else error
    return results


def refuse_unshared(uris: Iterable[str]) -> None:
    """Check that each URI means the same place on all machines of the cluster. Object storage is not checked.

    A local folder is checked by a temporary file, which every node must see there.

    Raises:
        ValueError: a URI is a file or a folder of one machine; the message says what to set instead.
    """
    cluster_nodes = nodes()
    machines = len({node.address for node in cluster_nodes})
    if machines < 2:
        return
    for uri in uris:
        if uri.startswith("sqlite:"):
            raise ValueError(
                f"MLFLOW_TRACKING_URI={uri} is a file of one machine, and the cluster has {machines}: "
                "set it to a server's address (docs/cluster.md says how to start one)"
            )
        if "://" not in uri or uri.startswith("file://"):
            _refuse_unshared_folder(Path(uri.removeprefix("file://")), cluster_nodes)


def _refuse_unshared_folder(folder: Path, cluster_nodes: list[Node]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f"seen-by-all-nodes-{uuid.uuid4().hex}"
    probe.touch()
    try:
        results = on_each(cluster_nodes, lambda node: probe.exists(), SHARED_SECONDS)
    finally:
        probe.unlink()
    if without_probe := [str(node) for node, exists in results.items() if exists is False]:
        raise ValueError(
            f"store={folder} is not the same folder on {', '.join(without_probe)}: set ADMIRAL_STORE to object "
            "storage, or to a path that all nodes share"
        )


def all_reduce_bandwidth(members: list[Node], megabytes: int, timeout: float, use_gpu: bool) -> float:
    """Return the bus bandwidth of an all-reduce over all nodes in GB/s, of GPUs by NCCL or of CPUs by gloo.

    As NCCL defines it, the bus bandwidth is 2 (n - 1) / n times the bytes of the tensor, divided by the seconds of one
    all-reduce. Every node sends and receives `megabytes` MB of float32.

    Raises:
        RuntimeError: a node could not reach the others; the message is that node's error.
    """
    first = members[0]
    rendezvous = on_each([first], lambda node: f"tcp://{node.address}:{free_port(node.address)}", timeout)[first]
    if isinstance(rendezvous, Exception):
        raise RuntimeError(f"{first}: {rendezvous}")

    def measure(node: Node) -> float:
        import torch.distributed as dist

        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that has reserved none
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            init_method=rendezvous,
            rank=members.index(node),
            world_size=len(members),
            timeout=timedelta(seconds=timeout),
        )
        try:
            return _time_all_reduce(megabytes, "cuda" if use_gpu else "cpu")
        finally:
            dist.destroy_process_group()

    seconds = []
    for node, result in on_each(members, measure, timeout).items():
        if isinstance(result, Exception):
            raise RuntimeError(f"{node}: {result}")
        seconds.append(result)
    return 2 * (len(members) - 1) / len(members) * megabytes / 1e3 / max(seconds)


def _time_all_reduce(megabytes: int, device: str) -> float:
    """Return the mean seconds of ten all-reduces. Timer runs others before them, which open the connections."""
    import torch
    from torch.utils.benchmark import Timer

    values = torch.zeros(megabytes * 250_000, device=device)  # float32
    timer = Timer("all_reduce(values)", globals={"all_reduce": torch.distributed.all_reduce, "values": values})
    return timer.timeit(10).mean
