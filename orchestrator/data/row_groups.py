"""Row groups of Parquet shards, each by one request; a shard's footer is read once by each process."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage

_TAIL = 64 << 10  # bytes read at a shard's end: nearly always the whole footer
_MAGIC = b"PAR1"


def read_row_group(uri: str, size: int, place: int, columns: tuple[str, ...]) -> pa.Table:
    """Row group `place` of the shard at `uri`, of `size` bytes: columns, named by their paths in the schema.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is not a sound Parquet file of this size with these columns and this row group.
    """
    footer = _footer(uri, size)
    with _sound(uri):
        metadata = pq.read_metadata(pa.BufferReader(footer))
        begin, end = _extent(metadata, place, columns)
    window = _Window(begin, _whole_range(uri, begin, end))
    with _sound(uri):
        return pq.ParquetFile(window, metadata=metadata).read_row_group(place, columns=list(columns)).flatten()


@lru_cache(maxsize=4096)  # kept as bytes, which take a tenth of the parsed form's memory
def _footer(uri: str, size: int) -> bytes:
    tail = _whole_range(uri, max(0, size - _TAIL), size)
    with _sound(uri):
        if len(tail) < 8 or tail[-4:] != _MAGIC:
            raise pa.ArrowInvalid(f"there is no footer where it should end, at byte {size}")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > len(tail):
        tail = _whole_range(uri, max(0, size - length), size)
    return tail[-length:]


def _extent(metadata: pq.FileMetaData, place: int, columns: tuple[str, ...]) -> tuple[int, int]:
    """The bytes [begin, end) of some columns of a row group, and of what lies between them."""
    if not 0 <= place < metadata.num_row_groups:
        raise pa.ArrowInvalid(f"it has no row group {place}")
    group = metadata.row_group(place)
    chunks = [group.column(i) for i in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    if missing := sorted(set(columns) - {chunk.path_in_schema for chunk in wanted}):
        raise pa.ArrowInvalid(f"it has no column {', '.join(missing)}")
    starts = [min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))) for chunk in wanted]
    ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, wanted, strict=True)]
    return min(starts), max(ends)


def _whole_range(uri: str, begin: int, end: int) -> bytes:
    data = storage.read_range(uri, begin, end)
    with _sound(uri):
        if missing := end - begin - len(data):
            raise pa.ArrowInvalid(f"it has {missing} bytes fewer than it should")
    return data


@contextmanager
def _sound(uri: str) -> Iterator[None]:
    """Name the shard in whatever is wrong with its bytes, which are here already."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{uri} is not a sound Parquet shard: {error}") from error


class _Window(io.RawIOBase):
    """A file of which only the bytes from `begin` on are here."""

    def __init__(self, begin: int, data: bytes) -> None:
        self._begin, self._data, self._position = begin, memoryview(data), begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._begin + len(self._data)
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: end}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position - self._begin
        if start < 0:
            raise OSError(f"byte {self._position} was not fetched")
        data = self._data[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
