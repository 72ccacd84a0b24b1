"""S3 servers that fail for a while, differ from AWS, or refuse requests. Each refusal has its own message."""

import http.server
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from orchestrator import doctor, storage, storage_errors, storage_s3
from tests import servers
from tests.chaos.proxy import Fault, Proxy

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
DATA = bytes(range(256)) * 1000
LARGE = bytes(range(256)) * (1 << 17)  # 32 MiB: two parts of a streamed output


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Yield a fault proxy in front of the storage, with retries that do not wait."""
    proxy = Proxy(s3_server, seed=7)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setitem(storage_s3.CONFIG, "retries", {"total_max_attempts": 1})
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    yield proxy
    proxy.close()


def stream_out(uri: str, data: bytes) -> None:
    with storage.open_output(uri) as file:
        for start in range(0, len(data), 3 << 20):
            file.write(data[start : start + (3 << 20)])


def one_line(error: BaseException) -> str:
    """Return the message of an error, which must be readable."""
    message = str(error)
    assert "\n" not in message and "Errno" not in message, message
    assert "Error" not in message.replace("ClientError", "Error"), message
    return message


# ------------------------------------------------------------------------------------------------ transient faults


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "stall", "half", "swallow"])
def test_transient_faults_are_retried(
    fault: Fault, s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(storage_s3.CONFIG, "read_timeout", 0.5)  # seconds
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
        assert len(rule.requests) == 1, "the fault did not occur"
    assert storage.read_bytes(uri) == DATA and storage.list_names(s3_bucket) == ["x"]


def test_ranges_that_lie_close_together_share_a_request(
    s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_MERGED_BYTES", 4 << 20)
    storage.write_bytes(f"{s3_bucket}/x", bytes(6 << 20))

    def requests(count: int, gap: int, size: int) -> int:
        before = len(proxy.requests)
        data = storage.read_ranges(s3_bucket, [storage.Range("x", i * gap, size) for i in range(count)])
        assert data == [bytes(size)] * count
        return len(proxy.requests) - before

    assert requests(512, 1 << 12, 1 << 12) == 1
    assert requests(6, 1 << 20, 1 << 12) == 6, "large gaps between ranges are not read"
    assert requests(24, 1 << 18, 1 << 18) == 2, "a request reads at most 4 MiB"
    for fault in ("503", "reset", "cut"):
        proxy.add(fault, times=1)
    assert requests(6, 1 << 20, 1 << 12) == 6 + 3


@pytest.mark.parametrize(
    ("fault", "request_kind"),
    [
        ("503", ("POST", "uploads")),  # the upload is created
        ("503", ("PUT", "partNumber=2")),
        ("half", ("PUT", "partNumber=2")),
        ("reset", ("POST", "uploadId")),  # the upload is completed
        ("swallow", ("POST", "uploadId")),
    ],
)
def test_faults_within_a_streamed_output_are_retried(
    fault: Fault, request_kind: tuple[str, str], s3_bucket: str, proxy: Proxy
) -> None:
    rule = proxy.add(fault, *request_kind, times=2)
    stream_out(f"{s3_bucket}/x", LARGE)
    assert len(rule.requests) == 2
    assert storage.read_bytes(f"{s3_bucket}/x") == LARGE


def test_an_interrupted_upload_leaves_no_object(s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "0.5")
    rule = proxy.add("half", "PUT|POST", "x")
    for write in (storage.write_bytes, storage.put_if_absent, stream_out):
        before = len(rule.requests)
        with pytest.raises(OSError, match=rf"cannot .*{s3_bucket}/x"):
            write(f"{s3_bucket}/x", DATA)
        assert len(rule.requests) > before
    proxy.remove(rule)
    assert not storage.exists(f"{s3_bucket}/x") and storage.list_names(s3_bucket, recursive=True) == []
    storage.write_bytes(f"{s3_bucket}/x", DATA)
    assert storage.read_bytes(f"{s3_bucket}/x") == DATA


def test_a_slow_upload_is_not_sent_again(s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage_s3.CONFIG, "read_timeout", 3.0)  # seconds
    rule = proxy.add("slow", "PUT")
    storage.write_bytes(f"{s3_bucket}/x", LARGE)  # four seconds of sending, half a second of waiting
    assert len(rule.requests) == 1, "it was taken for a stalled upload and sent again"
    assert storage.read_bytes(f"{s3_bucket}/x") == LARGE


def test_random_faults_are_survived(s3_bucket: str, proxy: Proxy) -> None:
    for fault in ("503", "reset", "cut", "half", "swallow"):
        proxy.add(fault, probability=0.06)
    for number in range(30):
        storage.write_bytes(f"{s3_bucket}/{number}", DATA)
        assert storage.put_if_absent(f"{s3_bucket}/create/{number}", DATA)
        assert storage.read_bytes(f"{s3_bucket}/create/{number}") == DATA
    assert storage.list_names(f"{s3_bucket}/create") == sorted(map(str, range(30)))
    assert all(proxy.faults().values()), f"a fault did not occur: {proxy.faults()}"


# ------------------------------------------------------------------------------------------------ other servers


def test_a_server_that_rejects_checksum_headers_is_supported(s3_bucket: str, proxy: Proxy) -> None:
    proxy.add("bad header", header=r"\n(x-amz-checksum|x-amz-sdk-checksum|x-amz-trailer)")
    storage.write_bytes(f"{s3_bucket}/x", b"data")
    assert storage.put_if_absent(f"{s3_bucket}/run/claim", b"claim")
    stream_out(f"{s3_bucket}/run/large", LARGE)
    assert storage.read_bytes(f"{s3_bucket}/run/large") == LARGE
    storage.delete(f"{s3_bucket}/run/")
    assert storage.list_names(s3_bucket, recursive=True) == ["x"]


def test_a_server_without_deletion_of_several_objects_is_supported(s3_bucket: str, proxy: Proxy) -> None:
    proxy.add("unsupported", "POST", r"\?delete")
    for name in ("a", "b/c", "b/d"):
        storage.write_bytes(f"{s3_bucket}/run/{name}", b"data")
    storage.delete(f"{s3_bucket}/run/")
    assert storage.list_names(s3_bucket, recursive=True) == []


@pytest.mark.parametrize("fault", ["unsupported", "unconditional"])
def test_a_server_without_conditional_writes_is_refused(fault: Fault, s3_bucket: str, proxy: Proxy) -> None:
    """The fault `unconditional` ignores the header, so that two writers could overwrite each other silently."""
    storage.write_bytes(f"{s3_bucket}/config.json", b"of another run")
    rule = proxy.add(fault, header="if-none-match")
    assert not storage.put_if_absent(f"{s3_bucket}/config.json", b"mine"), "an existing object is not replaced"
    with pytest.raises(OSError, match="If-None-Match") as caught:
        storage.put_if_absent(f"{s3_bucket}/new", b"mine")
    assert f"{s3_bucket}/new" in one_line(caught.value) and "docs/cluster.md" in str(caught.value)
    assert len(rule.requests) <= 2, "not retried"
    assert storage.read_bytes(f"{s3_bucket}/config.json") == b"of another run"
    finding = doctor._store(s3_bucket, 1)
    assert finding.level == "WRONG" and "If-None-Match" in finding.text


def test_conditional_writes_are_verified_once(s3_bucket: str, proxy: Proxy) -> None:
    assert all(storage.put_if_absent(f"{s3_bucket}/{number}", b"") for number in range(3))
    puts = [request for request in proxy.requests if request.method == "PUT"]
    assert len(puts) == 3 + 1


OPERATIONS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "write": lambda uri: storage.write_bytes(uri, b"data"),
    "stream": lambda uri: stream_out(uri, LARGE),
    "create": lambda uri: storage.put_if_absent(f"{uri}.new", b"data"),
    "look up": storage.exists,
    "open": storage.open_input,
    "list": storage.list_names,
    "walk": lambda uri: storage.list_names(uri, recursive=True),
    "delete": storage.delete,
}


@pytest.mark.parametrize(
    ("fault", "reason", "advice"),
    [
        ("redirect", "the bucket is in another region", "AWS_REGION"),
        ("skewed", "clock", "NTP"),
        ("quota", "quota", "delete"),
        ("archived", "archived", "restore"),
        ("denied", "access denied", "credentials"),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_refusal_has_its_own_message(
    operation: str, fault: Fault, reason: str, advice: str, s3_bucket: str, proxy: Proxy
) -> None:
    """A refused HEAD has no body with a reason, but the message has one."""
    rule = proxy.add(fault)
    with pytest.raises(OSError, match=reason) as caught:
        OPERATIONS[operation](f"{s3_bucket}/x")
    message = one_line(caught.value)
    assert advice in message and f"{s3_bucket}/x" in message
    assert len(rule.requests) <= 4, "not retried"
    assert isinstance(caught.value, PermissionError) == (fault == "denied")


def test_a_redirect_without_a_target_ends(s3_bucket: str, proxy: Proxy) -> None:
    proxy.add("lost redirect")
    for operation in ("look up", "read", "create", "list"):
        with pytest.raises(OSError, match="the bucket is in another region"):
            OPERATIONS[operation](f"{s3_bucket}/x")


def test_a_writer_that_may_not_delete_gets_an_error(s3_bucket: str, proxy: Proxy) -> None:
    storage.write_bytes(f"{s3_bucket}/run/x", b"data")
    proxy.add("denied", "DELETE")
    proxy.add("denied", "POST", r"\?delete")
    for uri in (f"{s3_bucket}/run/x", f"{s3_bucket}/run/"):
        with pytest.raises(PermissionError, match="cannot delete: access denied"):
            storage.delete(uri)
    finding = doctor._store(s3_bucket, 1)
    assert finding.level == "warning" and "cannot delete" in finding.text


def test_an_outage_of_40_failures_is_survived(s3_bucket: str, proxy: Proxy) -> None:
    uri = f"{s3_bucket}/x"
    for operation in (
        lambda: storage.write_bytes(uri, b"data"),
        lambda: storage.read_bytes(uri),
        lambda: stream_out(uri, LARGE),
        lambda: storage.put_if_absent(f"{uri}.new", b"data"),
        lambda: storage.delete(uri),
    ):
        rule = proxy.add("reset", times=40)
        operation()
        assert len(rule.requests) == 40


def test_a_long_outage_is_logged_once(
    s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_errors, "_REPORT_SECONDS", 0.0)
    proxy.add("503", times=10)
    storage.write_bytes(f"{s3_bucket}/x", b"data")
    (message,) = [record.getMessage() for record in caplog.records if record.name == "orchestrator.storage_errors"]
    assert f"{s3_bucket}/x" in message and "retries for up to 300 s" in message


def test_retries_are_bounded_by_one_setting(s3_bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = proxy.add("503")
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "0")
    with pytest.raises(OSError, match="ADMIRAL_STORAGE_RETRY_SECONDS"):
        storage.write_bytes(f"{s3_bucket}/x", b"data")
    assert len(rule.requests) == 1
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "soon")
    with pytest.raises(ValueError, match="ADMIRAL_STORAGE_RETRY_SECONDS=soon"):
        storage.write_bytes(f"{s3_bucket}/x", b"data")


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[servers.MetadataService]:
    """Yield a metadata service of an instance, which is the only source of credentials."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    s3fs.S3FileSystem.clear_instance_cache()
    with servers.metadata_service() as service:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.endpoint)
        yield service
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_metadata_service_that_fails_once_is_retried(
    s3_bucket: str, proxy: Proxy, metadata: servers.MetadataService
) -> None:
    metadata.failures = 1
    storage.write_bytes(f"{s3_bucket}/x", b"data")
    assert metadata.failures == 0 and storage.read_bytes(f"{s3_bucket}/x") == b"data"


