"""Two jobs on one cluster both make progress, or one logs what it waits for. Infeasible requests are refused."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster import capacity
from cluster.capacity import refuse_infeasible, worker_resources
from cluster.nodes import Node
from cluster.session import LOCAL_ENVIRONMENT, QUIET_ENVIRONMENT, address
from cluster.stream import stream
from cluster.trainer import WorkerContext, run_workers
from cluster.workers import map_items

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 120  # seconds; generous, because the machine may be loaded


def node(name: str, **resources: float) -> Node:
    return Node(name * 20, f"10.0.0.{len(name)}", False, resources)


@pytest.mark.parametrize(
    ("cpus", "gpus", "at_once", "message"),
    [
        (2, 0, 1, "a worker needs 2 CPUs on one node, and the largest node, .*, has 1 CPUs"),
        (1, 1, 1, "a worker needs 1 CPUs and 1 GPUs on one node, and the largest node, .*, has 1 CPUs and 0 GPUs"),
        (1, 0, 3, "has room for 2 of 3"),
        (0.5, 0, 4, ""),
    ],
)
def test_infeasible_requests_are_refused(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, at_once: int, message: str
) -> None:
    monkeypatch.setattr(capacity, "nodes", lambda: [node("h"), node("a", CPU=1.0), node("b", CPU=1.0)])
    monkeypatch.setattr(capacity, "_may_grow", lambda: False)
    if not message:
        refuse_infeasible(worker_resources(cpus, gpus), at_once)
        return
    with pytest.raises(ValueError, match=message):
        refuse_infeasible(worker_resources(cpus, gpus), at_once)
    monkeypatch.setattr(capacity, "_may_grow", lambda: True)
    refuse_infeasible(worker_resources(cpus, gpus), at_once)


def test_a_kind_of_gpu_that_no_node_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "nodes", lambda: [node("a", CPU=8.0, GPU=8.0, **{"accelerator_type:A100": 1.0})])
    monkeypatch.setattr(capacity, "_may_grow", lambda: False)
    monkeypatch.setenv("ADMIRAL_ACCELERATOR", "A100")
    refuse_infeasible(worker_resources(1, 1), num_workers=8)
    monkeypatch.setenv("ADMIRAL_ACCELERATOR", "H100")
    with pytest.raises(ValueError, match="1 GPUs of kind H100"):
        refuse_infeasible(worker_resources(1, 1))


@pytest.mark.ray
def test_infeasible_workers_of_pools_and_trainings_are_refused_at_once(ray_session: None) -> None:
    for cpus, gpus in ((5, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"on one node, and the largest node, .*, has 4 CPUs"):
            list(map_items(make_nothing, range(3), num_workers=1, num_cpus=cpus, num_gpus=gpus))
        with pytest.raises(ValueError, match=r"on one node, and the largest node, .*, has 4 CPUs"):
            run_workers(report_once, 1, lambda record: None, num_cpus=cpus, num_gpus=gpus)
    with pytest.raises(ValueError, match="room for 2 of 3"):
        run_workers(report_once, 3, lambda record: None, num_cpus=2)


def make_nothing() -> Any:
    raise FileNotFoundError("no weights there")


def report_once(context: WorkerContext) -> None:
    context.report({"trained": True})


def test_the_pauses_between_log_lines_double(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now, lines = [1000.0], []
    monkeypatch.setattr(capacity, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(capacity, "_shortage", lambda resources: "2 CPUs on one node")
    wait_log = capacity.WaitLog(worker_resources(2, 0))
    for second in range(300):
        now[0] = 1000.0 + second
        wait_log.update(1, 2, "it waits")
        if caplog.records:
            lines.append(second)
            caplog.clear()
    assert lines == [30, 60, 120, 240]


def test_the_line_names_the_jobs_that_hold_the_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.util.state

    jobs = [
        SimpleNamespace(
            job_id="01", submission_id="raysubmit_a", entrypoint="python jobs/train_adm.py --x user:word@h"
        ),
        SimpleNamespace(job_id="02", submission_id=None, entrypoint=None),
    ]
    actors = [
        SimpleNamespace(job_id="01", required_resources={"CPU_group_0_c5a6": 2.0, "CPU_group_c5a6": 2.0}),
        SimpleNamespace(job_id="02", required_resources={"CPU": 1.0, "GPU": 1.0}),
        SimpleNamespace(job_id="02", required_resources={"CPU": 1.0, "GPU": 1.0}),
        SimpleNamespace(job_id="03", required_resources=None),
    ]
    groups = [SimpleNamespace(creator_job_id="01", bundles=[{"unit_resources": {"CPU": 2.0}}])]
    monkeypatch.setattr(ray.util.state, "list_jobs", lambda **_: jobs)
    monkeypatch.setattr(ray.util.state, "list_actors", lambda **_: actors)
    monkeypatch.setattr(ray.util.state, "list_placement_groups", lambda **_: groups)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="somewhere"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", dict)
    assert capacity._shortage(worker_resources(2, 1)) == (
        "2 CPUs and 1 GPUs on one node, 0 of 4 CPUs are free, job train_adm.py (raysubmit_a) holds 2 CPUs, "
        "job (02) holds 2 CPUs, 0 of 2 GPUs are free, job (02) holds 2 GPUs"
    )


def read_unit(unit: int) -> Iterator[dict[str, np.ndarray]]:
    yield {"row": np.full(3, unit)}


def reading(context: WorkerContext) -> None:
    """Read data while this worker holds all CPUs but one, and another job holds that one."""
    context.report({"begun": True})
    while not context.stopping():
        time.sleep(0.05)
    rows = [int(row) for block in stream(range(4), read_unit, ahead=4) for row in block["row"]]
    context.report({"rows": rows})


def make_waiter(folder: str) -> Any:
    def work(item: int) -> int:
        Path(folder, f"begun-{item}").touch()
        while not Path(folder, "read").exists():
            time.sleep(0.05)
        return item

    return work


@pytest.mark.ray
def test_a_training_reads_its_data_although_another_job_holds_all_other_cpus(ray_session: None, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    begun = threading.Event()

    def on_record(record: dict[str, Any]) -> None:
        begun.set()
        records.append(record)

    def train() -> None:
        run_workers(reading, 1, on_record, num_cpus=3, stop=Path(tmp_path, "begun-0").exists)
        Path(tmp_path, "read").touch()

    training = threading.Thread(target=train)
    training.start()
    assert begun.wait(DEADLINE)
    done = [item for item, _ in map_items(lambda: make_waiter(str(tmp_path)), range(2), num_workers=2)]
    training.join(DEADLINE)
    assert {"rows": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]} in records
    assert sorted(done) == [0, 1]


@pytest.mark.ray
def test_a_training_without_resources_logs_what_it_waits_for_obeys_sigterm_and_starts_later(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    holder = placement_group([{"CPU": 3}])
    assert holder.wait(DEADLINE)
    lines, records = list[str](), list[dict[str, Any]]()
    actions = iter([lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: remove_placement_group(holder)])

    def warning(text: str, *values: Any) -> None:
        lines.append(text % values)
        next(actions, lambda: None)()

    monkeypatch.setattr(capacity.log, "warning", warning)
    monkeypatch.setattr(capacity, "WAIT_SECONDS", 0.0)
    assert run_workers(report_once, 1, records.append, num_cpus=2) and records == []
    assert not run_workers(report_once, 1, records.append, num_cpus=2) and records == [{"trained": True}]
    expected = "waiting for 1 of 1 workers: each needs 2 CPUs on one node, 1 of 4 CPUs are free"
    assert [line[: len(expected)] for line in lines[:2]] == [expected] * 2


WAITING_POOL = """
import logging
from cluster import capacity
from cluster.session import session
from cluster.workers import map_items

capacity.WAIT_SECONDS, capacity._may_grow = 0.1, lambda: True
logging.basicConfig(format="%(message)s")
try:
    with session(1):
        list(map_items(lambda: abs, [1], num_workers=1, num_cpus=100))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.ray
def test_a_pool_that_waits_logs_a_line_and_obeys_sigterm(ray_session: None) -> None:
    environment = os.environ | QUIET_ENVIRONMENT | LOCAL_ENVIRONMENT | {"RAY_ADDRESS": address()}
    command, pipe = [sys.executable, "-c", WAITING_POOL], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as job:
        assert job.stderr is not None
        line = next(line for line in job.stderr if line.startswith("waiting"))
        assert "waiting for 1 of 1 workers: each needs 100 CPUs on one node, " in line and " of 4 CPUs are free" in line
        job.send_signal(signal.SIGTERM)
        assert job.communicate(timeout=DEADLINE)[0] == "interrupted\n"
        assert job.returncode == 0
