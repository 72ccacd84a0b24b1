"""The one door to storage: plain paths, file://, s3:// and whatever else fsspec opens.

An object is either whole or absent: local files are written beside their place and renamed into it, objects
are one PUT or one completed multipart upload. Transient faults (503, resets, stalls) are retried with jitter
for a bounded time; what is missing or forbidden is an immediate error that names the URI. Credentials and
endpoints come from the standard environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...) and are
never printed.
"""

import errno
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar, cast

import botocore.exceptions
import botocore.parsers
import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from cluster.session import receive_secrets

P = ParamSpec("P")
T = TypeVar("T")

_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # other processes write here: a listing must show what is there now
    "config_kwargs": {
        "connect_timeout": 5,  # seconds
        "read_timeout": 15,  # seconds without a byte: a stalled server is left and asked again
        "retries": {"mode": "standard", "total_max_attempts": 3},  # of one request, with jitter
    },
}
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
_REQUESTS = 16  # at a time, where many are asked for at once
_MERGE_GAP = 256 << 10  # bytes between two ranges below which one request for both is cheaper
_MERGED_BYTES = 16 << 20  # of such a request, at most: what is read twice over is bounded
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no space, beyond the quota, beyond the size of a file
_PART = ".part"  # ending of a local file that is still being written; never listed

log = logging.getLogger(__name__)


def resolve(uri: str) -> str:
    """The URI without a trailing slash; a plain relative path is made absolute."""
    return uri.rstrip("/") if "://" in uri else os.path.abspath(uri)


def is_absolute(uri: str) -> bool:
    """Whether it names the same place from everywhere: a URI or an absolute path."""
    return "://" in uri or os.path.isabs(uri)


def join(uri: str, *parts: str) -> str:
    """`uri` with further path parts, each relative."""
    for part in parts:
        if part.startswith("/") or "://" in part:
            raise ValueError(f"cannot join {part!r} to {uri!r}: it is not a relative name")
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """The whole object; FileNotFoundError or PermissionError names the URI."""
    fs, path = _locate(uri)
    return _attempt("read", uri, fs.cat_file, path)


