"""All kinds of storage behave alike: complete or absent objects, create-only writes, listings, bounded retries."""

import resource
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from orchestrator import storage
from tests.chaos.proxy import Fault, Proxy


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on each kind of storage."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket")) + "/run"
    return {
        "local": str(tmp_path / "run"),
        "file": f"file://{tmp_path}/run",
        "memory": f"memory://{uuid.uuid4().hex}/run",
    }[request.param]


def test_write_read_list_delete(root: str) -> None:
    names = ["a.json", "deep/er/c.bin", "deep/b.bin"]
    assert storage.list_names(root) == [] and storage.list_names(root, recursive=True) == []
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert storage.list_names(root) == ["a.json", "deep/"]
    assert storage.list_names(root, recursive=True) == sorted(names)
    assert storage.list_names(storage.join(root, "deep")) == ["b.bin", "er/"]
    assert storage.read_bytes(storage.join(root, "deep", "b.bin")) == b"deep/b.bin"
    storage.write_bytes(storage.join(root, "a.json"), b"again")
    assert storage.read_bytes(storage.join(root, "a.json")) == b"again"
    storage.delete(storage.join(root, "a.json"))
    storage.delete(storage.join(root, "a.json"))
    assert not storage.exists(storage.join(root, "a.json")) and storage.exists(storage.join(root, "deep/b.bin"))
    storage.delete(storage.join(root, "deep") + "/")
    storage.delete(storage.join(root, "deep") + "/")
    assert storage.list_names(root, recursive=True) == []


def test_a_new_object_shows_in_a_listing_made_before(root: str) -> None:
    for count in range(1, 4):
        storage.write_bytes(storage.join(root, f"{count}.bin"), b"x")
        assert len(storage.list_names(root)) == count


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1"])
def test_a_bucket_is_made_once_in_any_region(region: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    uri = f"s3://test-{uuid.uuid4().hex[:12]}"
    for _ in range(2):
        storage.make_bucket(uri)
        storage.write_bytes(f"{uri}/x", b"x")
    assert storage.list_names(uri) == ["x"]


def test_create_only(root: str) -> None:
    uri = storage.join(root, "deep", "commit.json")
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert not storage.put_if_absent(uri, b"first"), "the same bytes of another writer are still another writer's"
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_names(storage.join(root, "deep")) == ["commit.json"]


def test_a_file_in_the_place_of_a_folder_is_no_object_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"cannot create .*run/x"):
        storage.put_if_absent(str(tmp_path / "run" / "x"), b"")


@pytest.mark.parametrize("root", ["local", "s3"], indirect=True)
def test_one_of_many_creators_wins(root: str) -> None:
    uri = storage.join(root, "commit")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.put_if_absent(uri, bytes([i])), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == bytes([won.index(True)])


@pytest.mark.parametrize("root", ["local", "file", "s3"], indirect=True)  # fsspec's memory:// commits at once
def test_streamed_output_is_complete_or_absent(root: str) -> None:
    uri = storage.join(root, "shard.bin")
    data = bytes(range(256)) * (1 << 17)  # 32 MiB: more than one part
    with pytest.raises(RuntimeError, match="half way"), storage.open_output(uri) as file:
        file.write(data)
        raise RuntimeError("half way")
    assert not storage.exists(uri) and storage.list_names(root, recursive=True) == []
    with storage.open_output(uri) as file:
        for start in range(0, len(data), 3 << 20):
            file.write(data[start : start + (3 << 20)])
    assert storage.read_bytes(uri) == data
    with storage.open_output(uri) as file:
        file.write(b"small")
    assert storage.read_bytes(uri) == b"small"


def test_input_is_seekable(root: str) -> None:
    data = bytes(range(256)) * 10_000
    storage.write_bytes(storage.join(root, "x"), data)
    with storage.open_input(storage.join(root, "x")) as file:
        assert file.seek(-4, 2) == len(data) - 4 and file.read() == data[-4:]
        assert file.seek(100) == 100 and file.read(6) == data[100:106] and file.tell() == 106
        assert file.seek(0) == 0 and file.read() == data and file.read() == b""


def test_trees_are_listed_with_their_sizes(root: str) -> None:
    sizes = {"a.bin": 0, **{f"deep/{i}/{j}.bin": 10 * i + j for i in range(5) for j in range(3)}, "deep/x/y/z": 7}
    for name, size in sizes.items():
        storage.write_bytes(storage.join(root, name), bytes(size))
    assert dict(entry for folder in storage.list_tree(root) for entry in folder) == sizes
    assert storage.size_of(storage.join(root, "deep/4/2.bin")) == 42 and storage.size_of(root) is None
    with pytest.raises(FileNotFoundError, match="none"):
        storage.size_of(storage.join(root, "none"))


