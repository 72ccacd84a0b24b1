"""S3 for `storage`: options, multipart uploads, and creation by conditional writes."""

import errno
import functools
import io
import os
import uuid
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import botocore.exceptions
import botocore.session

from orchestrator.storage_errors import Location, error_code, explain, with_retries

UPLOAD_BYTES = 16 << 20  # size of a part of a multipart upload
_UPLOADS = 4  # parts that are sent at the same time; memory holds these and one more

CONFIG: dict[str, Any] = {  # of botocore
    "connect_timeout": 5,  # seconds
    "read_timeout": 15,  # seconds without a byte; the request is then repeated
    "retries": {"mode": "standard", "total_max_attempts": 3},  # for one request, with jitter
}


def s3_options() -> dict[str, Any]:
    """Return the options of the filesystem, from CONFIG, AWS's standard variables, and two variables of Admiral.

    ADMIRAL_S3_ADDRESSING is path (the bucket is in the path) or virtual (the bucket is in the host name). The default
    is path for custom endpoints and virtual for AWS, unless the profile sets it. With ADMIRAL_S3_ANONYMOUS=1, requests
    contain no credentials.

    Raises:
        ValueError: one of these two variables has another value.
    """
    config = dict(CONFIG)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {"endpoint_url": endpoint, "config_kwargs": config}
    options["use_listings_cache"] = False  # other processes write here too, so a listing must be current
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
    """Return whether the AWS config file sets an endpoint. botocore reads the arguments from the environment itself."""
    try:
        config = botocore.session.Session().get_scoped_config()
    except botocore.exceptions.BotoCoreError:
        return False
    return "endpoint_url" in config or "services" in config


class S3Upload(io.RawIOBase):
    """A writable file that `commit` makes an S3 object, by one PUT or by a multipart upload."""

    def __init__(self, location: Location) -> None:
        bucket, key, _ = location.fs.split_path(location.path)
        self._location, self._object = location, {"Bucket": bucket, "Key": key}
        self._metadata = {"writer": uuid.uuid4().hex}  # of the object, by which `commit` recognizes it
        self._buffer, self._position, self._is_discarded = bytearray(), 0, False
        self._upload: dict[str, str] = {}  # the id of the multipart upload, if one has begun
        self._parts: list[Future[str]] = []  # the ETags of its parts
        self._threads = ThreadPoolExecutor(_UPLOADS)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._buffer += data
        written = memoryview(data).nbytes
        self._position += written
        # An upload has at most 10,000 parts, so their size is doubled after each 2,000. This allows a terabyte.
        while len(self._buffer) > (size := UPLOAD_BYTES << len(self._parts) // 2000):
            self._send(bytes(self._buffer[:size]))
            del self._buffer[:size]
        return written

    def commit(self) -> None:
        """Create the object."""
        if not self._parts:
            self._call("put_object", Body=bytes(self._buffer))
        else:
            self._send(bytes(self._buffer))
            parts = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self._parts, 1)]
            try:
                self._call("complete_multipart_upload", **self._upload, MultipartUpload={"Parts": parts})
            except FileNotFoundError:  # there is no such upload; an earlier attempt may have completed it
                if _metadata(self._location) != self._metadata:
                    raise
        self._threads.shutdown()

    def discard(self) -> None:
        """Abort the upload."""
        self._is_discarded = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(self._parts, timeout=5)  # seconds; a part that arrives after the abort would not be deleted
        if self._upload:
            self._location.fs.call_s3("abort_multipart_upload", **self._object, **self._upload)

    def _call(self, method: str, **options: Any) -> dict[str, Any]:
        return with_retries("write", self._location, self._location.fs.call_s3, method, **self._object, **options)

    def _send(self, data: bytes) -> None:
        """Send a part, after waiting until at most _UPLOADS - 1 others are in flight."""
        if not self._upload:
            self._upload = {"UploadId": self._call("create_multipart_upload", Metadata=self._metadata)["UploadId"]}
        if len(self._parts) >= _UPLOADS:
            self._parts[-_UPLOADS].result()
        number = len(self._parts) + 1

        def send() -> str:
            if self._is_discarded:
                raise ValueError("the upload was discarded")  # ends the retries of this part
            options = {**self._object, **self._upload, "PartNumber": number, "Body": data}
            return str(self._location.fs.call_s3("upload_part", **options)["ETag"])

        self._parts.append(self._threads.submit(with_retries, "write", self._location, send))


_CONDITIONAL: set[tuple[str | None, str]] = set()  # (endpoint, bucket) of servers that support If-None-Match


def create_on_s3(location: Location, data: bytes) -> bool:
    """Create an object by a conditional PUT; return False if the object exists.

    The metadata of the object identify this call. If a response is lost, a retry (here or in a library) finds an
    object, and its metadata show whether this call or another writer has created it.

    A server may ignore If-None-Match. Until it has been seen to respect the header, no object is written where one
    exists, and the first PUT that creates an object is repeated. If the repetition succeeds, the server is refused.

    Raises:
        OSError: storage failed, or the server does not support conditional writes.
    """
    bucket, key, _ = location.fs.split_path(location.path)
    metadata = {"writer": uuid.uuid4().hex}
    server = location.fs.endpoint_url, bucket

    def put() -> bool:
        try:
            options = {"Bucket": bucket, "Key": key, "Body": data, "Metadata": metadata, "IfNoneMatch": "*"}
            location.fs.call_s3("put_object", **options)
        except OSError as error:
            if error_code(error) not in ("PreconditionFailed", "412"):
                raise
            _CONDITIONAL.add(server)
            return False
        return True

    if server not in _CONDITIONAL and _metadata(location) is not None:
        return False
    if not with_retries("create", location, put):
        return _metadata(location) == metadata
    if server not in _CONDITIONAL and with_retries("create", location, put):
        raise explain("create", location, OSError(errno.ENOSYS, "If-None-Match was ignored"))
    return True


def _metadata(location: Location) -> dict[str, str] | None:
    """Return the metadata of an S3 object, or None if it does not exist."""
    try:
        return cast(dict[str, str], with_retries("look up", location, location.fs.metadata, location.path))
    except FileNotFoundError:
        return None
