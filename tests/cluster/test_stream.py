"""The stream keeps the order of the units, reads lost units again, and reports errors."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path

import numpy as np
import pytest

from cluster.stream import LOST_READERS, stream
from tests.benchmarks.stream_endurance import log_files

pytestmark = pytest.mark.ray

Blocks = Iterator[dict[str, np.ndarray]]


def read_unit(unit: int) -> Blocks:
    """Yield a unit of `unit % 7 + 1` rows in blocks of at most three."""
    rows = np.arange(unit % 7 + 1)
    for start in range(0, len(rows), 3):
        row = rows[start : start + 3]
        yield {
            "unit": np.full(len(row), unit),
            "row": row,
            "image": np.full((len(row), 4, 4, 3), unit % 256, np.uint8),
        }


def rows_of(blocks: Blocks) -> list[list[int]]:
    return [list(pair) for block in blocks for pair in zip(block["unit"].tolist(), block["row"].tolist(), strict=True)]


def expected(units: range) -> list[list[int]]:
    return [[unit, row] for unit in units for row in range(unit % 7 + 1)]


def read_even_units_slowly(unit: int) -> Blocks:
    for block in read_unit(unit):
        time.sleep(0.01 * (unit % 2 == 0))
        yield block


def test_units_that_end_in_any_order_are_yielded_in_order(ray_session: None) -> None:
    blocks = list(stream(range(60), read_even_units_slowly, ahead=8))
    assert rows_of(iter(blocks)) == expected(range(60))
    assert all(len(set(block["unit"].tolist())) == 1 for block in blocks), "never across units"
    for block in blocks:
        assert block["image"].dtype == np.uint8 and block["image"].shape[1:] == (4, 4, 3)
        assert block["image"].flags.writeable and block["image"].base is None, "the caller's own memory"


def test_endless_units_are_read_as_far_ahead_as_allowed(ray_session: None) -> None:
    units = count()
    blocks = stream(units, read_unit, ahead=5)
    assert [int(block["unit"][0]) for block in islice(blocks, 3)] == [0, 1, 2]
    blocks.close()  # type: ignore[attr-defined]
    assert next(units) <= 2 + 5, "the units that have left, and those ahead"


def wait_for(condition: Callable[[], bool], description: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited 60 seconds in vain until {description}"
        time.sleep(0.01)


def read_for_ever(folder: str, unit: int) -> Blocks:
    """Yield the unit's blocks, and touch a file every few milliseconds."""
    yield from read_unit(unit)
    with Path(folder, str(unit)).open("ab", buffering=0) as file:
        while True:
            file.write(b".")
            time.sleep(0.005)


def test_nothing_outlives_a_consumer_that_stops_early(ray_session: None, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    blocks = stream(count(), partial(read_for_ever, str(tmp_path)), ahead=8)
    next(blocks)
    wait_for(lambda: any(tmp_path.iterdir()), "a task runs")
    blocks.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread not in before and thread.name == "stream"]
    wait_for(partial(is_quiet, tmp_path), "its readers end")
    assert rows_of(stream(range(20), read_unit, ahead=8)) == expected(range(20)), "the next stream reads"


def is_quiet(folder: Path) -> bool:
    """Return whether no file of the folder grows within a second, in which a reader would write 200 times."""
    sizes = {path: path.stat().st_size for path in folder.iterdir()}
    time.sleep(1.0)
    return sizes == {path: path.stat().st_size for path in folder.iterdir()}


def broken_unit(folder: str, unit: int) -> Blocks:
    if unit == 2:
        Path(folder, "shard-2").read_bytes()
    yield from read_unit(unit)


def test_a_failing_read_raises_its_own_message(ray_session: None, tmp_path: Path) -> None:
    blocks = stream(range(4), partial(broken_unit, str(tmp_path)), ahead=4)
    assert rows_of(islice(blocks, 2)) == expected(range(2)), "what comes before it"
    with pytest.raises(RuntimeError, match=r"reading data failed: FileNotFoundError: .*shard-2"):
        next(blocks)


def test_units_that_cannot_be_listed_raise_their_own_error(ray_session: None) -> None:
    with pytest.raises(ZeroDivisionError):
        list(stream((1 // (3 - unit) for unit in range(4)), read_unit, ahead=4))


def die_once(folder: str, unit: int) -> Blocks:
    """Yield the unit's blocks. The first try of unit 6 kills its process after two blocks, one of which has arrived."""
    for number, block in enumerate(read_unit(unit)):
        if unit == 6 and number == 2 and not Path(folder, "died").exists():
            wait_for(Path(folder, "received").exists, "the consumer receives a block")
            Path(folder, "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield block


def test_a_unit_whose_process_dies_is_read_again(ray_session: None, tmp_path: Path) -> None:
    """Unit 6 has three blocks. Each of them is yielded exactly once."""
    rows = []
    for block in stream(range(20), partial(die_once, str(tmp_path)), ahead=8):
        rows += rows_of(iter([block]))
        if rows[-1][0] == 6:
            Path(tmp_path, "received").touch()
    assert Path(tmp_path, "died").exists()
    assert rows == expected(range(20))


def die(folder: str, unit: int) -> Blocks:
    if unit == 3:
        Path(folder, str(time.time_ns())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield from read_unit(unit)


def test_a_unit_that_always_kills_its_process_raises_the_reason(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="reading data failed: its process "):
        list(stream(range(8), partial(die, str(tmp_path)), ahead=8))
    assert len(list(tmp_path.iterdir())) == LOST_READERS


def test_units_leave_no_files_and_no_actors(ray_session: None) -> None:
    """Ray Data's collectors and logs grew with the number of units when each chunk of them was a Dataset."""
    import ray

    blocks = stream(range(300), read_unit, ahead=8)
    for _ in takewhile(lambda block: block["unit"][0] < 50, blocks):
        pass
    before = log_files()
    for _ in blocks:
        pass
    new = log_files() - before
    print(f"{len(new)} new log files: {sorted(new)}")
    assert len(new) < 30, "at most those of processes that Ray started meanwhile"
    actors = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert not {name for name in actors if "stats" in name.lower()}, "Ray Data's collector"


@pytest.mark.parametrize(
    ("store_mib", "image_size", "step_ms"),
    [(80, 64, 0.0), pytest.param(300, 256, 100.0, marks=pytest.mark.slow)],
)
def test_a_dataset_of_ten_object_stores_spills_nothing(store_mib: int, image_size: int, step_ms: float) -> None:
    """Use a separate process and a separate Ray, because the size of the object store matters."""
    options = {"store-mib": store_mib, "image-size": image_size, "step-ms": step_ms, "distinct": 100}
    arguments = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.benchmarks.data_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    print(measured)
    assert measured["set_mib"] >= 10 * store_mib
    assert measured["spilled_mib"] == 0
    assert measured["peak_store_mib"] < store_mib
    assert measured["peak_driver_mib"] < 1000, "whatever the set's size"