def test_many_ranges_are_read_in_their_order(root: str) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    for name in ("a", "deep/b"):
        storage.write_bytes(storage.join(root, name), data)
    rng = np.random.default_rng(1)
    ranges = [
        storage.Range(["a", "deep/b"][rng.integers(2)], int(start), int(rng.integers(3)) * 5_000)
        for start in rng.integers(0, len(data) - 10_000, 60)
    ]
    ranges += [ranges[3], storage.Range("a", 0, len(data)), storage.Range("a", len(data) - 1, 1)]
    assert storage.read_ranges(root, ranges) == [data[r.start : r.start + r.size] for r in ranges]
    assert storage.read_ranges(root, []) == []
    with pytest.raises(ValueError, match=r"deep/b ends at byte 3145728; expected 20 bytes at 3145720"):
        storage.read_ranges(root, [*ranges, storage.Range("deep/b", len(data) - 8, 20)])
    with pytest.raises(FileNotFoundError, match="none"):
        storage.read_ranges(root, [*ranges, storage.Range("none", 0, 1)])


def test_missing_objects_are_named_at_once(root: str) -> None:
    uri = storage.join(root, "nothing.bin")
    start = time.monotonic()
    for read in (storage.read_bytes, storage.open_input, storage.read_json):
        with pytest.raises(FileNotFoundError, match=r"nothing\.bin"):
            read(uri)
    assert not storage.exists(uri)
    assert time.monotonic() - start < 10, "not retried"


def test_json(root: str) -> None:
    uri = storage.join(root, "x.json")
    storage.write_json(uri, {"a": [1, 2.5, None], "ü": "ok"})
    assert storage.read_json(uri) == {"a": [1, 2.5, None], "ü": "ok"}
    storage.write_bytes(uri, b"{broken")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        storage.read_json(uri)
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(uri, float("nan"))


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.join("s3://bucket/run/", "a", "b/") == "s3://bucket/run/a/b"
    with pytest.raises(ValueError, match="expected a relative name"):
        storage.join("s3://bucket", "/etc")
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("runs/x") == str(tmp_path / "runs/x")
    assert storage.is_absolute("s3://bucket/x") and storage.is_absolute("/x") and not storage.is_absolute("x")
    assert storage.resolve("s3://bucket/x/") == "s3://bucket/x"
    with pytest.raises(ValueError, match="nosuch://x"):
        storage.read_bytes("nosuch://x")


