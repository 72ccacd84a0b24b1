"""Test that records of metrics survive a kill and a full disk."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import metrics_log, storage
from orchestrator.metrics_log import MetricsLog, Position, Record, history, read_records


def records(count: int, first: int = 0) -> list[Record]:
    return [Record(1_000 + step, step, {"loss": float(step)}) for step in range(first, first + count)]


def read_all(numbers: MetricsLog) -> list[Record]:
    """Return all records, which are read in several steps."""
    all_records: list[Record] = []
    position = Position()
    while True:
        new, position = numbers.read(position)
        if not new:
            return all_records
        all_records += new


@pytest.mark.parametrize("storage_kind", ["local", "s3"])
def test_records_come_back_in_order_over_parts_and_starts(
    storage_kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path) if storage_kind == "local" else f"{request.getfixturevalue('s3_bucket')}/run"
    monkeypatch.setattr(metrics_log, "PART_BYTES", 2_000)
    monkeypatch.setattr(metrics_log, "READ_BYTES", 500)
    for start in range(0, 300, 100):
        numbers = MetricsLog(folder)
        assert numbers.count == start
        for record in records(100, start):
            numbers.append(record)
            if record.step % 7 == 0:
                numbers.flush()
        numbers.close()
    assert read_all(numbers) == records(300) == list(read_records(folder))
    parts = storage.list_names(storage.join(folder, metrics_log.NAME)) if storage_kind == "s3" else []
    assert len(parts) < 15, "a part is rewritten until it is full"
    assert history(folder, "loss") == [(step, float(step)) for step in range(300)]


def test_the_last_record_of_a_repeated_step_counts(tmp_path: Path) -> None:
    numbers = MetricsLog(str(tmp_path))
    numbers.append(Record(1, 5, {"loss": 2.0}), Record(2, 5, {"loss": 1.0}), Record(3, 5, {"loss": 9.0}, "trial 1"))
    assert history(str(tmp_path), "loss") == [(5, 1.0)]
    assert history(str(tmp_path), "other") == history(str(tmp_path / "nowhere"), "loss") == []


def test_a_kill_loses_no_record_and_leaves_no_broken_line(tmp_path: Path) -> None:
    code = (
        "import os, signal; from orchestrator.metrics_log import MetricsLog, Record\n"
        f"numbers = MetricsLog({str(tmp_path)!r})\n"
        "for step in range(50): numbers.append(Record(1_000 + step, step, {'loss': float(step)}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with (tmp_path / metrics_log.NAME).open("ab") as file:
        file.write(b'{"time": 1, "st')  # an incomplete line, which a full disk or a lost machine leaves
    numbers = MetricsLog(str(tmp_path))
    numbers.append(*records(1, 50))
    assert read_all(numbers) == records(51)


def test_on_object_storage_a_kill_loses_about_a_second(s3_bucket: str) -> None:
    numbers = MetricsLog(f"{s3_bucket}/run")
    numbers.append(*records(20))
    deadline = time.monotonic() + 30
    while not list(read_records(f"{s3_bucket}/run")) and time.monotonic() < deadline:
        time.sleep(0.05)  # the log is not closed before
    assert list(read_records(f"{s3_bucket}/run")) == records(20)
    numbers.close()


def test_numbers_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = MetricsLog(str(tmp_path))
    write = MetricsLog._write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "_write", full)
    for record in records(3):
        numbers.append(record)
    assert caplog.text.count("cannot be written") == 1
    monkeypatch.setattr(MetricsLog, "_write", write)
    numbers.append(*records(1, 3))
    assert read_all(numbers) == records(4)
