"""The pool: every item is done though workers die, and what cannot be done is named."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster import workers
from cluster.workers import ItemsFailed, Pool, map_items
from tests.cluster.timed_actors import Clock, TimedActor

NEVER = float("inf")


def make_squarer(folder: str, dies_at: int, fails_at: int) -> Callable[[int], int]:
    """A worker that squares; it kills its process at one item, once, and fails at another, always."""

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


def test_without_workers_items_run_here_in_order(tmp_path: Path) -> None:
    make = partial(make_squarer, str(tmp_path), dies_at=-1, fails_at=-1)
    assert list(map_items(make, [3, 1, 2], num_workers=0)) == [(3, 9), (1, 1), (2, 4)]


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    yield clock
    clock.end()


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


def test_an_item_that_hangs_is_given_to_an_idle_worker_and_comes_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.02)
    hanging = TimedActor(clock, lambda _: NEVER)
    done = [item for item, _ in Pool[int, int]([hanging, TimedActor(clock, lambda _: 0.001)]).map(range(20))]
    assert sorted(done) == list(range(20)) and len(hanging.worked) == 1


def test_the_first_of_two_answers_counts_also_where_the_other_fails(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.02)
    slow = TimedActor(clock, lambda _: 0.15, outcome=lambda item: ActorDiedError())
    quick = TimedActor(clock, lambda item: 0.3 if item == 0 else 0.001)
    done = [item for item, _ in Pool[int, int]([slow, quick]).map(range(12))]
    assert sorted(done) == list(range(12))


def test_without_any_worker_left_it_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.01)
    dead = [TimedActor(clock, lambda _: 0.0, ready=ActorDiedError()) for _ in range(2)]
    with pytest.raises(RuntimeError, match="no worker is left"):
        list(Pool[int, int](dead).map(range(3)))


def test_an_item_that_always_fails_is_named_and_the_others_are_done(clock: Clock) -> None:
    error = RayTaskError("work", "ValueError: no such label", ValueError("no such label"))
    bad = TimedActor(clock, lambda _: 0.0, outcome=lambda item: error if item % 10 == 3 else item)
    done = []
    with pytest.raises(ItemsFailed, match=r"3 items failed.*3, 3 times: .*no such label"):
        for item, _ in Pool[int, int]([bad]).map(range(30)):
            done.append(item)
    assert sorted(done) == [item for item in range(30) if item % 10 != 3]


def test_an_item_that_kills_every_worker_is_named_in_the_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.01)

    def outcome(item: int) -> int | Exception:
        return ActorDiedError() if item == 2 else item

    deadly = [TimedActor(clock, lambda _: 0.001, outcome=outcome) for _ in range(3)]
    done = []
    with pytest.raises(ItemsFailed, match=r"1 items failed.*2, 10 times"):
        for item, _ in Pool[int, int](deadly).map(range(30)):
            done.append(item)
    assert sorted(done) == [item for item in range(30) if item != 2]


def make_slow_starter(folder: str) -> Callable[[int], int]:
    """A worker whose process is killed the first two times that it is made."""
    marks = len(list(Path(folder).glob("start*")))
    if marks < 2:
        Path(folder, f"start{marks}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda item: item


@pytest.mark.ray
def test_a_worker_killed_while_it_is_made_is_made_again(ray_session: None, tmp_path: Path) -> None:
    done = list(map_items(partial(make_slow_starter, str(tmp_path)), range(4), num_workers=1))
    assert sorted(done) == [(item, item) for item in range(4)] and (tmp_path / "start1").exists()


@pytest.mark.ray
def test_a_killed_worker_loses_nothing_and_a_bad_item_is_named(ray_session: None, tmp_path: Path) -> None:
    make = partial(make_squarer, str(tmp_path), dies_at=7, fails_at=9)
    done = []
    with pytest.raises(ItemsFailed, match=r"1 items failed.*9, 3 times: ValueError: item 9 is bad"):
        for item, result in map_items(make, range(20), num_workers=2):
            done.append((item, result))
    assert (tmp_path / "died").exists(), "no worker was killed"
    assert sorted(done) == [(item, item * item) for item in range(20) if item != 9]


@pytest.mark.ray
def test_a_worker_that_cannot_be_made_is_an_error_at_once(ray_session: None) -> None:
    with pytest.raises(RuntimeError, match="could not be made: FileNotFoundError: no weights there"):
        list(map_items(make_nothing, range(3), num_workers=1))