def test_a_local_write_that_fails_leaves_the_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "x")
    storage.write_bytes(uri, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Yield a fault proxy in front of the storage, with shorter retries than usual."""
    proxy = Proxy(s3_server, seed=7)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 0.5)  # seconds
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "retries", {"total_max_attempts": 1})
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    yield proxy
    proxy.close()


DATA = bytes(range(256)) * 1000
LARGE = bytes(range(256)) * (1 << 17)  # 32 MiB: two parts of a streamed output


def stream_out(uri: str, data: bytes) -> None:
    with storage.open_output(uri) as file:
        for start in range(0, len(data), 3 << 20):
            file.write(data[start : start + (3 << 20)])


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "stall", "half", "swallow"])
def test_transient_faults_are_retried(fault: Fault, s3_bucket: str, proxy: Proxy) -> None:
    uri = f"{s3_bucket}/x"
    for operation in (
        lambda: storage.write_bytes(uri, DATA),
        lambda: storage.read_bytes(uri) == DATA or pytest.fail("other bytes"),
        lambda: storage.open_input(uri).read() == DATA or pytest.fail("other bytes"),
        lambda: storage.list_names(s3_bucket) == ["x"] or pytest.fail("not listed"),
        lambda: storage.exists(uri) or pytest.fail("not found"),
        lambda: storage.put_if_absent(f"{s3_bucket}/{fault}", DATA) or pytest.fail("not created"),
        lambda: storage.delete(f"{s3_bucket}/{fault}"),
        lambda: stream_out(uri, DATA),
    ):
        rule = proxy.add(fault, times=1)
        operation()
        assert len(rule.requests) == 1, "the fault befell nothing"
    assert storage.read_bytes(uri) == DATA and storage.list_names(s3_bucket) == ["x"]


def test_ranges_that_lie_close_together_share_a_request(
    s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_MERGED_BYTES", 4 << 20)
    storage.write_bytes(f"{s3_bucket}/x", bytes(6 << 20))

    def requests(count: int, gap: int, size: int) -> int:
        before = len(proxy.requests)
        found = storage.read_ranges(s3_bucket, [storage.Range("x", i * gap, size) for i in range(count)])
        assert found == [bytes(size)] * count
        return len(proxy.requests) - before

    assert requests(512, 1 << 12, 1 << 12) == 1
    assert requests(6, 1 << 20, 1 << 12) == 6, "what lies between is larger than a request is worth"
    assert requests(24, 1 << 18, 1 << 18) == 2, "no more than so much at once"
    for fault in ("503", "reset", "cut"):
        proxy.add(fault, times=1)
    assert requests(6, 1 << 20, 1 << 12) == 6 + 3


@pytest.mark.parametrize(
    ("fault", "request_kind"),
    [
        ("503", ("POST", "uploads")),  # beginning of the upload
        ("503", ("PUT", "partNumber=2")),
        ("half", ("PUT", "partNumber=2")),
        ("reset", ("POST", "uploadId")),  # its end
        ("swallow", ("POST", "uploadId")),
    ],
)
def test_long_faults_within_a_streamed_output(
    fault: Fault, request_kind: tuple[str, str], s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 10.0)  # seconds: parts are large
    rule = proxy.add(fault, *request_kind, times=2)  # more than one request's own retries
    stream_out(f"{s3_bucket}/x", LARGE)
    assert len(rule.requests) == 2
    assert storage.read_bytes(f"{s3_bucket}/x") == LARGE


def test_an_upload_cut_half_way_leaves_no_object(s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "0.5")
    rule = proxy.add("half", "PUT|POST", "x")
    for write in (storage.write_bytes, storage.put_if_absent, stream_out):
        befallen = len(rule.requests)
        with pytest.raises(OSError, match=rf"cannot .*{s3_bucket}/x"):
            write(f"{s3_bucket}/x", DATA)
        assert len(rule.requests) > befallen
    proxy.remove(rule)
    assert not storage.exists(f"{s3_bucket}/x") and storage.list_names(s3_bucket, recursive=True) == []
    storage.write_bytes(f"{s3_bucket}/x", DATA)
    assert storage.read_bytes(f"{s3_bucket}/x") == DATA


def test_a_slow_upload_is_not_a_stalled_one(s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 3.0)  # seconds
    rule = proxy.add("slow", "PUT")
    storage.write_bytes(f"{s3_bucket}/x", LARGE)  # four seconds of sending, half a second of waiting
    assert len(rule.requests) == 1, "it was taken for a stalled one, and sent again"
    assert storage.read_bytes(f"{s3_bucket}/x") == LARGE


def test_a_create_whose_response_was_lost_counts_as_done(s3_bucket: str, proxy: Proxy) -> None:
    proxy.add("swallow", "PUT", "commit", times=2)  # more than one request's own retries
    assert storage.put_if_absent(f"{s3_bucket}/commit", b"attempt-1")
    assert not storage.put_if_absent(f"{s3_bucket}/commit", b"attempt-2")


def test_endless_faults_end(s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "3")
    rule = proxy.add("503")
    with pytest.raises(OSError, match=rf"cannot read .*{s3_bucket}/x"):
        storage.read_bytes(f"{s3_bucket}/x")
    assert len(rule.requests) >= 2


def test_random_faults_are_survived(s3_bucket: str, proxy: Proxy) -> None:
    for fault in ("503", "reset", "cut", "half", "swallow"):
        proxy.add(fault, probability=0.06)
    for number in range(30):
        storage.write_bytes(f"{s3_bucket}/{number}", DATA)
        assert storage.put_if_absent(f"{s3_bucket}/create/{number}", DATA)
        assert storage.read_bytes(f"{s3_bucket}/create/{number}") == DATA
    assert storage.list_names(f"{s3_bucket}/create") == sorted(map(str, range(30)))
    assert all(proxy.faults().values()), f"some fault befell nothing: {proxy.faults()}"


@pytest.mark.parametrize("write", [storage.write_bytes, storage.put_if_absent, stream_out])
def test_a_full_disk_is_one_clear_error(write: Callable[[str, bytes], object], tmp_path: Path) -> None:
    uri = str(tmp_path / "run" / "x")
    with _file_size_limit(1 << 20), pytest.raises(OSError, match=r"cannot (write|create): .*run/x'") as caught:
        write(uri, LARGE)
    assert "too large" in str(caught.value).lower() and "Errno" not in str(caught.value)
    assert list((tmp_path / "run").iterdir()) == [], "nothing half written stays"
    write(uri, DATA)
    assert storage.read_bytes(uri) == DATA


@contextmanager
def _file_size_limit(limit: int) -> Iterator[None]:
    """Limit the size of this process's files, which looks like a full disk to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
