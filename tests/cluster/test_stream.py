"""Ray Data keeps the units' order, copies out of the object store, and names what failed."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, count, islice
from pathlib import Path

import numpy as np
import pytest

from cluster.stream import FREE_PAGES, PAGED_BYTES, _ahead, _Pages, stream

pytestmark = pytest.mark.ray


def read_unit(unit: int) -> Iterator[dict[str, np.ndarray]]:
    """A unit of `unit % 7 + 1` rows in blocks of at most three."""
    rows = np.arange(unit % 7 + 1)
    for start in range(0, len(rows), 3):
        row = rows[start : start + 3]
        yield {
            "unit": np.full(len(row), unit),
            "row": row,
            "image": np.full((len(row), 4, 4, 3), unit, np.uint8),
        }


def rows_of(blocks: Iterator[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.stack([block["unit"], block["row"]], 1) for block in blocks])


def test_order_over_several_pipelines(ray_session: None) -> None:
    units = range(20)
    expected = rows_of(block for unit in units for block in read_unit(unit))
    blocks = list(stream(units, read_unit, chunk=8))
    assert np.array_equal(rows_of(iter(blocks)), expected)
    assert all(len(set(block["unit"].tolist())) == 1 for block in blocks), "never across units"
    for block in blocks:
        assert block["image"].dtype == np.uint8 and block["image"].shape[1:] == (4, 4, 3)
        assert block["image"].flags.writeable and block["image"].base is None, "the caller's own memory"


def shuffled_pipeline(running: list[int], units: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of up to four units in any order, as tasks that run at a time hand them over; `running` gets +1 and -1."""
    rng = random.Random(units[0])
    left = {number: [*range(unit % 3 + 1)] for number, unit in enumerate(units)}
    running.append(1)
    try:
        while left:
            number = rng.choice(list(left)[:4])
            row = left[number].pop(0)
            last = not left[number]
            if last:
                del left[number]
            time.sleep(rng.random() / 1000)
            yield {
                "unit": np.array([units[number]]),
                "row": np.array([row]),
                "unit_of_chunk": np.array([number]),
                "last_of_unit": np.array([last]),
            }
    finally:
        running.append(-1)


def test_blocks_come_in_any_order_and_leave_in_the_units() -> None:
    running: list[int] = []
    before = threading.active_count()
    found = rows_of(_ahead(iter(range(100)), 8, partial(shuffled_pipeline, running)))
    assert found.tolist() == [[unit, row] for unit in range(100) for row in range(unit % 3 + 1)]
    assert max(accumulate(running)) == 2, "two pipelines overlap, and never three"
    blocks = _ahead(count(), 8, partial(shuffled_pipeline, running))
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert sum(running) == 0 and threading.active_count() == before, "nothing outlives a caller who stops early"


def test_endless_units_are_read_lazily(ray_session: None) -> None:
    units = count()
    blocks = stream(units, read_unit, chunk=4)
    assert [int(block["unit"][0]) for block in islice(blocks, 3)] == [0, 1, 2]
    blocks.close()  # type: ignore[attr-defined]
    assert next(units) <= 3 * 4, "more than the two chunks that it may hold, and the one in its hand"


def broken_unit(folder: str, unit: int) -> Iterator[dict[str, np.ndarray]]:
    if unit == 2:
        Path(folder, "shard-2").read_bytes()
    yield from read_unit(unit)


def test_a_failing_read_raises_its_own_message(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"reading data failed: FileNotFoundError: .*shard-2"):
        list(stream(range(4), partial(broken_unit, str(tmp_path)), chunk=4))


@pytest.mark.parametrize(
    ("store_mib", "image_size", "step_ms"),
    [(80, 64, 0.0), pytest.param(300, 256, 100.0, marks=pytest.mark.slow)],
)
def test_a_set_ten_times_the_object_store_spills_nothing(store_mib: int, image_size: int, step_ms: float) -> None:
    """In a process and a Ray of its own, since the object store's size is part of it."""
    options = {"store-mib": store_mib, "image-size": image_size, "step-ms": step_ms, "distinct": 100}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.benchmarks.data_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["set_mib"] >= 10 * store_mib
    assert found["spilled_mib"] == 0
    assert found["peak_store_mib"] < store_mib
    assert found["peak_driver_mib"] < 1000, "whatever the set's size"


def test_copies_are_the_callers_own_for_as_long_as_anything_looks_at_them() -> None:
    rows = PAGED_BYTES // 8
    pages = _Pages(2 * PAGED_BYTES)
    held = [pages.copy(np.full((2, rows // 2), number, np.int64)) for number in range(3)]
    views = [copy[1, 3:5] for copy in held]
    del held
    for more in range(2 * FREE_PAGES):  # were the pages free, these would take them
        pages.copy(np.full(rows + 8192 * more, 99, np.int64))
    assert [view.tolist() for view in views] == [[0, 0], [1, 1], [2, 2]]
    del views
    again = pages.copy(np.full(rows, 7, np.int64))
    assert (again == 7).all() and again.flags.writeable
    others = [pages.copy(np.full(rows + more, more, np.int64)) for more in range(2 * FREE_PAGES)]
    assert [int(other[-1]) for other in others] == list(range(2 * FREE_PAGES))
    del others
    assert len(pages._free) == FREE_PAGES, "some are kept, of whatever size, and no more"
