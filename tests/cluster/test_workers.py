"""The pool finishes every item although workers die, and reports items that cannot be done."""

import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster import workers
from cluster.actor import is_device_error
from cluster.workers import ItemsFailed, Pool, map_items, pool
from tests.cluster.timed_actors import Clock, TimedActor

NEVER = float("inf")


def make_squarer(folder: str, dies_at: int, fails_at: int, deaths_at_start: int = 0) -> Callable[[int], int]:
    """Return a worker that squares its item.

    Its process is killed at the first `deaths_at_start` starts, and once at the item `dies_at`; `fails_at` raises.
    """
    starts = len(list(Path(folder).glob("start-*")))
    if starts < deaths_at_start:
        Path(folder, f"start-{starts}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def work(item: int) -> int:
        mark = Path(folder, "died")
        if item == dies_at and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == fails_at:
            raise ValueError(f"item {item} is bad")
        return item * item

    return work


def make_nothing() -> Callable[[int], int]:
    raise FileNotFoundError("no weights there")


def test_without_workers_items_run_in_this_process_in_order(tmp_path: Path) -> None:
    make = partial(make_squarer, str(tmp_path), dies_at=-1, fails_at=-1)
    assert list(map_items(make, [3, 1, 2], num_workers=0)) == [(3, 9), (1, 1), (2, 4)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Yield a clock for actors without Ray, which the pool can kill."""
    monkeypatch.setattr(workers, "restart_process", lambda actor: actor.kill())
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.02)
    clock = Clock()
    yield clock
    clock.end()


def task_error(error: Exception) -> RayTaskError:
    """Return what a call of an actor raises for an error in its code."""
    return RayTaskError("work", f"{type(error).__name__}: {error}", error)


def num_unused_workers(caplog: pytest.LogCaptureFixture) -> int:
    """Return the number of workers that are benched or not used any more."""
    phrases = ("gets no items while others succeed", "is not used any more")
    return sum(any(phrase in record.message for phrase in phrases) for record in caplog.records)


def test_a_thousand_workers_do_every_item_once_and_items_are_not_fetched_ahead(clock: Clock) -> None:
    fetched: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5_000):
            fetched.append(item)
            yield item

    actors = [TimedActor(clock, lambda item: 0.001 * (item % 7)) for _ in range(1_000)]
    done = []
    for item, result in Pool[int, int](actors).map(items()):
        done.append(item)
        assert item == result and len(fetched) <= len(done) + len(actors) + 1
    assert sorted(done) == list(range(5_000))


def test_a_worker_that_joins_late_takes_its_share(clock: Clock) -> None:
    late = TimedActor(clock, lambda _: 0.01, start=0.05)
    absent = TimedActor(clock, lambda _: 0.01, start=NEVER)  # waits for a node that never comes
    done = [item for item, _ in Pool[int, int]([TimedActor(clock, lambda _: 0.01), late, absent]).map(range(60))]
    assert sorted(done) == list(range(60)) and late.worked and not absent.worked


def test_the_item_of_a_dead_worker_goes_to_another(clock: Clock) -> None:
    deaths = iter([ActorDiedError(), ActorDiedError()])
    dying = TimedActor(clock, lambda _: 0.0, outcome=lambda item: next(deaths, item))
    done = [item for item, _ in Pool[int, int]([dying, TimedActor(clock, lambda _: 0.001)]).map(range(40))]
    assert sorted(done) == list(range(40)) and next(deaths, None) is None


def test_an_item_that_hangs_is_given_to_an_idle_worker_and_yielded_once(clock: Clock) -> None:
    hanging = TimedActor(clock, lambda _: NEVER)
    done = [item for item, _ in Pool[int, int]([hanging, TimedActor(clock, lambda _: 0.001)]).map(range(20))]
    assert sorted(done) == list(range(20)) and len(hanging.worked) == 1


def test_the_first_of_two_results_counts_even_if_the_other_call_fails(clock: Clock) -> None:
    slow = TimedActor(clock, lambda _: 0.15, outcome=lambda item: ActorDiedError())
    quick = TimedActor(clock, lambda item: 0.3 if item == 0 else 0.001)
    done = [item for item, _ in Pool[int, int]([slow, quick]).map(range(12))]
    assert sorted(done) == list(range(12))


def test_the_mapping_ends_if_no_worker_is_left(clock: Clock) -> None:
    dead = [TimedActor(clock, lambda _: 0.0, ready=ActorDiedError()) for _ in range(2)]
    with pytest.raises(RuntimeError, match="no worker is left"):
        list(Pool[int, int](dead).map(range(3)))


def test_an_item_that_always_fails_is_named_and_the_others_are_done(clock: Clock) -> None:
    error = task_error(ValueError("no such label"))
    bad = TimedActor(clock, lambda _: 0.0, outcome=lambda item: error if item % 10 == 3 else item)
    done = []
    with pytest.raises(ItemsFailed, match=r"3 items failed.*3, 3 times: .*no such label"):
        for item, _ in Pool[int, int]([bad]).map(range(30)):
            done.append(item)
    assert sorted(done) == [item for item in range(30) if item % 10 != 3]


def test_an_item_that_kills_every_worker_is_named_in_the_end(clock: Clock) -> None:
    def outcome(item: int) -> int | Exception:
        return ActorDiedError() if item == 2 else item

    deadly = [TimedActor(clock, lambda _: 0.001, outcome=outcome) for _ in range(3)]
    done = []
    with pytest.raises(ItemsFailed, match=r"1 items failed.*2, 10 times"):
        for item, _ in Pool[int, int](deadly).map(range(30)):
            done.append(item)
    assert sorted(done) == [item for item in range(30) if item != 2]


@pytest.mark.parametrize("later", [0.0, 0.2], ids=["all are ready", "the sound one is ready later"])
def test_one_faulty_worker_that_raises_at_once_fails_no_item(
    clock: Clock, caplog: pytest.LogCaptureFixture, later: float
) -> None:
    """59 of 60 items failed permanently when an item was retried on the worker that was idle first."""
    sick = TimedActor(clock, lambda _: 0.0, outcome=lambda _: task_error(RuntimeError("it is sick")), node="sick-node")
    sound = TimedActor(clock, lambda _: 0.01, start=later)
    done = [item for item, _ in Pool[int, int]([sick, sound]).map(range(60))]
    assert sorted(done) == list(range(60))
    assert sick.kills >= 1 and len(sick.worked) == len(set(sick.worked)), "an item was retried where it had failed"
    assert "sick-node" in caplog.records[-1].message and "it is sick" in caplog.records[-1].message
    if not later:
        assert len(sick.worked) == workers.FAILURES_TO_BENCH and num_unused_workers(caplog) == 1


def test_three_sick_workers_that_are_ready_first_fail_no_item(clock: Clock) -> None:
    error = task_error(RuntimeError("it is sick"))
    sick = [TimedActor(clock, lambda _: 0.0, outcome=lambda _: error) for _ in range(3)]
    sound = [TimedActor(clock, lambda _: 0.01, start=0.3) for _ in range(13)]
    assert sorted(item for item, _ in Pool[int, int](sick + sound).map(range(200))) == list(range(200))


def test_if_every_item_fails_everywhere_all_are_named_and_the_workers_are_not_blamed(clock: Clock) -> None:
    bad = [TimedActor(clock, lambda _: 0.001, outcome=lambda _: task_error(OSError("no access"))) for _ in range(4)]
    with pytest.raises(ItemsFailed, match=r"60 items failed, the others are done: .*no access") as failed:
        list(Pool[int, int](bad).map(range(60)))
    assert "workers that failed" not in str(failed.value)


def test_a_hang_has_a_deadline_although_no_worker_is_idle(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "HANG_SECONDS", 0.1)
    hangs = {0, 1}

    def seconds(item: int) -> float:
        """Hang at the first try of items 0 and 1."""
        if item in hangs:
            hangs.remove(item)
            return NEVER
        return 0.001

    both = [TimedActor(clock, seconds), TimedActor(clock, seconds)]
    assert sorted(item for item, _ in Pool[int, int](both).map(range(10))) == list(range(10))
    assert "gave no result" in caplog.records[-1].message
    with pytest.raises(ItemsFailed, match=r"1 items failed.*: 4, 3 times: .*gave no result"):
        list(Pool[int, int]([TimedActor(clock, lambda item: NEVER if item == 4 else 0.0)]).map(range(8)))


def test_a_valid_item_that_misses_the_deadline_gets_a_longer_one(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HANG_SECONDS", 0.1)
    assert list(Pool[int, int]([TimedActor(clock, lambda _: 0.35)]).map([7])) == [(7, 7)]


def test_a_broken_device_ends_the_process_and_is_not_the_items_fault(clock: Clock) -> None:
    error = task_error(RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    failures = iter([error] * 5)
    broken = TimedActor(clock, lambda _: 0.0, outcome=lambda item: next(failures, item))
    assert list(Pool[int, int]([broken]).map([7])) == [(7, 7)]
    assert broken.kills == 5


@pytest.mark.parametrize(
    ("name", "message", "broken"),
    [
        ("AcceleratorError", "an illegal memory access was encountered", True),
        ("RuntimeError", "CUDA error: device-side assert triggered", True),
        ("RuntimeError", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", True),
        ("RuntimeError", "NCCL error: unhandled system error", True),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", False),
        ("RuntimeError", "shapes do not match", False),
    ],
)
def test_which_errors_say_that_the_device_is_broken(name: str, message: str, broken: bool) -> None:
    import torch

    error: Exception = getattr(torch, name, RuntimeError)(message)
    assert is_device_error(task_error(error)) == broken


def test_a_worker_that_cannot_be_created_is_not_used(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    error = task_error(OSError("SlowDown"))
    tries = iter([error] * 2)
    third_try = TimedActor(clock, lambda _: 0.001, ready=lambda: next(tries, None))
    never = TimedActor(clock, lambda _: 0.0, ready=error, node="sick-node")
    late = TimedActor(clock, lambda _: 0.001, start=0.3)
    items = range(400)
    assert sorted(item for item, _ in Pool[int, int]([never, third_try, late]).map(items)) == list(items)
    assert third_try.worked and not never.worked and num_unused_workers(caplog) == 1
    assert "sick-node: 3 times, unused: it could not be created: OSError: SlowDown" in caplog.records[-1].message


def test_a_slow_worker_is_named(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "SLOW_SECONDS", 0.1)
    slow = TimedActor(clock, lambda _: 5.0, node="slow-node")
    sound = TimedActor(clock, lambda _: 0.005)
    assert sorted(item for item, _ in Pool[int, int]([slow, sound]).map(range(100))) == list(range(100))
    slow_lines = [record.message for record in caplog.records if "slow workers" in record.message]
    assert any("slow-node: item" in line for line in slow_lines)
    assert "slow-node" in caplog.records[-1].message


def test_no_mixture_of_faults_loses_or_duplicates_an_item(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HANG_SECONDS", 0.2)
    for seed in range(6):
        draws = random.Random(seed)
        chances = [draws.choice([0.0, 0.0, 0.05, 0.5, 1.0]) for _ in range(16)]
        chances[draws.randrange(16)] = 0.0
        print(f"seed {seed}, chances of a fault {chances}")
        actors = [faulty_actor(clock, draws, chance) for chance in chances]
        done = [item for item, _ in Pool[int, int](actors).map(range(300), tries=16)]
        assert sorted(done) == list(range(300))


def faulty_actor(clock: Clock, draws: random.Random, chance: float) -> TimedActor:
    """Return an actor that raises, dies, breaks its device or hangs, each with some probability."""

    def outcome(item: int) -> Any:
        errors = [task_error(ValueError("no")), task_error(RuntimeError("CUDA error: unknown")), ActorDiedError()]
        return draws.choice(errors) if draws.random() < chance else item

    return TimedActor(clock, lambda _: NEVER if draws.random() < chance / 10 else 0.002, outcome=outcome)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_workers(clock: Clock, number: signal.Signals) -> None:
    def interrupt(*_: Any) -> None:
        raise InterruptedError

    before = signal.signal(number, interrupt)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(InterruptedError):
            list(Pool[int, int]([TimedActor(clock, lambda _: 0.0, start=NEVER)]).map(range(3)))
    finally:
        timer.join()
        signal.signal(number, before)


@pytest.mark.ray
def test_a_killed_worker_loses_nothing_and_a_bad_item_is_named(ray_session: None, tmp_path: Path) -> None:
    """The worker is killed twice while it is created, and once at work."""
    make = partial(make_squarer, str(tmp_path), dies_at=7, fails_at=9, deaths_at_start=2)
    done = []
    with pytest.raises(ItemsFailed, match=r"1 items failed.*9, 3 times: ValueError: item 9 is bad"):
        for item, result in map_items(make, range(20), num_workers=1):
            done.append((item, result))
    assert {path.name for path in tmp_path.iterdir()} == {"start-0", "start-1", "died"}, "it was not killed"
    assert sorted(done) == [(item, item * item) for item in range(20) if item != 9]


@pytest.mark.ray
def test_the_job_ends_if_no_worker_can_be_created(ray_session: None) -> None:
    with pytest.raises(RuntimeError, match="FileNotFoundError: no weights there"):
        list(map_items(make_nothing, range(3), num_workers=1))


class Task(NamedTuple):
    """An item, and what faulty workers do with it."""

    fault: str
    number: int


def is_sick_actor(folder: str, count: int) -> bool:
    """Return whether this actor is one of the first `count` that called this; it stays sick after every restart."""
    import ray

    actor_id = str(ray.get_runtime_context().get_actor_id())
    for number in range(count):
        file = Path(folder, f"sick{number}")
        try:
            os.symlink(actor_id, file)  # atomic, with its content
        except FileExistsError:
            if os.readlink(file) != actor_id:
                continue
        return True
    return False


def make_sick(folder: str, count: int) -> Callable[[Task], int]:
    """Return a worker that is sick if it is one of the first `count`; a sick one cannot be created at first."""
    sick, seen = is_sick_actor(folder, count), 0
    mark = uuid.uuid4().hex
    if sick and not Path(folder, "can be made").exists():
        Path(folder, f"cannot be made-{mark}").touch()
        raise OSError("it is sick")

    def work(task: Task) -> int:
        nonlocal seen
        if not sick:
            while len(list(Path(folder).glob(f"{task.fault}-*"))) < count:
                time.sleep(0.05)  # until all sick ones take part
            return task.number
        seen += 1
        Path(folder, f"{task.fault}-{mark}").touch()
        if task.fault == "raises at once" or (task.fault == "raises after two" and seen > 2):
            raise RuntimeError("it is sick")
        if task.fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.fault in ("is slow", "hangs"):
            time.sleep(3.0 if task.fault == "is slow" else 3600.0)
        return task.number

    return work


@pytest.mark.ray
def test_faulty_workers_cost_only_their_share(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every fault is tested on the same pool, because the health of its workers is counted anew in each mapping."""
    sick, num_workers = 2, 5
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(workers, "SLOW_SECONDS", 0.5)
    with pool(partial(make_sick, str(tmp_path), sick), num_workers, num_cpus=0.1) as workers_of_pool:
        for fault in ("cannot be made", "raises at once", "raises after two", "dies", "is slow", "hangs"):
            caplog.clear()
            tasks = [Task(fault, number) for number in range(30 * num_workers)]
            assert sorted(workers_of_pool.map(tasks)) == [(task, task.number) for task in tasks], fault
            (tmp_path / "can be made").touch()
            print(fault, *(record.message for record in caplog.records), sep="\n  ")
            assert "all items are done, workers that failed: " in caplog.records[-1].message
            assert caplog.records[-1].message.count(" times") >= sick
