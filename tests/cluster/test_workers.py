"""The pool: every item is done though workers die, and what cannot be done is named."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cluster.workers import ItemsFailed, map_items


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


@pytest.mark.ray
def test_a_killed_worker_loses_nothing_and_a_bad_item_is_named(ray_session: None, tmp_path: Path) -> None:
    make = partial(make_squarer, str(tmp_path), dies_at=7, fails_at=9)
    done = []
    with pytest.raises(ItemsFailed, match=r"1 items failed 3 times each.*9: ValueError: item 9 is bad"):
        for item, result in map_items(make, range(20), num_workers=2):
            done.append((item, result))
    assert (tmp_path / "died").exists(), "no worker was killed"
    assert sorted(done) == [(item, item * item) for item in range(20) if item != 9]


@pytest.mark.ray
def test_a_worker_that_cannot_be_made_is_an_error_at_once(ray_session: None) -> None:
    with pytest.raises(RuntimeError, match="could not be made: FileNotFoundError: no weights there"):
        list(map_items(make_nothing, range(3), num_workers=1))
