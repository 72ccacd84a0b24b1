"""The errors of `storage`: which of them are retried, for how long, and the messages of the others."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import botocore.exceptions
import botocore.parsers
import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

P = ParamSpec("P")
T = TypeVar("T")

_RETRY_SECONDS = 300.0  # for which transient errors are retried, unless ADMIRAL_STORAGE_RETRY_SECONDS is set
_REPORT_SECONDS = 10.0  # retries that take longer are logged
_TRANSIENT_ERRNOS = {errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.ETIMEDOUT}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}
_TRANSIENT_TYPES = (
    ConnectionError,
    TimeoutError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,
)
_PERMANENT_STATUSES = {501, 507}  # not implemented, no space left
_NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.MetadataRetrievalError,
)
_REFUSED_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_REFUSED_CREDENTIALS |= {"InvalidAccessKeyId", "400"}  # 400: of a HEAD, which has no body; mostly an expired token

# (what is wrong, what to do), by the code of a server's error or the number of an operating system's error.
_WORDS: dict[str | int, tuple[str, str]] = dict.fromkeys(
    ("PermanentRedirect", "TemporaryRedirect", "301", "307", "AuthorizationHeaderMalformed"),
    (
        "the bucket is in another region",
        "set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL, if it is set, to the endpoint of that region",
    ),
)
_WORDS |= dict.fromkeys(
    ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", errno.EDQUOT),
    ("the storage quota is used up", "delete unneeded files or raise the quota, then run the same command again"),
)
_WORDS |= {
    "RequestTimeTooSkewed": (
        "the clock of this machine differs from the server's by more than 15 minutes",
        "set the clock, preferably by NTP, then run the same command again",
    ),
    "InvalidObjectState": (
        "the object is archived and cannot be read",
        "restore it first (aws s3api restore-object), or copy it to a storage class that can be read at once",
    ),
    "NoSuchBucket": ("there is no such bucket", "check the URI, or create the bucket: jobs do not create buckets"),
    "NoSuchUpload": ("the unfinished upload was removed by another program", "run the same command again"),
    "400": (
        "refused: the credentials have expired, or the bucket is in another region",
        "renew the credentials, and set AWS_REGION to the bucket's region",
    ),
    errno.ENOSYS: (
        "the server does not support conditional writes (If-None-Match), so two writers could overwrite each other",
        "use a server or a version that supports them (docs/cluster.md, Object storage)",
    ),
    errno.EFBIG: (
        "the file is too large for its file system",
        "use another file system, or raise the limit (ulimit -f)",
    ),
    errno.ENOSPC: ("no space left on device", "free some space, then run the same command again"),
    errno.ESTALE: ("stale file handle: the file system was unmounted or replaced", "mount it again"),
}
_READING = ("read", "open", "look up", "list", "delete")  # actions for which a file in place of a folder means absence

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A URI, its fsspec filesystem (one for each process and thread), and the path in that filesystem."""

    uri: str
    fs: fsspec.AbstractFileSystem
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def is_s3(self) -> bool:
        return "s3" in self.fs.protocol


