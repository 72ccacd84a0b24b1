"""The errors of `storage`: retries of transient errors, and the messages of all others."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from orchestrator.redaction import LOGIN

P = ParamSpec("P")
T = TypeVar("T")

_RETRY_SECONDS = 300.0  # how long transient errors are retried, unless ADMIRAL_STORAGE_RETRY_SECONDS is set
_REPORT_SECONDS = 10.0  # retries that take longer are logged
_TRANSIENT_ERRNOS = {errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.ETIMEDOUT}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}
_TRANSIENT_TYPES = (
    ConnectionError,
    TimeoutError,
    aiohttp.ClientError,
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

# (what is wrong, what to do), by the code of a server's error or by errno.
_EXPLANATIONS: dict[str | int, tuple[str, str]] = dict.fromkeys(
    ("PermanentRedirect", "TemporaryRedirect", "301", "307", "AuthorizationHeaderMalformed"),
    (
        "the bucket is in another region",
        "set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL, if it is set, to the endpoint of that region",
    ),
)
_EXPLANATIONS |= dict.fromkeys(
    ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", errno.EDQUOT),
    ("the storage quota is used up", "delete unneeded files or raise the quota, then run the same command again"),
)
_EXPLANATIONS |= {
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
_READING = ("read", "open", "look up", "list", "delete")  # in these, a file in the place of a folder means absence

log = logging.getLogger(__name__)


class Location(NamedTuple):
    """The location of an object or a folder."""

    uri: str
    fs: fsspec.AbstractFileSystem  # one for each process and thread
    path: str  # in that filesystem

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def is_s3(self) -> bool:
        return "s3" in self.fs.protocol


def with_retries(action: str, location: Location, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`. Retry transient errors, and retry errors of credentials with a new session.

    action: a verb for the error message, such as "read".

    Raises:
        OSError: the message has the action and the URI. The error may be a FileNotFoundError, a PermissionError or a
            FileExistsError.
    """
    is_reported = False

    def report(state: tenacity.RetryCallState) -> None:
        nonlocal is_reported
        if not is_reported and (state.seconds_since_start or 0) >= _REPORT_SECONDS and state.outcome:
            is_reported = True
            message = "%s does not respond (%s); the job waits and retries for up to %g s"
            cause = reason(state.outcome.exception())
            log.warning(message, without_passwords(location.uri), cause, _retry_seconds())

    retry_transient = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=8),  # seconds
        stop=tenacity.stop_after_delay(_retry_seconds()),
        before_sleep=report,
        reraise=True,
    )
    retry_with_new_session = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_need_new_session),
        wait=tenacity.wait_random_exponential(multiplier=0.5, min=0.1, max=4),  # seconds
        stop=tenacity.stop_after_attempt(4),
        before_sleep=lambda _: location.fs.connect(refresh=True),  # s3fs caches credentials, and that there are none
        reraise=True,
    )
    try:
        return retry_with_new_session(retry_transient, _call_with_reason, location, function, *args, **kwargs)
    except (OSError, RecursionError, botocore.exceptions.BotoCoreError, aiohttp.ClientError) as error:
        raise explain(action, location, error) from error


def _call_with_reason(location: Location, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`. If a HEAD is refused, whose response has no reason, raise the error of a LIST instead."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        if error_code(error) in ("301", "403"):
            bucket, key, _ = location.fs.split_path(location.path)
            location.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)  # raises with the reason
        raise


def _retry_seconds() -> float:
    """Return how long transient errors are retried. Raise ValueError if the variable is no number."""
    value = os.environ.get("ADMIRAL_STORAGE_RETRY_SECONDS") or _RETRY_SECONDS
    with contextlib.suppress(ValueError):
        if (seconds := float(value)) >= 0:
            return seconds
    raise ValueError(f"ADMIRAL_STORAGE_RETRY_SECONDS={value}; expected a number of seconds, 0 or more")


def explain(action: str, location: Location, error: BaseException) -> OSError:
    """Return an error that says what is wrong, where, and what to do."""
    code, number = error_code(error), getattr(error, "errno", None)
    statuses = _status(error), getattr(getattr(error.__cause__, "response", None), "status_code", 0)  # of Hugging Face
    has_no_access = isinstance(error, (PermissionError, *_NO_CREDENTIALS)) or code in _REFUSED_CREDENTIALS
    kind: type[OSError] = OSError
    if _is_redirect_loop(error):
        code = "PermanentRedirect"
    if explanation := _EXPLANATIONS.get(code) or _EXPLANATIONS.get(cast(int, number)):
        problem, advice = f": {explanation[0]}", explanation[1]
        if code == "400":
            kind = PermissionError
        elif code == "NoSuchUpload":
            kind = FileNotFoundError
    elif has_no_access or {401, 403}.intersection(statuses):
        kind, problem = PermissionError, f": access denied ({reason(error)})"
        advice = f"make sure that this user may {action} there"
        if not location.is_local:
            advice = f"use credentials that may {action} there (docs/cluster.md, Credentials)"
    elif isinstance(error, FileNotFoundError) or (isinstance(error, NotADirectoryError) and action in _READING):
        kind, problem = FileNotFoundError, f": there is no such {'file or folder' if location.is_local else 'object'}"
        advice = "check the path, or run the job that writes it"
    else:
        kind = FileExistsError if isinstance(error, FileExistsError) else OSError
        problem = f" ({reason(error)})"
        advice = "check the storage, then run the same command again"
        if _is_transient(error):
            advice = f"it was retried for {_retry_seconds():g} s (ADMIRAL_STORAGE_RETRY_SECONDS): {advice}"
    explained = kind(without_passwords(f"cannot {action}{problem}: '{location.uri}'; {advice}"))
    explained.errno = number  # for callers; an error with one argument does not print it
    return explained


def _is_transient(error: BaseException) -> bool:
    """Return whether a retry may help: for connection errors, timeouts, server errors and throttling."""
    if _response(error) or isinstance(error, aiohttp.ClientResponseError):
        status = _status(error)
        is_transient = status >= 500 or status in (408, 429) or error_code(error) in _TRANSIENT_CODES
        return is_transient and status not in _PERMANENT_STATUSES
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or _is_redirect_loop(error):
        return False
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return isinstance(error, _TRANSIENT_TYPES)


def _is_redirect_loop(error: BaseException) -> bool:
    """Return whether botocore followed a redirect without a target up to Python's recursion limit."""
    return "maximum recursion depth exceeded" in str(error)


def _may_need_new_session(error: BaseException) -> bool:
    """Return whether a new session may get better credentials. Keys in environment variables would be the same."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    return isinstance(error, _NO_CREDENTIALS) or error_code(error) in _REFUSED_CREDENTIALS


def _response(error: BaseException | None) -> dict[str, Any]:
    """Return the server's response to which an error or one of its causes belongs, or an empty dict."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def _status(error: BaseException) -> int:
    """Return the HTTP status of the server's response, or 0."""
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(error, "status", 0))


def error_code(error: BaseException | None) -> str:
    """Return the error code in the server's response, or an empty string."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def reason(error: BaseException | None) -> str:
    """Return the message of an error as one line, without errno and without passwords."""
    message = _response(error).get("Error", {}).get("Message") or getattr(error, "strerror", None) or str(error)
    return without_passwords(" ".join(str(message).split())) or "no response"


def without_passwords(text: str) -> str:
    """Return the text without user:password@ in its URIs."""
    return re.sub(rf"(?<=://){LOGIN}@", "", text)
