"""The pool on a cluster that grows and shrinks: nodes of this machine, with real ports, that come and are killed."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def grow_and_shrink() -> None:
    """Half of the pool has no room at first; a second node joins, the first one dies; all items are done once."""
    import ray
    from ray.cluster_utils import Cluster

    from cluster.workers import pool

    health = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    done, where = [], set()
    with pool(make_locator, 2) as workers:
        for item, node in workers.map(range(200)):
            done.append(item)
            where.add(node)
            if len(done) == 20:
                assert len(where) == 1
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100 << 20))
            if len(where) == 2 and len(nodes) == 2:
                os.kill(nodes[0].all_processes["raylet"][0].process.pid, signal.SIGKILL)
                nodes.append(None)
    assert sorted(done) == list(range(200)), "an item is missing or came twice"
    assert len(nodes) == 3, "the second node's worker never took part"
    print("grown and shrunk")
    ray.shutdown()
    cluster.shutdown()


def make_locator():  # type: ignore[no-untyped-def]
    """A worker that says on which node it works, and takes a tenth of a second for it."""
    import time

    import ray

    def work(_: int) -> str:
        time.sleep(0.1)
        return ray.get_runtime_context().get_node_id()

    return work


@pytest.mark.ray
@pytest.mark.slow
def test_workers_come_with_nodes_and_go_with_them(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from tests.chaos.test_elastic_pool import grow_and_shrink; grow_and_shrink()"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "grown and shrunk" in run.stdout, run.stderr[-3000:]
