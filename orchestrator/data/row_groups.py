"""Row groups of Parquet shards, each by one request; a shard's footer is read once by each process."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage

_TAIL = 64 << 10  # bytes read at a shard's end: nearly always the whole footer


def read_row_group(uri: str, size: int, place: int, columns: tuple[str, ...]) -> pa.Table:
    """Read row group `place` of the shard at `uri`, of `size` bytes: columns, named by their paths in the schema.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is not a valid Parquet file of this size with these columns and this row group.
    """
    footer = _footer(uri, size)
    with _naming(uri):
        metadata = pq.read_metadata(pa.BufferReader(footer))
        begin, end = _extent(metadata, place, columns)
    window = _Window(begin, _read_range(uri, begin, end))
    with _naming(uri):
        return pq.ParquetFile(window, metadata=metadata).read_row_group(place, columns=list(columns)).flatten()


@lru_cache(maxsize=4096)  # kept as bytes, which take a tenth of the parsed form's memory
def _footer(uri: str, size: int) -> bytes:
    tail = _read_range(uri, max(0, size - _TAIL), size)
    with _naming(uri):
        if len(tail) < 8 or tail[-4:] != b"PAR1":
            raise pa.ArrowInvalid(f"there is no footer where it should end, at byte {size}")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    return tail[-length:] if length <= len(tail) else _read_range(uri, max(0, size - length), size)


def _extent(metadata: pq.FileMetaData, place: int, columns: tuple[str, ...]) -> tuple[int, int]:
    """Return where the bytes [begin, end) lie that hold some columns of a row group, and what is between them."""
    if not 0 <= place < metadata.num_row_groups:
        raise pa.ArrowInvalid(f"it has no row group {place}")
    group = metadata.row_group(place)
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    if missing := sorted(set(columns) - {chunk.path_in_schema for chunk in chunks}):
        raise pa.ArrowInvalid(f"it has no column {', '.join(missing)}")
    starts = [min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))) for chunk in chunks]
    return min(starts), max(map(lambda start, chunk: start + chunk.total_compressed_size, starts, chunks))


def _read_range(uri: str, begin: int, end: int) -> bytes:
    data = storage.read_range(uri, begin, end)
    with _naming(uri):
        if missing := end - begin - len(data):
            raise pa.ArrowInvalid(f"it has {missing} bytes fewer than it should")
    return data


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Name the shard in whatever is wrong with its bytes, which have been read already."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{uri} is not a sound Parquet shard: {error}") from error


class _Window(io.BytesIO):
    """A file of which only the bytes from `begin` on are there."""

    def __init__(self, begin: int, data: bytes) -> None:
        super().__init__(data)
        self._begin = begin

    def tell(self) -> int:
        return self._begin + super().tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._begin + super().seek(offset - (self._begin if whence == io.SEEK_SET else 0), whence)