def read_range(uri: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of the object by one request; fewer where it ends before."""
    fs, path = _locate(uri)
    try:
        return _attempt("read", uri, fs.cat_file, path, start=begin, end=end)
    except OSError as error:
        if _response(error.__cause__ or error).get("Error", {}).get("Code") == "InvalidRange":
            return b""
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Put the object whole, in place of any older one."""
    fs, path = _locate(uri)
    if isinstance(fs, LocalFileSystem):
        with _local_part(path, uri) as part:
            part.write_bytes(data)
    else:
        _attempt("write", uri, fs.pipe_file, path, data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Put the object whole if there is none yet; False, and nothing changed, where there is.

    On s3:// the object's metadata names this call. A create whose answer was lost, and that on the retry (ours or
    one of the layers beneath) finds an object, so knows its own from that of another writer.
    """
    fs, path = _locate(uri)
    if isinstance(fs, LocalFileSystem):
        try:
            with _local_part(path, uri, "create", os.link) as part:  # a link appears whole and only where nothing is
                part.write_bytes(data)
        except FileExistsError:
            if os.path.lexists(path):
                return False
            raise
        return True
    named = _is_s3(fs)
    writer = {"writer": uuid.uuid4().hex}

    def create() -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **({"Metadata": writer} if named else {}))
        except FileExistsError:
            return named and fs.metadata(path) == writer
        return True

    return _attempt("create", uri, create)


def open_input(uri: str, buffer_size: int = 1 << 20) -> BinaryIO:
    """A seekable binary file; of a remote object, ranges of at least `buffer_size` bytes are fetched as they are read,
    each with retries."""
    fs, path = _locate(uri)
    if isinstance(fs, LocalFileSystem):
        return cast(BinaryIO, _attempt("open", uri, open, path, "rb"))
    size = _attempt("open", uri, fs.info, path)["size"]
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(fs, path, uri, size), buffer_size))


@contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """A binary file to stream into: the object appears, whole, when the block ends, and not if it raises."""
    fs, path = _locate(uri)
    if isinstance(fs, LocalFileSystem):
        with _local_part(path, uri) as part, part.open("wb") as local_file:
            yield local_file
        return
    file: Any = _attempt("open", uri, fs.open, path, "wb", block_size=16 << 20, autocommit=False)
    for step in ("_initiate_upload", "_upload_chunk"):  # where fsspec's files talk to the server while one writes
        setattr(file, step, partial(_attempt, "write", uri, getattr(file, step)))
    try:
        yield file
        file.close()
        _attempt("write", uri, _commit, fs, path, file)
    except BaseException:
        file.closed = True  # else its finalizer would flush it again, whenever it is collected, and fail
        try:
            file.discard()
        except (OSError, botocore.exceptions.BotoCoreError) as error:
            log.warning("an unfinished upload of %s stays until the bucket's lifecycle rule ends it: %s", uri, error)
        raise


def exists(uri: str) -> bool:
    """Whether there is an object (or a folder that holds one) of this name."""
    fs, path = _locate(uri)
    return bool(_attempt("look up", uri, fs.exists, path))


def list_names(uri: str, recursive: bool = False) -> list[str]:
    """Sorted names under a prefix, relative to it; empty where there is nothing.

    Direct children by default, with sub-folders ending in "/"; with `recursive` all objects beneath, and no
    folders.
    """
    fs, path = _locate(uri)
    try:
        if recursive:
            found = _attempt("list", uri, fs.find, path, detail=True).values()
        else:
            found = _attempt("list", uri, fs.ls, path, detail=True)
    except FileNotFoundError:
        return []
    prefix = path.rstrip("/") + "/"
    names = []
    for entry in found:
        name = entry["name"].rstrip("/")
        if name.startswith(prefix) and not name.endswith(_PART):
            names.append(name.removeprefix(prefix) + ("/" if entry["type"] == "directory" else ""))
    return sorted(names)


def size_of(uri: str) -> int | None:
    """The bytes of an object; None of a folder. FileNotFoundError where there is nothing."""
    fs, path = _locate(uri)
    found = _attempt("look up", uri, fs.info, path)
    return None if found["type"] == "directory" else found["size"]


def list_tree(uri: str) -> Iterator[list[tuple[str, int]]]:
    """Folder by folder, (name, bytes) of all objects beneath a prefix; names are relative to it.

    An empty folder, where there is such a thing, is its name with a slash behind it, and 0 bytes.
    Several folders are listed at a time, and no more is held than these. On a local disk links to folders are
    followed, each folder once: under its own name, or under the first link to it if it lies elsewhere.
    """
    fs, root = _locate(uri)
    prefix = root.rstrip("/") + "/"
    followed = {os.path.realpath(root)}  # folders that were reached, by their real paths
    links: list[str] = []  # to folders, to be followed when all other folders are listed
    with ThreadPoolExecutor(_REQUESTS) as threads:
        pending = {threads.submit(_attempt, "list", uri, fs.ls, root, detail=True): ""}
        while pending or links:
            if not pending:
                name = min(links)
                links.remove(name)
                if (target := os.path.realpath(name)) in followed:
                    continue
                followed.add(target)
                pending[threads.submit(_attempt, "list", uri, fs.ls, name, detail=True)] = name.removeprefix(prefix)
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for listing in done:
                folder, entries = pending.pop(listing), listing.result()
                files = [] if entries or not folder else [(f"{folder}/", 0)]
                for entry in entries:
                    name = entry["name"].rstrip("/")
                    if not name.startswith(prefix) or name.endswith(_PART):
                        continue
                    if entry.get("islink") and os.path.isdir(name):
                        links.append(name)
                    elif entry["type"] == "directory":
                        if "islink" in entry:  # on a local disk
                            followed.add(os.path.realpath(name))
                        going = threads.submit(_attempt, "list", uri, fs.ls, name, detail=True)
                        pending[going] = name.removeprefix(prefix)
                    else:
                        files.append((name.removeprefix(prefix), entry["size"]))
                yield files


class Range(NamedTuple):
    """Bytes [start, start + size) of an object."""

    name: str  # relative
    start: int
    size: int


def read_ranges(uri: str, ranges: Sequence[Range]) -> list[bytes]:
    """Many ranges of the objects beneath `uri`, in their order; several requests at a time, each with retries.

    Ranges of one object that lie close together share a request.

    Raises:
        FileNotFoundError, PermissionError: an object cannot be read; the message names it.
        ValueError: an object ends before a range does.
    """
    fs, root = _locate(uri)
    found: dict[int, bytes] = {index: b"" for index, wanted in enumerate(ranges) if not wanted.size}

    def read(group: list[int]) -> None:
        first, last = ranges[group[0]], ranges[group[-1]]
        place = join(uri, first.name)
        path = f"{root.rstrip('/')}/{first.name}"
        end = max(ranges[index].start + ranges[index].size for index in group)
        data = memoryview(_attempt("read", place, fs.cat_file, path, start=first.start, end=end))
        if len(data) < end - first.start:
            raise ValueError(
                f"{place} ends at byte {first.start + len(data)}; wanted {last.size} bytes at {last.start}"
            )
        for index in group:
            begin = ranges[index].start - first.start
            found[index] = bytes(data[begin : begin + ranges[index].size])

    with ThreadPoolExecutor(_REQUESTS) as threads:
        list(threads.map(read, _merged(ranges)))
    return [found[index] for index in range(len(ranges))]


def _merged(ranges: Sequence[Range]) -> list[list[int]]:
    """Numbers of the ranges that one request fetches together, in the order of their places."""
    groups: list[list[int]] = []
    begin = end = 0
    for index in sorted((i for i, wanted in enumerate(ranges) if wanted.size), key=lambda i: ranges[i]):
        name, start, size = ranges[index]
        same = groups and ranges[groups[-1][0]].name == name
        if same and start <= end + _MERGE_GAP and start + size <= begin + _MERGED_BYTES:
            groups[-1].append(index)
            end = max(end, start + size)
        else:
            groups.append([index])
            begin, end = start, start + size
    return groups


def delete(uri: str) -> None:
    """Remove an object or, where the URI ends in "/", all beneath it; what is absent already is fine."""
    fs, path = _locate(uri)
    try:
        _attempt("delete", uri, fs.rm, path, recursive=uri.endswith("/"))
    except FileNotFoundError:
        return


def make_bucket(uri: str) -> None:
    """Make sure that the bucket (or local folder) of this URI is there."""
    fs, path = _locate(uri)
    if _is_s3(fs) and fs.client_kwargs.get("region_name") == "us-east-1":  # the one location that S3 refuses to be told
        bucket = path.split("/", 1)[0]
        if not _attempt("look up", uri, fs.exists, bucket):
            _attempt("make", uri, fs.call_s3, "create_bucket", Bucket=bucket)
    else:
        _attempt("make", uri, fs.makedirs, path, exist_ok=True)


def read_json(uri: str) -> Any:
    """The parsed object; ValueError naming the URI where it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    """Put `value` as indented JSON, whole."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The one JSON form used on disk: indented, UTF-8, NaN refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _commit(fs: fsspec.AbstractFileSystem, path: str, file: Any) -> None:
    """Make a streamed object appear. Where an earlier try did, and its answer was lost, S3 knows the upload no more."""
    try:
        file.commit()
    except FileNotFoundError as error:
        if _error_code(error) != "NoSuchUpload":
            raise
        parts = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in file.parts)
        if fs.info(path)["ETag"].strip('"') != f"{hashlib.md5(parts).hexdigest()}-{len(file.parts)}":
            raise


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return "s3" in fs.protocol


class _RemoteFile(io.RawIOBase):
    """Ranged reads of one object."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, uri: str, size: int) -> None:
        self._fs, self._path, self._uri, self._size, self._position = fs, path, uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = _attempt("read", self._uri, self._fs.cat_file, self._path, start=self._position, end=end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _locate(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI (fsspec keeps one for each process and thread) and the path in it."""
    protocol = uri.split("://", 1)[0] if "://" in uri else "file"
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        receive_secrets()
        options = _s3_options()
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {uri!r}: {error}") from error
    if options:
        fs.retries = 1  # requests are retried by the client, whole operations by `_attempt`: not a third time
    return fs, path


def _s3_options() -> dict[str, Any]:
    """How to reach S3, by the standard environment and two variables for what it has no name for.

    ADMIRAL_S3_ADDRESSING is path or virtual (bucket in the path or in the host name); without it custom endpoints get
    path, AWS gets virtual, and a profile's own setting counts. ADMIRAL_S3_ANONYMOUS=1 sends no credentials.
    """
    options: dict[str, Any] = dict(_S3_OPTIONS)
    options["endpoint_url"] = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["client_kwargs"] = {"region_name": region}
    if style := os.environ.get("ADMIRAL_S3_ADDRESSING"):
        if style not in ("path", "virtual"):
            raise ValueError(f"ADMIRAL_S3_ADDRESSING={style}; wanted path or virtual")
        options["config_kwargs"] = {**options["config_kwargs"], "s3": {"addressing_style": style}}
    if anonymous := os.environ.get("ADMIRAL_S3_ANONYMOUS"):
        if anonymous not in ("0", "1"):
            raise ValueError(f"ADMIRAL_S3_ANONYMOUS={anonymous}; wanted 0 or 1")
        options["anon"] = anonymous == "1"
    return options


def _attempt(action: str, uri: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)` with retries on transient faults; errors name the action and the URI."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=8),  # seconds
        stop=tenacity.stop_after_attempt(6) | tenacity.stop_after_delay(240),  # seconds
        reraise=True,
    )
    try:
        return retrying(function, *args, **kwargs)
    except FileNotFoundError as error:
        if getattr(getattr(error.__cause__, "response", None), "status_code", None) in (401, 403):
            raise PermissionError(errno.EACCES, f"cannot {action}: access denied", uri) from error  # a gated repository
        if _error_code(error) == "NoSuchBucket":  # no FileNotFoundError: nothing is simply not there yet
            raise OSError(errno.ENXIO, f"cannot {action}: there is no such bucket", uri) from error
        raise FileNotFoundError(errno.ENOENT, f"cannot {action}: there is no such object", uri) from error
    except (PermissionError, botocore.exceptions.NoCredentialsError) as error:
        raise PermissionError(errno.EACCES, f"cannot {action}: access denied ({error})", uri) from error
    except (OSError, botocore.exceptions.BotoCoreError) as error:
        if _error_code(error) == "400":  # to a HEAD, whose answer cannot say why
            reason = f"refused: the credentials have expired, or the bucket is in another region ({error})"
            raise PermissionError(errno.EACCES, f"cannot {action}: {reason}", uri) from error
        raise OSError(getattr(error, "errno", None) or errno.EIO, f"cannot {action} ({error})", uri) from error


def _is_transient(error: BaseException) -> bool:
    """Whether asking again may help: connection faults, timeouts, server errors, throttling."""
    if response := _response(error):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or _error_code(error) in _TRANSIENT_CODES
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return isinstance(error, _TRANSIENT_TYPES) or type(error).__module__.startswith("aiohttp.")


def _response(error: BaseException) -> dict[str, Any]:
    """The server's answer, which s3fs keeps beneath the OSError that it makes of it; empty if none."""
    response = getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


def _error_code(error: BaseException) -> str:
    """The server's name of the error; empty if none."""
    return _response(error).get("Error", {}).get("Code", "")


@contextmanager
def _local_part(
    path: str, uri: str, action: str = "write", place: Callable[[Path, str], None] = os.replace
) -> Iterator[Path]:
    """A file beside `path` to write; when the block ends well, `place` brings it to `path`, safe on disk."""
    part = _part_of(path)
    _attempt(action, uri, part.parent.mkdir, parents=True, exist_ok=True)
    try:
        yield part
        _flush_to_disk(part)
        place(part, path)
        _flush_to_disk(part.parent)
    except OSError as error:
        if error.errno in _DISK_FULL:  # it names the hidden part, or nothing
            raise OSError(error.errno, f"cannot {action}: {os.strerror(error.errno)}", uri) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: str) -> Path:
    target = Path(path)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}{_PART}")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
