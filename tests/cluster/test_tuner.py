"""Rounds over Ray Tune: outcomes in the jobs' order however they finish, and nothing left that a trial could hold."""

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster.tuner import Rounds, run_rounds
from cluster.workers import Pool, pool


class Job(NamedTuple):
    number: int
    seconds: float = 0.0


def squared(job: Job) -> tuple[int, int]:
    time.sleep(job.seconds)
    if job.number < 0:
        raise ValueError(f"job {job.number} is bad")
    return job.number**2, os.getpid()


def rounds(seen: list[list[int]], sizes: tuple[int, ...], shuffle: random.Random) -> Rounds[Job, Any, set[int]]:
    """Rounds of jobs that end in any order; an empty round is passed over."""
    processes: set[int] = set()
    for size in sizes:
        outcomes = yield [Job(number, shuffle.random() / 5) for number in range(size)]
        seen.append([square for square, _ in outcomes])
        processes |= {process for _, process in outcomes}
    return processes


@pytest.mark.ray
def test_outcomes_come_in_the_jobs_order_and_nothing_outlives_the_rounds(ray_session: None) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    found = []
    for seed in (1, 2):
        seen: list[list[int]] = []
        processes = run_rounds(squared, rounds(seen, (5, 0, 3), random.Random(seed)), max_concurrent=3)
        found.append(seen)
        assert len(processes) <= 3, "a trial had a process of its own"
    assert found[0] == found[1] == [[0, 1, 4, 9, 16], [], [0, 1, 4]]
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    everything = ray.cluster_resources()["CPU"]
    deadline = time.monotonic() + 30
    while ray.available_resources()["CPU"] < everything and time.monotonic() < deadline:
        time.sleep(0.1)  # nodes report what is free a moment later
    assert ray.available_resources()["CPU"] == everything


@pytest.mark.ray
def test_a_job_that_raises_and_rounds_that_raise_end_in_their_own_error(ray_session: None) -> None:
    def bad_job() -> Rounds[Job, Any, None]:
        yield [Job(1), Job(-2), Job(3)]

    def bad_rounds() -> Rounds[Job, Any, None]:
        yield [Job(1)]
        raise KeyError("the rounds are wrong")

    with pytest.raises(RuntimeError, match="job -2 is bad"):
        run_rounds(squared, bad_job(), max_concurrent=2)
    with pytest.raises(KeyError, match="the rounds are wrong"):
        run_rounds(squared, bad_rounds(), max_concurrent=2)


class Item(NamedTuple):
    trial: str
    number: int


def make_logger(folder: str) -> Callable[[Item], str | None]:
    """A worker that notes when it begins an item; trial "bad" fails at its third."""

    def work(item: Item) -> str | None:
        with Path(folder, "log").open("a") as log:  # one short line: appended whole
            log.write(f"{item.trial}\n")
        time.sleep(0.02)
        return "it fails" if item.trial == "bad" and item.number == 2 else None

    return work


def map_over(workers: Pool[Item, str | None], trial: str) -> str:
    """A trial over the shared pool, which asks for nothing more at the first failure."""
    for _, failure in workers.map([Item(trial, number) for number in range(40)]):
        if failure:
            return failure
    return "done"


@pytest.mark.ray
def test_a_trial_that_stops_frees_its_share_of_the_pool_at_once(ray_session: None, tmp_path: Path) -> None:
    def both() -> Rounds[str, str, list[str]]:
        return (yield ["bad", "good"])

    num_workers = 2
    with pool(partial(make_logger, str(tmp_path)), num_workers) as workers:
        outcomes = run_rounds(partial(map_over, workers), both(), max_concurrent=2)
    assert outcomes == ["it fails", "done"]
    begun = (tmp_path / "log").read_text().split()
    assert begun.count("good") == 40
    assert begun.count("bad") <= 3 + 2 * num_workers, "what the stopped trial had not asked for was done all the same"
