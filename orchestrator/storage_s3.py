"""How `storage` uses S3: options, uploads in parts, and creation by conditional writes."""

import errno
import functools
import io
import os
import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import botocore.exceptions
import botocore.session

from orchestrator.storage_errors import Place, attempt, error_code, explained

UPLOAD_BYTES = 16 << 20  # of a part of a multipart upload
_UPLOADS = 4  # parts in flight: with the one that is being filled, all that an upload holds in memory


def s3_options(base: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with how to reach S3, by the standard environment and two variables for what it has no name for.

    ADMIRAL_S3_ADDRESSING is path or virtual (bucket in the path or in the host name); without it custom endpoints get
    path, AWS gets virtual, and a profile's own setting counts. ADMIRAL_S3_ANONYMOUS=1 sends no credentials.
    """
    config = dict(base["config_kwargs"])
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {**base, "endpoint_url": endpoint, "config_kwargs": config}
    if endpoint or _profile_has_endpoint(os.environ.get("AWS_PROFILE"), os.environ.get("AWS_CONFIG_FILE")):
        # Many servers other than AWS reject the x-amz-checksum headers that botocore adds to all requests by default.
        config |= dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["client_kwargs"] = {"region_name": region}
    if style := os.environ.get("ADMIRAL_S3_ADDRESSING"):
        if style not in ("path", "virtual"):
            raise ValueError(f"ADMIRAL_S3_ADDRESSING={style}; expected path or virtual")
        config["s3"] = {"addressing_style": style}
    if anonymous := os.environ.get("ADMIRAL_S3_ANONYMOUS"):
        if anonymous not in ("0", "1"):
            raise ValueError(f"ADMIRAL_S3_ANONYMOUS={anonymous}; expected 0 or 1")
        options["anon"] = anonymous == "1"
    return options


@functools.cache
def _profile_has_endpoint(profile: str | None, config_file: str | None) -> bool:
    """Return whether the AWS config file names another endpoint; the arguments say which file and profile count."""
    try:
        config = botocore.session.Session().get_scoped_config()
    except botocore.exceptions.BotoCoreError:
        return False
    return "endpoint_url" in config or "services" in config


class S3Upload(io.RawIOBase):
    """Stream into one S3 object: by one PUT, or by a multipart upload with a few parts in flight."""

    def __init__(self, place: Place) -> None:
        bucket, key, _ = place.fs.split_path(place.path)
        self._place, self._object, self._writer = place, {"Bucket": bucket, "Key": key}, {"writer": uuid.uuid4().hex}
        self._buffer, self._position, self._is_discarded = bytearray(), 0, False
        self._upload: dict[str, str] = {}  # its id, once there is more than one part
        self._parts: list[Future[str]] = []  # their ETags
        self._threads = ThreadPoolExecutor(_UPLOADS)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._buffer += data
        written = memoryview(data).nbytes
        self._position += written
        # An upload has at most 10,000 parts: parts that grow allow objects of a terabyte.
        while len(self._buffer) > (size := UPLOAD_BYTES << len(self._parts) // 2000):
            self._send(bytes(self._buffer[:size]))
            del self._buffer[:size]
        return written

    def commit(self) -> None:
        """Make the object appear."""
        if not self._parts:
            self._call("put_object", Body=bytes(self._buffer))
        else:
            self._send(bytes(self._buffer))
            parts = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self._parts, 1)]
            try:
                self._call("complete_multipart_upload", **self._upload, MultipartUpload={"Parts": parts})
            except FileNotFoundError:  # the server does not know the upload: an earlier try has completed it
                if not _is_written_by(self._place, self._writer):
                    raise
        self._threads.shutdown()

    def discard(self) -> None:
        """Forget what was sent."""
        self._is_discarded = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(self._parts, timeout=5)  # seconds: a part that arrives after the end of its upload would stay
        if self._upload:
            self._place.fs.call_s3("abort_multipart_upload", **self._object, **self._upload)

    def _call(self, method: str, **options: Any) -> dict[str, Any]:
        return attempt("write", self._place, self._place.fs.call_s3, method, **self._object, **options)

    def _send(self, data: bytes) -> None:
        """Send a part, when no more than _UPLOADS - 1 others are on their way."""
        if not self._upload:
            self._upload = {"UploadId": self._call("create_multipart_upload", Metadata=self._writer)["UploadId"]}
        if len(self._parts) >= _UPLOADS:
            self._parts[-_UPLOADS].result()
        number = len(self._parts) + 1

        def send() -> str:
            if self._is_discarded:
                raise ValueError("the upload was discarded")  # ends the retries of a part that nobody waits for
            options = {**self._object, **self._upload, "PartNumber": number, "Body": data}
            return str(self._place.fs.call_s3("upload_part", **options)["ETag"])

        self._parts.append(self._threads.submit(attempt, "write", self._place, send))


_CONDITIONAL: set[tuple[str | None, str]] = set()  # (endpoint, bucket) whose server is known to honour If-None-Match


def create_on_s3(place: Place, data: bytes) -> bool:
    """Create an object by a conditional PUT; return False where there is one.

    The object's metadata names this call: a create whose answer was lost, and that finds an object when it is retried
    (by us or by a layer beneath), so knows its own from that of another writer.

    Until a server is known to honour If-None-Match, nothing is put where an object is, and the first create is
    repeated: if it then succeeds again, the server ignores the header and is refused.
    """
    bucket, key, _ = place.fs.split_path(place.path)
    writer = {"writer": uuid.uuid4().hex}
    server = place.fs.endpoint_url, bucket

    def put() -> bool:
        try:
            options = {"Bucket": bucket, "Key": key, "Body": data, "Metadata": writer, "IfNoneMatch": "*"}
            place.fs.call_s3("put_object", **options)
        except OSError as error:
            if error_code(error) not in ("PreconditionFailed", "412"):
                raise
            _CONDITIONAL.add(server)
            return False
        return True

    if server not in _CONDITIONAL and _writer(place) is not None:
        return False
    if not attempt("create", place, put):
        return _is_written_by(place, writer)
    if server not in _CONDITIONAL and attempt("create", place, put):
        raise explained("create", place, OSError(errno.ENOSYS, "If-None-Match was ignored"))
    return True


def _writer(place: Place) -> dict[str, str] | None:
    """Return the metadata of an S3 object; None where there is none."""
    try:
        return cast(dict[str, str], attempt("look up", place, place.fs.metadata, place.path))
    except FileNotFoundError:
        return None


def _is_written_by(place: Place, writer: dict[str, str]) -> bool:
    return _writer(place) == writer
