"""Clusters of several nodes, which are local processes, and the loss of a node.

A node is lost by killing its raylet. Its workers notice this only later.
"""

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests import servers
from tests.chaos.audit import parse_audit_name
from tests.chaos.proxy import Proxy
from tests.chaos.trainings import CHECKPOINT, start_job

HEALTH_CHECKS = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 2}


@contextlib.contextmanager
def head_alone() -> Iterator[Any]:
    """Yield a cluster that has only a head without CPUs. It detects dead nodes within seconds."""
    from ray.cluster_utils import Cluster

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")))  # short, for sockets
        (folder / "ray").mkdir()
        stack.enter_context(servers.environment(RAY_TMPDIR=str(folder), RAY_AUTH_MODE="disabled"))
        logging.getLogger("ray").setLevel(logging.ERROR)
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": HEALTH_CHECKS})
        stack.callback(cluster.shutdown)
        yield cluster


def add_node(cluster: Any, num_cpus: int, num_gpus: int = 0) -> Any:
    return cluster.add_node(num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=100 << 20)


def kill(node: Any) -> None:
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def lose_a_node(argv: list[str], proxy: Proxy) -> int:
    """Train by the job on two nodes; kill one in the middle of a step, add another, and return the number of kills."""
    rule = proxy.add("hold", "PUT", rf"/{3 * CHECKPOINT:012d}-0001-of-0002-process-", times=1)
    with head_alone() as cluster, servers.environment(RAY_ADDRESS=cluster.address):
        for _ in range(2):
            add_node(cluster, num_cpus=2)  # for one training worker
        job = start_job(argv)
        try:
            request = rule.wait(180)
            worker = parse_audit_name(request.target) if request else None
            assert worker is not None, "the training did not reach the third checkpoint"
            raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes}
            (lost,) = raylets & {parent.pid for parent in psutil.Process(worker.process).parents()}
            os.kill(lost, signal.SIGKILL)
            add_node(cluster, num_cpus=2)
            proxy.remove(rule)
            output, _ = job.communicate(timeout=400)
        finally:
            job.kill()
    assert job.returncode == 0, output[-3000:]
    return 1