def attempt(action: str, place: Place, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`. Retry transient errors, and retry credential errors with a new session.

    Raises:
        OSError: the message has the action and the URI. It may be a FileNotFoundError, PermissionError or
            FileExistsError.
    """
    is_reported = False

    def report(state: tenacity.RetryCallState) -> None:
        nonlocal is_reported
        if not is_reported and (state.seconds_since_start or 0) >= _REPORT_SECONDS and state.outcome:
            is_reported = True
            message = "%s does not respond (%s); the job waits and retries for up to %g s"
            cause = reason(state.outcome.exception())
            log.warning(message, without_passwords(place.uri), cause, _retry_seconds())

    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=8),  # seconds
        stop=tenacity.stop_after_delay(_retry_seconds()),
        before_sleep=report,
        reraise=True,
    )
    with_fresh_session = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_of_credentials),
        wait=tenacity.wait_random_exponential(multiplier=0.5, min=0.1, max=4),  # seconds
        stop=tenacity.stop_after_attempt(4),
        before_sleep=lambda _: place.fs.connect(refresh=True),  # s3fs caches credentials, and their absence, for ever
        reraise=True,
    )
    try:
        return with_fresh_session(patiently, _clarified, place, function, *args, **kwargs)
    except (OSError, RecursionError, botocore.exceptions.BotoCoreError) as error:
        raise explained(action, place, error) from error


def _clarified(place: Place, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`. If a HEAD is refused, whose response has no reason, raise the error of a LIST."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        if error_code(error) in ("301", "403"):
            bucket, key, _ = place.fs.split_path(place.path)
            place.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        raise


def _retry_seconds() -> float:
    """Return how long transient errors are retried. Raises ValueError if the variable is no number."""
    value = os.environ.get("ADMIRAL_STORAGE_RETRY_SECONDS") or _RETRY_SECONDS
    with contextlib.suppress(ValueError):
        if (seconds := float(value)) >= 0:
            return seconds
    raise ValueError(f"ADMIRAL_STORAGE_RETRY_SECONDS={value}; expected a number of seconds, 0 or more")


def explained(action: str, place: Place, error: BaseException) -> OSError:
    """Return an error that says what is wrong, where, and what to do."""
    code, number = error_code(error), getattr(error, "errno", None)
    gated = getattr(getattr(error.__cause__, "response", None), "status_code", None) in (401, 403)  # Hugging Face
    kind: type[OSError] = OSError
    if _is_redirect_loop(error):
        code = "PermanentRedirect"
    if explanation := _WORDS.get(code) or _WORDS.get(cast(int, number)):
        wrong, advice = f": {explanation[0]}", explanation[1]
        kind = PermissionError if code == "400" else FileNotFoundError if code == "NoSuchUpload" else OSError
    elif gated or isinstance(error, (PermissionError, *_NO_CREDENTIALS)) or code in _REFUSED_CREDENTIALS:
        kind, wrong = PermissionError, f": access denied ({reason(error)})"
        advice = f"make sure that this user may {action} there"
        if not place.is_local:
            advice = f"use credentials that may {action} there (docs/cluster.md, Credentials)"
    elif isinstance(error, FileNotFoundError) or (isinstance(error, NotADirectoryError) and action in _READING):
        kind, wrong = FileNotFoundError, f": there is no such {'file or folder' if place.is_local else 'object'}"
        advice = "check the path, or run the job that writes it"
    else:
        kind, wrong = FileExistsError if isinstance(error, FileExistsError) else OSError, f" ({reason(error)})"
        advice = "check the storage, then run the same command again"
        if _is_transient(error):
            advice = f"it was retried for {_retry_seconds():g} s (ADMIRAL_STORAGE_RETRY_SECONDS): {advice}"
    shown = kind(without_passwords(f"cannot {action}{wrong}: '{place.uri}'; {advice}"))
    shown.errno = number  # for callers; an error with one argument does not print it
    return shown


def _is_transient(error: BaseException) -> bool:
    """Return whether a retry may help: for connection errors, timeouts, server errors and throttling."""
    if response := _response(error):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        again = status >= 500 or status == 429 or error_code(error) in _TRANSIENT_CODES
        return again and status not in _PERMANENT_STATUSES
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or _is_redirect_loop(error):
        return False
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return isinstance(error, _TRANSIENT_TYPES) or type(error).__module__.startswith("aiohttp.")


def _is_redirect_loop(error: BaseException) -> bool:
    """Return whether botocore followed a redirect without a target until the recursion limit."""
    return "maximum recursion depth exceeded" in str(error)


def _is_of_credentials(error: BaseException) -> bool:
    """Return whether new credentials may help. Keys in environment variables would be the same again."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    return isinstance(error, _NO_CREDENTIALS) or error_code(error) in _REFUSED_CREDENTIALS


def _response(error: BaseException | None) -> dict[str, Any]:
    """Return the server's response, which may be in a cause of the error, or an empty dict."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def error_code(error: BaseException | None) -> str:
    """Return the server's code of the error, or an empty string."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def reason(error: BaseException | None) -> str:
    """Return the message of an error without its number."""
    message = _response(error).get("Error", {}).get("Message") or getattr(error, "strerror", None) or str(error)
    return without_passwords(" ".join(str(message).split())) or "no response"


def without_passwords(text: str) -> str:
    """Return the text without user:password@ in its URIs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
