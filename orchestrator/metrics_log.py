"""The metrics of a run: records that are appended to `metrics.jsonl` in its folder."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

from orchestrator import storage

NAME = "metrics.jsonl"
PART_BYTES = 1 << 20  # size of a part on object storage from which a new part begins
READ_BYTES = 256 << 10  # size of a read
FLUSH_SECONDS = 1.0  # between two writes of a part

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """The metrics of one step."""

    time: int  # milliseconds since 1970
    step: int
    metrics: dict[str, float]
    child: str = ""  # the child run, such as a trial; "" = the run itself


class Position(NamedTuple):
    """A position between two records."""

    number: int = 0  # number of records before it
    part: int = 0  # number of the first record in its part
    offset: int = 0  # bytes before it in its part


class MetricsLog:
    """Appends records to the metrics of a folder and reads them.

    On a local disk `metrics.jsonl` is one file, and every record is written immediately, so a SIGKILL loses nothing.
    On object storage, where objects cannot be appended to, it is a folder of parts. Each part is named after the number
    of its first record. A thread rewrites the last part with new records once a second, until it has PART_BYTES. So a
    SIGKILL loses the last second, requests have about 1 MiB at most, and 200,000 records of 500 bytes are 100 objects.
    """

    def __init__(self, folder: str) -> None:
        self._uri = storage.join(folder, NAME)
        self._path = storage.local_path(self._uri)
        self._lock = threading.Lock()  # of _waiting; never held during I/O
        self._writing = threading.Lock()  # of the storage; held during I/O
        self._waiting: list[bytes] = []  # lines that are not in storage
        self._closed = threading.Event()
        self._failing = False
        self._last = b""  # content of the last part on object storage
        self._parts = [0]
        if self._path is not None:
            self.count = _repair(self._path)  # of the records in storage
            return
        if parts := _parts(self._uri):
            self._parts = sorted(parts)
            self._last = storage.read_bytes(parts[self._parts[-1]])
        self.count = self._parts[-1] + self._last.count(b"\n")
        self._begin_part_if_full()
        threading.Thread(target=self._flush_regularly, name="metrics", daemon=True).start()

    def append(self, *records: Record) -> None:
        """Append records: on a local disk before this returns, on object storage within about a second."""
        lines = [_line(record) for record in records]
        with self._lock:
            self._waiting += lines
        if self._path is not None:
            self.flush()

    def flush(self) -> None:
        """Write the records that are not in storage. If that fails, warn once and keep them for the next flush."""
        with self._writing:
            with self._lock:
                lines = list(self._waiting)
            if not lines:
                return
            try:
                self._write(b"".join(lines))
            except OSError as error:
                if not self._failing:
                    message = "%s cannot be written; the records wait in memory, the job continues: %s"
                    log.warning(message, self._uri, error)
                self._failing = True
                return
            self._failing = False
            with self._lock:
                del self._waiting[: len(lines)]
            self.count += len(lines)
            self._begin_part_if_full()

    def close(self) -> None:
        """Write the remaining records."""
        self._closed.set()
        self.flush()
        if self._waiting:
            log.error("%d records could not be written to %s and are lost", len(self._waiting), self._uri)

    def read(self, position: Position) -> tuple[list[Record], Position]:
        """Return the records after `position`, about READ_BYTES of them, and the position after those."""
        number, part, offset = position
        while number < self.count:
            uri = self._uri if self._path is not None else _part(self._uri, part)
            data = storage.read_range(uri, offset, offset + READ_BYTES)
            data = data[: data.rfind(b"\n") + 1]
            if data:
                records = _records(data)
                return records, Position(number + len(records), part, offset + len(data))
            if number not in self._parts or number == part:
                raise OSError(f"{uri} ends before record {self.count}")
            part, offset = number, 0
        return [], Position(number, part, offset)

    def _write(self, data: bytes) -> None:
        if self._path is None:
            storage.write_bytes(_part(self._uri, self._parts[-1]), self._last + data)
            self._last += data
            return
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "ab", buffering=0) as file:
            size, rest = file.tell(), memoryview(data)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:  # a full disk may have a part of a line
                file.truncate(size)
                raise

    def _begin_part_if_full(self) -> None:
        if len(self._last) >= PART_BYTES:
            self._parts.append(self.count)
            self._last = b""

    def _flush_regularly(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            self.flush()


def read_records(folder: str) -> Iterator[Record]:
    """Yield all records of a folder; none if it has no metrics."""
    parts = _parts(storage.join(folder, NAME))
    for first in sorted(parts):
        yield from _records(storage.read_bytes(parts[first]))


def history(folder: str, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric of the run in `folder`; for a step that was repeated, the latest value."""
    values = {r.step: r.metrics[name] for r in read_records(folder) if not r.child and name in r.metrics}
    return sorted(values.items())


def _parts(uri: str) -> dict[int, str]:
    """Return the URI of each part by the number of its first record."""
    if storage.local_path(uri) is not None:
        return {0: uri} if storage.exists(uri) else {}
    names = [name for name in storage.list_names(uri) if name.endswith(".jsonl")]
    return {int(name.removesuffix(".jsonl")): storage.join(uri, name) for name in names}


def _part(uri: str, first: int) -> str:
    return storage.join(uri, f"{first:09d}.jsonl")


def _repair(path: str) -> int:
    """Remove an incomplete last line, which a kill may have left; return the number of lines."""
    count = end = 0
    if os.path.exists(path):
        with open(path, "rb+") as file:
            for line in file:
                if line.endswith(b"\n"):
                    count, end = count + 1, end + len(line)
            file.truncate(end)
    return count


def _line(record: Record) -> bytes:
    """Return the record as a line of JSON, in which NaN stays NaN, as Python reads it."""
    child = {"child": record.child} if record.child else {}
    fields = {"time": record.time, "step": record.step, **child, "metrics": record.metrics}
    return json.dumps(fields).encode() + b"\n"


def _records(data: bytes) -> list[Record]:
    """Return the records of all complete lines."""
    return [Record(**json.loads(line)) for line in data[: data.rfind(b"\n") + 1].splitlines()]
