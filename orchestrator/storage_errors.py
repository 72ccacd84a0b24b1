"""How `storage` deals with errors: which are retried and for how long, and what the others say."""

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
_REPORT_SECONDS = 10.0  # after which a retry that goes on is logged
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

# Error of a server or the number of an operating system's error: what is wrong, and what to do.
_WORDS: dict[str | int, tuple[str, str]] = dict.fromkeys(
    ("PermanentRedirect", "TemporaryRedirect", "301", "307", "AuthorizationHeaderMalformed"),
    (
        "the bucket is in another region",
        "set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL, if it is set, to the endpoint of that region",
    ),
)
_WORDS |= dict.fromkeys(
    ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", errno.EDQUOT),
    ("the storage quota is used up", "delete what is not needed or raise the quota, then run the same command again"),
)
_WORDS |= {
    "RequestTimeTooSkewed": (
        "the clock of this machine differs from the server's by more than 15 minutes",
        "set the clock, best by NTP, then run the same command again",
    ),
    "InvalidObjectState": (
        "the object is archived and cannot be read",
        "restore it first (aws s3api restore-object), or copy it to a storage class that can be read at once",
    ),
    "NoSuchBucket": ("there is no such bucket", "check the URI, or create the bucket: jobs create none"),
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
_READING = ("read", "open", "look up", "list", "delete")  # actions that find no object in the place of a folder

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A URI with its filesystem (fsspec keeps one for each process and thread) and the path in it."""

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
    """Return `function(...)`; retry transient errors, and errors of credentials with a fresh session.

    Raises:
        OSError: it names the action and the URI; FileNotFoundError, PermissionError, FileExistsError where they fit.
    """

    def report(state: tenacity.RetryCallState) -> None:
        if "report" not in said and (state.seconds_since_start or 0) >= _REPORT_SECONDS and state.outcome:
            said.add("report")
            words = "%s does not respond (%s); retrying for up to %g s, then the job goes on"
            cause = reason(state.outcome.exception())
            log.warning(words, without_passwords(place.uri), cause, _retry_seconds())

    said: set[str] = set()
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
        stop=_asked_enough,
        before_sleep=lambda _: place.fs.connect(refresh=True),  # s3fs keeps what it has found for good, and nothing too
        reraise=True,
    )
    try:
        return with_fresh_session(patiently, _clarified, place, function, *args, **kwargs)
    except (OSError, RecursionError, botocore.exceptions.BotoCoreError) as error:
        raise explained(action, place, error) from error


def _asked_enough(state: tenacity.RetryCallState) -> bool:
    """Return whether to give up on credentials: a server that refuses them is asked twice, one that gives them four
    times."""
    error = state.outcome.exception() if state.outcome else None
    return state.attempt_number >= (2 if _response(error) else 4)


def _clarified(place: Place, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`; of a refused HEAD, whose answer cannot say why, raise the error of a request like it."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        if error_code(error) in ("301", "403"):
            bucket, key, _ = place.fs.split_path(place.path)
            place.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        raise


def _retry_seconds() -> float:
    """Return for how long transient errors are retried."""
    given = os.environ.get("ADMIRAL_STORAGE_RETRY_SECONDS") or _RETRY_SECONDS
    with contextlib.suppress(ValueError):
        if (seconds := float(given)) >= 0:
            return seconds
    raise ValueError(f"ADMIRAL_STORAGE_RETRY_SECONDS={given}; expected a number of seconds, 0 or more")


def explained(action: str, place: Place, error: BaseException) -> OSError:
    """Return the error to show: what is wrong, where, and what to do."""
    code, number = error_code(error), getattr(error, "errno", None)
    gated = getattr(getattr(error.__cause__, "response", None), "status_code", None) in (401, 403)  # Hugging Face
    kind: type[OSError] = OSError
    if _is_redirect_loop(error):
        code = "PermanentRedirect"
    if words := _WORDS.get(code) or _WORDS.get(cast(int, number)):
        wrong, advice = f": {words[0]}", words[1]
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
    shown.errno = number  # for programs: the text of an error with one argument does not show it
    return shown


def _is_transient(error: BaseException) -> bool:
    """Return whether asking again may help: connection errors, timeouts, server errors, throttling."""
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
    """Return whether botocore followed a redirect that does not say where to, down to the end of the stack."""
    return "maximum recursion depth exceeded" in str(error)


def _is_of_credentials(error: BaseException) -> bool:
    """Return whether fresh credentials may help; a new session would read the same ones from the environment."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    return isinstance(error, _NO_CREDENTIALS) or error_code(error) in _REFUSED_CREDENTIALS


def _response(error: BaseException | None) -> dict[str, Any]:
    """Return the server's answer, which lies beneath the errors that were made of it; empty if none."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def error_code(error: BaseException | None) -> str:
    """Return the server's name of the error; empty if none."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def reason(error: BaseException | None) -> str:
    """Return the words of an error, without its number."""
    said = _response(error).get("Error", {}).get("Message") or getattr(error, "strerror", None) or str(error)
    return without_passwords(" ".join(str(said).split())) or "no answer"


def without_passwords(text: str) -> str:
    """Return a text without the user:password@ of its URIs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
