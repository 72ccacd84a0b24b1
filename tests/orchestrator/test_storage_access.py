"""Access to S3 servers: endpoints, addressing, region, profiles, web identity, and no credentials."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from orchestrator import storage

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(autouse=True)
def _fresh_connections() -> Iterator[None]:
    """Forget the filesystems of earlier tests, which keep their credentials."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove all credentials from the environment and the home folder; return a folder for files."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


def signed_url(uri: str) -> str:
    """Return the URL that the client would request for an object. Nothing is sent."""
    _, filesystem, path = storage._locate(uri)
    return str(filesystem.sign(path))


@pytest.mark.parametrize(
    ("endpoint", "style", "start"),
    [
        ("http://minio.example:9000", None, "http://minio.example:9000/bucket/key?"),
        ("http://minio.example:9000", "path", "http://minio.example:9000/bucket/key?"),
        ("http://rgw.example", "virtual", "http://bucket.rgw.example/key?"),
        ("https://account.r2.example", None, "https://account.r2.example/bucket/key?"),
        (None, None, "https://bucket.s3.amazonaws.com/key?"),
        (None, "path", "https://s3.eu-west-1.amazonaws.com/bucket/key?"),
    ],
)
def test_the_bucket_is_in_the_path_or_in_the_host(
    endpoint: str | None, style: str | None, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ENDPOINT_URL": endpoint, "ADMIRAL_S3_ADDRESSING": style}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    url = signed_url("s3://bucket/key")
    if endpoint is None and style is None:
        url = url.replace("bucket.s3.eu-west-1.", "bucket.s3.")  # both are endpoints of AWS
    assert url.startswith(start)


def test_the_region_is_signed_for(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert "eu-north-1" in signed_url("s3://bucket/key")


def test_a_profile_gives_credentials_and_addressing(
    monkeypatch: pytest.MonkeyPatch, without_keys: Path, s3_server: str
) -> None:
    (without_keys / "credentials").write_text(
        "[team]\naws_access_key_id = key-of-the-team\naws_secret_access_key = secret\n"
    )
    (without_keys / "config").write_text("[profile team]\nregion = eu-west-1\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_PROFILE", "team")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example")
    url = signed_url("s3://bucket/key")
    assert url.startswith("http://bucket.store.example/key?") and "key-of-the-team" in url
    _, filesystem, _ = storage._locate("s3://bucket/key")
    assert filesystem.s3.meta.region_name == "eu-west-1"


def test_a_web_identity_reads_and_writes(
    monkeypatch: pytest.MonkeyPatch, s3_server: str, s3_bucket: str, without_keys: Path
) -> None:
    (without_keys / "token").write_text("a.token.of-the-pod")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/admiral")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(without_keys / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", s3_server)
    storage.write_bytes(f"{s3_bucket}/object", b"data")
    assert storage.read_bytes(f"{s3_bucket}/object") == b"data"
    assert "x-amz-security-token" in signed_url(f"{s3_bucket}/object"), "the credentials are temporary"


def test_public_data_needs_no_credentials(
    monkeypatch: pytest.MonkeyPatch, s3_server: str, s3_bucket: str, without_keys: Path
) -> None:
    writer = s3fs.S3FileSystem(endpoint_url=s3_server, key="test", secret="test")
    writer.pipe_file(f"{s3_bucket}/object", b"data", ACL="public-read")
    with pytest.raises(PermissionError, match="access denied"):
        storage.read_bytes(f"{s3_bucket}/object")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("ADMIRAL_S3_ANONYMOUS", "1")
    assert storage.read_bytes(f"{s3_bucket}/object") == b"data"


@pytest.mark.parametrize(("name", "value"), [("ADMIRAL_S3_ADDRESSING", "host"), ("ADMIRAL_S3_ANONYMOUS", "yes")])
def test_misspelled_settings_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        storage.exists("s3://bucket/key")
