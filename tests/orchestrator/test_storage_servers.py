"""S3 servers that differ from AWS or refuse requests: what works, and the message for each refusal."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs

from orchestrator import doctor, storage, storage_errors
from tests import servers
from tests.chaos.proxy import Fault, Proxy

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
LARGE = bytes(range(256)) * (1 << 17)  # 32 MiB: two parts of a streamed output
CHECKSUMS = r"^(x-amz-checksum|x-amz-sdk-checksum|x-amz-trailer)"


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Yield a fault proxy in front of the storage, with retries that do not wait."""
    proxy = Proxy(s3_server, seed=7)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setitem(storage._S3_OPTIONS["config_kwargs"], "retries", {"total_max_attempts": 1})
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    yield proxy
    proxy.close()


def stream_out(uri: str, data: bytes) -> None:
    with storage.open_output(uri) as file:
        file.write(data)


def one_line(error: BaseException) -> str:
    """Return the message of an error, which must be readable."""
    said = str(error)
    assert "\n" not in said and "Errno" not in said and "Error" not in said.replace("ClientError", "Error"), said
    return said


def test_a_server_that_rejects_checksum_headers(s3_bucket: str, proxy: Proxy) -> None:
    proxy.add("bad header", header=r"\n" + CHECKSUMS.removeprefix("^"))
    storage.write_bytes(f"{s3_bucket}/x", b"data")
    assert storage.put_if_absent(f"{s3_bucket}/run/claim", b"claim")
    stream_out(f"{s3_bucket}/run/large", LARGE)
    assert storage.read_bytes(f"{s3_bucket}/run/large") == LARGE
    storage.delete(f"{s3_bucket}/run/")
    assert storage.list_names(s3_bucket, recursive=True) == ["x"]


def test_a_server_without_deletion_of_several_objects(s3_bucket: str, proxy: Proxy) -> None:
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
    assert not storage.put_if_absent(f"{s3_bucket}/config.json", b"mine"), "nothing is put where something is"
    with pytest.raises(OSError, match="If-None-Match") as caught:
        storage.put_if_absent(f"{s3_bucket}/new", b"mine")
    assert f"{s3_bucket}/new" in one_line(caught.value) and "docs/cluster.md" in str(caught.value)
    assert len(rule.requests) <= 2, "not retried"
    assert storage.read_bytes(f"{s3_bucket}/config.json") == b"of another run"
    found = doctor._store(s3_bucket, 1)
    assert found.level == "WRONG" and "If-None-Match" in found.words


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
    ("fault", "words", "advice"),
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
    operation: str, fault: Fault, words: str, advice: str, s3_bucket: str, proxy: Proxy
) -> None:
    """A refused HEAD has no body with a reason, but the message has one."""
    rule = proxy.add(fault)
    with pytest.raises(OSError, match=words) as caught:
        OPERATIONS[operation](f"{s3_bucket}/x")
    said = one_line(caught.value)
    assert advice in said and f"{s3_bucket}/x" in said
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
    found = doctor._store(s3_bucket, 1)
    assert found.level == "warning" and "cannot delete" in found.words


def test_an_outage_longer_than_any_number_of_tries_is_survived(s3_bucket: str, proxy: Proxy) -> None:
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
    (said,) = [record.getMessage() for record in caplog.records if record.name == "orchestrator.storage_errors"]
    assert f"{s3_bucket}/x" in said and "retries for up to 300 s" in said


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
    """Let the credentials come from the metadata service of an instance only."""
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
        assert metadata.served > fetched, "the session is the old one"


def test_no_password_of_an_endpoint_is_shown(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden-word@127.0.0.1:9")
    monkeypatch.setenv("ADMIRAL_STORAGE_RETRY_SECONDS", "0")
    with pytest.raises(OSError, match="cannot read") as caught:
        storage.read_bytes(f"s3://{uuid.uuid4().hex}/x")
    assert "hidden-word" not in str(caught.value)