def test_missing_credentials_are_not_cached(s3_bucket: str, proxy: Proxy, metadata: servers.MetadataService) -> None:
    metadata.failures = 1000
    with pytest.raises(PermissionError, match="cannot write: access denied"):
        storage.write_bytes(f"{s3_bucket}/x", b"data")
    metadata.failures = 0
    storage.write_bytes(f"{s3_bucket}/x", b"data")


def test_expired_credentials_are_fetched_again(s3_bucket: str, proxy: Proxy, metadata: servers.MetadataService) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"data")
    for method in ("GET", "PUT"):
        fetched = metadata.served
        proxy.add("expired", method, times=1)
        assert storage.read_bytes(f"{s3_bucket}/x") == b"data"
        storage.write_bytes(f"{s3_bucket}/x", b"data")
        assert metadata.served > fetched, "the expired credentials were used again"


def test_no_password_of_an_endpoint_is_shown(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden-word@127.0.0.1:9")
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "0")
    with pytest.raises(OSError, match="cannot read") as caught:
        storage.read_bytes(f"s3://{uuid.uuid4().hex}/x")
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (401, PermissionError, "access denied"),
        (403, PermissionError, "access denied"),
        (404, FileNotFoundError, "no such object"),
        (410, OSError, "410"),
        (503, OSError, "it was retried for 0.2 s"),
    ],
)
def test_a_refusal_by_a_web_server_is_one_line_and_not_retried(
    status: int, kind: type[OSError], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(status)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "0.2")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with pytest.raises(kind, match=reason) as caught:
        storage.read_bytes(f"http://127.0.0.1:{server.server_port}/weights.pt")
    server.shutdown()
    assert "weights.pt" in one_line(caught.value)
    assert (len(requests) == 1) == (status < 500)
