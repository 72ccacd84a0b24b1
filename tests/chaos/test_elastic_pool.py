"""The worker pool on a cluster whose nodes, which are local processes, are added and killed."""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.search import evaluator, job
from orchestrator.search.config import SearchConfig
from orchestrator.search.space import SpaceConfig
from tests.chaos.nodes import add_node, head_alone, kill
from tests.orchestrator.digits import digits
from tests.orchestrator.networks import CLASSIFIER, UNET, save_network

ROOT = Path(__file__).resolve().parents[2]
DRAWN_BEFORE = 4  # batches, before the second node joins


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Yield a cluster without work nodes, and connect to it."""
    import ray

    with head_alone() as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
        ray.shutdown()


def grow_and_shrink() -> None:
    """Start a pool of two on one CPU, add a second node, kill the first, and check that all items are done once."""
    from cluster.workers import pool

    done, used_nodes = [], set()
    with connected() as cluster, contextlib.ExitStack() as stack:
        nodes = [add_node(cluster, num_cpus=1)]
        workers = stack.enter_context(pool(make_locator, 2))
        for item, node in workers.map(range(200)):
            done.append(item)
            used_nodes.add(node)
            if len(done) == 20:
                assert len(used_nodes) == 1
                nodes.append(add_node(cluster, num_cpus=1))
            if len(used_nodes) == 2 and len(nodes) == 2:
                kill(nodes[0])
                nodes.append(None)
    assert sorted(done) == list(range(200)), "an item is missing or duplicated"
    assert len(nodes) == 3, "the worker of the second node did nothing"
    print("grown and shrunk")


def make_locator():  # type: ignore[no-untyped-def]
    """Return a worker that needs 0.1 s for an item and returns the id of its node."""
    import time

    import ray

    def work(_: int) -> str:
        time.sleep(0.1)
        return ray.get_runtime_context().get_node_id()

    return work


def search_while_nodes_change(store: str) -> None:
    """Search on one node, add a second one, and kill the first."""
    log = Path(store, "log")
    job.make_worker = partial(make_waiting_worker, str(log))
    with connected() as cluster:
        first = add_node(cluster, num_cpus=2, num_gpus=1)  # the GPU exists by name only; one worker fits on a node
        with ThreadPoolExecutor(1) as thread:
            searching = thread.submit(job.search, search_config(store, "elastic", 2, num_gpus=1))
            while len(drawn(log)) < DRAWN_BEFORE and not searching.done():
                time.sleep(0.1)
            add_node(cluster, num_cpus=2, num_gpus=1)
            while len(set(drawn(log))) < 2 and not searching.done():
                time.sleep(0.1)
            kill(first)
            Path(store, "killed").touch()
            searching.result()
    print("searched")


def drawn(log: Path) -> list[str]:
    """Return the node of each batch that has started."""
    return log.read_text().split() if log.exists() else []


def make_waiting_worker(log: str, config: SearchConfig) -> Callable[[evaluator.Block], evaluator.BlockResult]:
    """Return the real worker, which logs its node and, after DRAWN_BEFORE batches, waits for the kill."""
    import ray

    real = evaluator.make_worker(config.model_copy(update={"num_gpus": 0}))  # the GPU exists by name only

    def work(block: evaluator.Block) -> evaluator.BlockResult:
        with Path(log).open("a") as file:  # one short line: appended whole
            file.write(f"{ray.get_runtime_context().get_node_id()}\n")
        while len(drawn(Path(log))) >= DRAWN_BEFORE and not Path(log).with_name("killed").exists():
            time.sleep(0.1)
        return real(block)

    return work


def search_config(store: str, output: str, workers: int, num_gpus: float = 0) -> SearchConfig:
    return SearchConfig(
        store=store, weights=("unet.safetensors",), classifier="classifier.safetensors", reference="digits",
        output=output, space=SpaceConfig(scales=(0.0, 2.0), num_steps=(2, 3, 4)), rungs=(32, 160), trials=12,
        round_size=6, batch_size=32, num_workers=workers, num_gpus=num_gpus,
    )  # fmt: skip


def run(call: str) -> str:
    """Call a function of this module in its own process, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"from tests.chaos import test_elastic_pool as t; t.{call}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_the_pool_grows_and_shrinks_with_the_nodes() -> None:
    assert "grown and shrunk" in run("grow_and_shrink()")


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_survives_the_loss_of_its_first_node(tmp_path: Path) -> None:
    store = str(tmp_path)
    prepare(digits(store))
    for name, architecture in (("unet.safetensors", UNET), ("classifier.safetensors", CLASSIFIER)):
        save_network(store, name, architecture)
    # The GPUs of the nodes exist by name only, so the features of the reference are extracted here.
    evaluator.reference_of(search_config(store, "elastic", 0), UNET.image_size, num_workers=0)
    assert "searched" in run(f"search_while_nodes_change({store!r})")
    first, *_, last = nodes = drawn(tmp_path / "log")
    print(f"{len(nodes)} batches started, {nodes.count(first)} of them on the first node")
    assert len(set(nodes)) == 2 and nodes.count(first) < nodes.count(last)
    undisturbed = storage.read_json(job.search(search_config(store, "undisturbed", 0)))
    assert storage.read_json(f"{store}/elastic/search.json") == undisturbed
