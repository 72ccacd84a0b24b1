"""Rounds over Ray Tune: trials report at every rung, are paused, resumed and stopped, and outlive their process."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.tuner import Round, Rounds, run_rounds
from cluster.workers import Pool, pool


class Task(NamedTuple):
    trial: str
    level: int


def write_mark(folder: str, task: Task) -> dict[str, float]:
    """Write a file for the task. The first process of trial 1 at level 1 kills itself."""
    if task == Task("1", 1) and not Path(folder, "died").exists():
        Path(folder, "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    Path(folder, f"{task.trial}-{task.level}-{os.getpid()}").touch()
    return {"level": task.level}


def halving_rounds(folder: str, finished: list[list[str]]) -> Rounds[Task]:
    """Yield rounds: no tasks, four trials, then two, then one of these and one that was stopped."""
    yield Round([], [])
    for level, (names, stopped) in enumerate([(("0", "1", "2", "3"), ()), (("0", "1"), ("2", "3")), (("0", "3"), ())]):
        yield Round([(name, Task(name, level)) for name in names], list(stopped))
        finished.append(sorted(file.rsplit("-", 1)[0] for file in os.listdir(folder) if f"-{level}-" in file))


@pytest.mark.ray
def test_trials_go_on_between_rounds_and_nothing_outlives_them(ray_session: None, tmp_path: Path) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    finished, done = list[list[str]](), list[Task]()
    rounds = halving_rounds(str(tmp_path), finished)
    run_rounds(partial(write_mark, str(tmp_path)), rounds, max_concurrent=2, on_done=done.append)
    expected = [["0-0", "1-0", "2-0", "3-0"], ["0-1", "1-1"], ["0-2", "3-2"]]
    assert finished == expected, "a task was lost or done too early"
    assert len(done) == 8 == len(set(done)) and (tmp_path / "died").exists()
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    all_cpus = ray.cluster_resources()["CPU"]
    deadline = time.monotonic() + 30
    while ray.available_resources()["CPU"] < all_cpus and time.monotonic() < deadline:
        time.sleep(0.1)  # nodes report what is free a moment later
    assert ray.available_resources()["CPU"] == all_cpus


@pytest.mark.ray
def test_a_task_that_raises_and_rounds_that_raise_end_in_their_own_error(ray_session: None) -> None:
    def run_task(level: int) -> dict[str, float]:
        if level < 0:
            raise ValueError(f"task {level} is bad")
        return {}

    def bad_rounds() -> Rounds[int]:
        yield Round([("a", 1)], [])
        raise KeyError("the rounds are wrong")

    finished = list[int]()
    with pytest.raises(RuntimeError, match="task -2 is bad"):
        run_rounds(
            run_task, iter([Round([("a", 1), ("b", -2), ("c", 3)], [])]), max_concurrent=1, on_done=finished.append
        )
    assert finished == [1, 3], "the others of its round are done"
    with pytest.raises(KeyError, match="the rounds are wrong"):
        run_rounds(run_task, bad_rounds(), max_concurrent=2, on_done=finished.append)


class Item(NamedTuple):
    trial: str
    number: int


def make_logger(folder: str) -> Callable[[Item], str | None]:
    """Return a worker that records when it begins an item. The third item of trial "bad" fails."""

    def work(item: Item) -> str | None:
        with Path(folder, "log").open("a") as log:  # one short line: appended whole
            log.write(f"{item.trial}\n")
        time.sleep(0.02)
        return "it fails" if item.trial == "bad" and item.number == 2 else None

    return work


def map_over(workers: Pool[Item, str | None], trial: str) -> dict[str, float]:
    """Run a trial on the shared pool, which stops at the first failure."""
    for _, failure in workers.map([Item(trial, number) for number in range(40)]):
        if failure:
            return {"failed": 1}
    return {"failed": 0}


@pytest.mark.ray
def test_a_trial_that_stops_frees_its_share_of_the_pool_at_once(ray_session: None, tmp_path: Path) -> None:
    num_workers = 2
    both = (Round([("bad", "bad"), ("good", "good")], []) for _ in range(1))
    with pool(partial(make_logger, str(tmp_path)), num_workers) as workers:
        run_rounds(partial(map_over, workers), both, max_concurrent=2, on_done=lambda trial: None)
    begun = (tmp_path / "log").read_text().split()
    assert begun.count("good") == 40
    assert begun.count("bad") <= 3 + 2 * num_workers, "items that the stopped trial had not submitted were done"
