"""Read row groups of Parquet shards. Each takes one request, and each process reads a shard's footer once."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage

_TAIL = 64 << 10  # bytes read at the end of a shard, which nearly always include the whole footer


def read_row_group(uri: str, size: int, index: int, columns: tuple[str, ...]) -> pa.Table:
    """Return columns of row group `index` of the shard at `uri`, which has `size` bytes.

    columns: paths of columns in the schema, such as image.bytes, which are also the names of the table's columns.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is not a valid Parquet file of this size with these columns and this row group.
    """
    footer = _footer(uri, size)
    with _shard_errors(uri):
        metadata = pq.read_metadata(pa.BufferReader(footer))
        begin, end = _byte_range(metadata, index, columns)
    window = _Window(begin, _read_range(uri, begin, end))
    with _shard_errors(uri):
        return pq.ParquetFile(window, metadata=metadata).read_row_group(index, columns=list(columns)).flatten()


@lru_cache(maxsize=4096)  # the cache holds bytes, because a parsed footer needs ten times as much memory
def _footer(uri: str, size: int) -> bytes:
    """Return the footer of a shard of `size` bytes: its metadata, 4 bytes with their length, and PAR1."""
    tail = _read_range(uri, max(0, size - _TAIL), size)
    with _shard_errors(uri):
        if len(tail) < 8 or tail[-4:] != b"PAR1":
            raise pa.ArrowInvalid(f"there is no footer at the end of its {size} bytes")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    return tail[-length:] if length <= len(tail) else _read_range(uri, max(0, size - length), size)


def _byte_range(metadata: pq.FileMetaData, index: int, columns: tuple[str, ...]) -> tuple[int, int]:
    """Return the range [begin, end) of bytes that contains some columns of a row group."""
    if not 0 <= index < metadata.num_row_groups:
        raise pa.ArrowInvalid(f"it has no row group {index}")
    row_group = metadata.row_group(index)
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    if missing := sorted(set(columns) - {chunk.path_in_schema for chunk in chunks}):
        raise pa.ArrowInvalid(f"it has no column {', '.join(missing)}")
    starts = [min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))) for chunk in chunks]
    ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)]
    return min(starts), max(ends)


def _read_range(uri: str, begin: int, end: int) -> bytes:
    """Return exactly the bytes [begin, end) of a shard; raise ValueError if it has fewer."""
    data = storage.read_range(uri, begin, end)
    with _shard_errors(uri):
        if missing := end - begin - len(data):
            raise pa.ArrowInvalid(f"{missing} bytes are missing")
    return data


@contextmanager
def _shard_errors(uri: str) -> Iterator[None]:
    """Turn Arrow's errors into ValueErrors that name the shard.

    The bytes are in memory already, so an OSError of Arrow means invalid content and not a failure of storage.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{uri} is not a valid Parquet shard: {error}; prepare the dataset again") from error


class _Window(io.BytesIO):
    """A file of which only the bytes from `begin` on are in memory; offsets are those in the whole file."""

    def __init__(self, begin: int, data: bytes) -> None:
        super().__init__(data)
        self._begin = begin

    def tell(self) -> int:
        return self._begin + super().tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._begin + super().seek(offset - (self._begin if whence == io.SEEK_SET else 0), whence)
