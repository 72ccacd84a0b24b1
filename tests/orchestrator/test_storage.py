"""One behaviour on every storage: whole or absent, create-only, honest listings, bounded retries."""

import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import storage
from tests.conftest import free_port


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


def test_create_only(root: str) -> None:
    uri = storage.join(root, "deep", "commit.json")
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert not storage.create_bytes(uri, b"first"), "the same bytes of another writer are still another writer's"
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_names(storage.join(root, "deep")) == ["commit.json"]


@pytest.mark.parametrize("root", ["local", "s3"], indirect=True)
def test_one_of_many_creators_wins(root: str) -> None:
    uri = storage.join(root, "commit")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(uri, bytes([i])), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == bytes([won.index(True)])


@pytest.mark.parametrize("root", ["local", "file", "s3"], indirect=True)  # fsspec's memory:// commits at once
def test_streamed_output_is_whole_or_absent(root: str) -> None:
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
    with pytest.raises(ValueError, match="not a relative name"):
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


class FaultProxy:
    """Stands before the S3 server and spoils the next connections: "503", "reset", "stall" (no answer for long),
    "cut" (half an answer) or "swallow" (the server acts, its answer is lost). One request a connection."""

    def __init__(self, endpoint: str) -> None:
        self.target = ("127.0.0.1", int(endpoint.rsplit(":", 1)[1]))
        self.faults: list[str] = []
        self.requests = 0
        self.port = free_port()
        self.server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            request = _read_message(client)
            if not request:
                return
            self.requests += 1
            fault = self.faults.pop(0) if self.faults else ""
            if fault == "503":
                body = b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"
                head = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
                client.sendall(head if request.startswith(b"HEAD") else head + body)
            elif fault == "stall":
                time.sleep(5)
            elif fault != "reset":
                server.sendall(_closing(request))
                answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
                if fault == "cut":
                    answer = answer[: len(answer) // 2 + 100]
                if fault != "swallow":
                    client.sendall(answer)


def _closing(message: bytes) -> bytes:
    return message.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


def _read_message(client: socket.socket) -> bytes:
    message = b""
    while b"\r\n\r\n" not in message:
        chunk = client.recv(1 << 16)
        if not chunk:
            return b""
        message += chunk
    head, _, body = message.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if fields.get(b"expect") == b"100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect"))
    while len(body) < int(fields.get(b"content-length", 0)):
        body += client.recv(1 << 16)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def faulty(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.server.close()


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "stall"])
def test_transient_faults_are_retried(
    fault: str, s3_bucket: str, faulty: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "read_timeout", 1.0)  # seconds
    uri, data = f"{s3_bucket}/x", bytes(range(256)) * 1000
    for operation in (
        lambda: storage.write_bytes(uri, data),
        lambda: storage.read_bytes(uri) == data or pytest.fail("other bytes"),
        lambda: storage.open_input(uri).read() == data or pytest.fail("other bytes"),
        lambda: storage.list_names(s3_bucket) == ["x"] or pytest.fail("not listed"),
        lambda: storage.create_bytes(f"{s3_bucket}/{fault}", data),
    ):
        faulty.faults = [fault]
        operation()


def test_a_create_whose_answer_was_lost_counts_as_done(s3_bucket: str, faulty: FaultProxy) -> None:
    faulty.faults = ["swallow"] * 4  # more than one request's own retries
    assert storage.create_bytes(f"{s3_bucket}/commit", b"attempt-1")
    assert not storage.create_bytes(f"{s3_bucket}/commit", b"attempt-2")


def test_endless_faults_end(s3_bucket: str, faulty: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "retries", {"total_max_attempts": 1})
    faulty.faults = ["503"] * 1000
    with pytest.raises(OSError, match=rf"cannot read .*{s3_bucket}/x"):
        storage.read_bytes(f"{s3_bucket}/x")
    assert faulty.requests < 50


def test_denied_names_the_uri_and_no_secret(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("fsspec.core.url_to_fs", _denying)
    with pytest.raises(PermissionError, match=f"access denied.*{s3_bucket}/x") as caught:
        storage.read_bytes(f"{s3_bucket}/x")
    assert "test-secret-key" not in str(caught.value)


def _denying(uri: str, **_: object) -> tuple[object, str]:
    class Denied:
        def cat_file(self, path: str) -> bytes:
            raise PermissionError("Access Denied")

    return Denied(), uri
