"""The metrics of a run, which are records that are appended to `metrics.jsonl` in its folder."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

from orchestrator import storage

NAME = "metrics.jsonl"
PART_BYTES = 1 << 20  # a part on object storage that has this size is followed by a new part
READ_BYTES = 256 << 10  # size of a read; a record is shorter
FLUSH_SECONDS = 1.0  # between two writes of a part

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """The metrics of one step."""

    time: int  # milliseconds since 1970
    step: int
    metrics: dict[str, float]
    child: str = ""  # the child run, such as a trial; "" = the run itself


class Position(NamedTuple):
    """A position between two records of the log."""

    number: int = 0  # number of records before it
    part: int = 0  # number of the first record in its part
    offset: int = 0  # bytes before it in its part


class MetricsLog:
    """A log to which records are appended, and from which they are read.

    On a local disk `metrics.jsonl` is one file, and every record is written immediately, so a SIGKILL loses nothing.
    On object storage, where objects cannot be appended to, it is a folder of parts. Each part is named after the number
    of its first record. Once a second, a thread writes the last part again with the new records, until it has
    PART_BYTES. So a SIGKILL loses at most the last second, a request has about 1 MiB at most, and 200,000 records of
    500 bytes are 100 objects.
    """

    def __init__(self, folder: str) -> None:
        self._uri = storage.join(folder, NAME)
        self._path = storage.local_path(self._uri)
        self._lock = threading.Lock()  # guards _unwritten; never held during I/O
        self._writing = threading.Lock()  # guards what is in storage; held during I/O
        self._unwritten: list[bytes] = []  # lines that are not in storage yet
        self._closed = threading.Event()
        self._is_failing = False
        self._last_part = b""  # content of the last part on object storage
        self._part_starts = [0]  # number of the first record of each part, in ascending order
        if self._path is not None:
            self.count = _repair(self._path)  # number of records in storage
            return
        if parts := _list_parts(self._uri):
            self._part_starts = sorted(parts)
            self._last_part = storage.read_bytes(parts[self._part_starts[-1]])
        self.count = self._part_starts[-1] + self._last_part.count(b"\n")
        self._begin_part_if_full()
        threading.Thread(target=self._flush_regularly, name="metrics", daemon=True).start()

    def append(self, *records: Record) -> None:
        """Append records. They are written before this returns on a local disk, and within 1 s on object storage."""
        lines = [_line(record) for record in records]
        with self._lock:
            self._unwritten += lines
        if self._path is not None:
            self.flush()

    def flush(self) -> None:
        """Write the records that are not in storage. If that fails, warn once and keep them for the next flush."""
        with self._writing:
            with self._lock:
                lines = list(self._unwritten)
            if not lines:
                return
            try:
                self._write(b"".join(lines))
            except OSError as error:
                if not self._is_failing:
                    message = "%s cannot be written; the records wait in memory, the job continues: %s"
                    log.warning(message, self._uri, error)
                self._is_failing = True
                return
            self._is_failing = False
            with self._lock:
                del self._unwritten[: len(lines)]
            self.count += len(lines)
            self._begin_part_if_full()

    def close(self) -> None:
        """Write the remaining records."""
        self._closed.set()
        self.flush()
        if self._unwritten:
            log.error("%d records could not be written to %s and are lost", len(self._unwritten), self._uri)

    def read(self, position: Position) -> tuple[list[Record], Position]:
        """Return about READ_BYTES of the records after `position`, and the position after them.

        Raises:
            OSError: storage failed, or a part has fewer records than were written.
        """
        number, part, offset = position
        while number < self.count:
            uri = self._uri if self._path is not None else _part_uri(self._uri, part)
            data = storage.read_range(uri, offset, offset + READ_BYTES)
            data = data[: data.rfind(b"\n") + 1]
            if data:
                records = _parse_lines(data)
                return records, Position(number + len(records), part, offset + len(data))
            if number not in self._part_starts or number == part:
                raise OSError(f"{uri} ends before record {self.count}; another program has changed it")
            part, offset = number, 0  # the next part begins with this record
        return [], Position(number, part, offset)

    def _write(self, data: bytes) -> None:
        if self._path is None:
            storage.write_bytes(_part_uri(self._uri, self._part_starts[-1]), self._last_part + data)
            self._last_part += data
            return
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "ab", buffering=0) as file:
            size, remaining = file.tell(), memoryview(data)
            try:
                while remaining:
                    remaining = remaining[file.write(remaining) :]
            except OSError:  # a full disk may have stored a part of a line
                file.truncate(size)
                raise

    def _begin_part_if_full(self) -> None:
        if len(self._last_part) >= PART_BYTES:
            self._part_starts.append(self.count)
            self._last_part = b""

    def _flush_regularly(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            self.flush()


def read_records(folder: str) -> Iterator[Record]:
    """Yield all records of a folder in their order, or nothing if it has no metrics."""
    for _, part_uri in sorted(_list_parts(storage.join(folder, NAME)).items()):
        yield from _parse_lines(storage.read_bytes(part_uri))


def history(folder: str, name: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a metric of the run in `folder`, with the latest value of a repeated step."""
    values = {r.step: r.metrics[name] for r in read_records(folder) if not r.child and name in r.metrics}
    return sorted(values.items())


def _list_parts(uri: str) -> dict[int, str]:
    """Return the URI of each part by the number of its first record."""
    if storage.local_path(uri) is not None:
        return {0: uri} if storage.exists(uri) else {}
    names = [name for name in storage.list_names(uri) if name.endswith(".jsonl")]
    return {int(name.removesuffix(".jsonl")): storage.join(uri, name) for name in names}


def _part_uri(uri: str, first: int) -> str:
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
    """Return the record as a line of JSON. NaN is written as NaN, which Python's JSON reader accepts."""
    child = {"child": record.child} if record.child else {}
    fields = {"time": record.time, "step": record.step, **child, "metrics": record.metrics}
    return json.dumps(fields).encode() + b"\n"


def _parse_lines(data: bytes) -> list[Record]:
    """Return the records of all complete lines."""
    return [Record(**json.loads(line)) for line in data[: data.rfind(b"\n") + 1].splitlines()]
