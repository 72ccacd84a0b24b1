"""A row group takes one request, a footer one request a process, and a damaged shard raises one clear error."""

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator import storage
from orchestrator.data import row_groups
from orchestrator.data.dataset import Manifest
from orchestrator.data.row_groups import read_row_group
from tests import servers
from tests.chaos.proxy import Proxy
from tests.synthetic import write_dataset

COLUMNS = ("label", "image")


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    """Yield a proxy through which this process uses the S3 server."""
    proxy = Proxy(s3_server)
    with servers.environment(AWS_ENDPOINT_URL=proxy.endpoint):
        yield proxy
    proxy.close()


def make_dataset(folder: str) -> Manifest:
    """Write two shards of eight row groups of four rows. Their images cannot be decoded, which no test needs."""
    row_groups._footer.cache_clear()
    return write_dataset(
        folder, [bytes([i]) * (1000 + i) for i in range(64)], sizes=[(1, 1)] * 64, rows=64, row_group=4
    )


def test_a_row_group_is_one_request_and_a_footer_one_for_all(s3_bucket: str, proxy: Proxy) -> None:
    manifest = make_dataset(s3_bucket)
    for shard in manifest.shards("train"):
        uri = storage.join(manifest.folder, shard.path)
        table = pq.read_table(storage.open_input(uri), columns=list(COLUMNS))
        before = len(proxy.requests)
        for number in (3, 0, 7, 5):
            row_group = read_row_group(uri, shard.bytes, number, COLUMNS)
            assert row_group.equals(table.slice(4 * number, 4))
        requests = proxy.requests[before:]
        assert [request.method for request in requests] == ["GET"] * 5, "the footer's and four row groups'"
        groups = [pq.ParquetFile(storage.open_input(uri)).metadata.row_group(number) for number in (3, 0, 7, 5)]
        for request, group in zip(requests[1:], groups, strict=True):
            label, image = group.column(1), group.column(2)
            first, end = label.dictionary_page_offset, image.dictionary_page_offset + image.total_compressed_size
            assert request.part == f"bytes={first}-{end - 1}", "both columns, and not a byte more"


def test_faults_are_retried(s3_bucket: str, proxy: Proxy) -> None:
    shard = make_dataset(s3_bucket).shards("train")[0]
    uri = storage.join(s3_bucket, shard.path)
    rules = [proxy.add("503", "GET", shard.path, times=2), proxy.add("reset", "GET", shard.path, times=2)]
    rules.append(proxy.add("cut", "GET", shard.path, times=1))
    assert read_row_group(uri, shard.bytes, 1, COLUMNS)["label"].to_pylist() == [4, 5, 6, 7]
    assert [len(rule.requests) for rule in rules] == [2, 2, 1]


def test_damaged_shards_raise_one_clear_error(s3_bucket: str, tmp_path: Path) -> None:
    for folder in (s3_bucket, str(tmp_path)):
        first, second = make_dataset(folder).shards("train")
        uri = storage.join(folder, first.path)
        data = storage.read_bytes(uri)
        length = int.from_bytes(data[-8:-4], "little")
        for broken, problem in [
            (data[:-1], "1 bytes are missing"),
            (data[: len(data) // 2], "bytes are missing"),
            (data[:100], "bytes are missing"),
            (b"", "bytes are missing"),
            (b"x" + data, "no footer"),
            (data[: -length - 8] + b"\xff" * length + data[-8:], ""),
            (b"\xff" * 8000 + data[8000:], ""),
        ]:
            row_groups._footer.cache_clear()
            storage.write_bytes(uri, broken)
            with pytest.raises(ValueError, match=re.escape(uri) + f" is not a valid Parquet shard: .*{problem}"):
                read_row_group(uri, first.bytes, 0, COLUMNS)
        row_groups._footer.cache_clear()
        storage.delete(uri)
        with pytest.raises(FileNotFoundError, match=re.escape(uri)):
            read_row_group(uri, first.bytes, 0, COLUMNS)
        uri = storage.join(folder, second.path)
        with pytest.raises(ValueError, match="has no column picture"):
            read_row_group(uri, second.bytes, 0, ("label", "picture"))
        with pytest.raises(ValueError, match="has no row group 8"):
            read_row_group(uri, second.bytes, 8, COLUMNS)


def test_a_footer_longer_than_the_tail_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "_TAIL", 64)
    shard = make_dataset(str(tmp_path)).shards("train")[1]
    table = read_row_group(str(tmp_path / shard.path), shard.bytes, 2, COLUMNS)
    assert table["label"].to_pylist() == [0, 1, 2, 3]  # rows 40 to 43 of ten classes
