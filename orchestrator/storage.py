"""The only way to files: plain paths, file://, s3:// and whatever else fsspec opens.

An object is either whole or absent: a local file is written beside its place and renamed into it, an S3 object is one
PUT or one completed multipart upload. Names are literal: no function expands `*`, `?` or `[`. Transient errors (503,
resets, stalls) are retried with jitter for ADMIRAL_STORAGE_RETRY_SECONDS; what is missing, forbidden or impossible is
an immediate error that names the URI. Credentials and endpoints come from the standard environment
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...) and are never printed.
"""

import contextlib
import errno
import fcntl
import functools
import io
import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar, cast

import botocore.exceptions
import botocore.parsers
import botocore.session
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
_RETRY_SECONDS = 300.0  # for which transient errors are retried, unless ADMIRAL_STORAGE_RETRY_SECONDS is set
_REPORT_SECONDS = 10.0  # after which a retry that goes on is logged
_REQUESTS = 16  # at a time, where many are sent at once
_MERGE_GAP = 256 << 10  # bytes between two ranges below which one request for both is cheaper
_MERGED_BYTES = 16 << 20  # of such a request, at most: what is read twice over is bounded
_PUT_BYTES = 64 << 20  # up to which an object is written by one PUT
_UPLOAD_BYTES = 16 << 20  # of a part of a multipart upload
_UPLOADS = 4  # parts in flight: with the one that is being filled, all that an upload holds in memory
_PART = ".part"  # ending of a hidden local file that is still being written; never listed

log = logging.getLogger(__name__)


class _Place(NamedTuple):
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


def resolve(uri: str) -> str:
    """Return the URI without a trailing slash; a plain path is made absolute, and a leading `~` is expanded."""
    if (path := _local_path(uri)) is None or "://" in uri:
        return uri.rstrip("/")
    return os.path.abspath(path)


def is_absolute(uri: str) -> bool:
    """Return whether `uri` names the same place from every folder.

    Raises:
        ValueError: a relative file:// URI.
    """
    path = _local_path(uri)
    return path is None or os.path.isabs(path)


def join(uri: str, *parts: str) -> str:
    """Return `uri` with further path parts, each relative."""
    for part in parts:
        if part.startswith("/") or "://" in part:
            raise ValueError(f"cannot join {part!r} to {uri!r}: it is not a relative name")
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """Return the whole object; FileNotFoundError or PermissionError names the URI."""
    place = _locate(uri)
    return _attempt("read", place, place.fs.cat_file, place.path)


def read_range(uri: str, begin: int, end: int) -> bytes:
    """Return bytes [begin, end) of the object by one request; fewer where it ends before."""
    place = _locate(uri)
    try:
        return _attempt("read", place, place.fs.cat_file, place.path, start=begin, end=end)
    except OSError as error:
        if _error_code(error) == "InvalidRange":
            return b""
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Put the object whole, in place of any older one."""
    place = _locate(uri)
    if place.is_local or (place.is_s3 and len(data) > _PUT_BYTES):
        with open_output(uri) as file:
            for start in range(0, len(data), _UPLOAD_BYTES):  # so that no second copy of all is made
                file.write(memoryview(data)[start : start + _UPLOAD_BYTES])
    else:
        _attempt("write", place, place.fs.pipe_file, place.path, data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Put the object whole if there is none yet; return False, and change nothing, where there is.

    Raises:
        OSError: storage failed, or it is an S3 server without conditional writes, which is not used.
    """
    place = _locate(uri)
    if place.is_s3:
        return _create_on_s3(place, data)
    try:
        if place.is_local:
            with _local_part("create", place, _link) as part:
                part.write(data)
        else:
            _attempt("create", place, place.fs.pipe_file, place.path, data, mode="create")
    except FileExistsError:
        if place.is_local and not os.path.lexists(place.path):
            raise  # a file lies where its folder should be
        return False
    return True


def open_input(uri: str, buffer_size: int = 1 << 20) -> BinaryIO:
    """Return a seekable binary file; of a remote object, ranges of at least `buffer_size` bytes are fetched as they
    are read, each with retries."""
    place = _locate(uri)
    if place.is_local:
        return cast(BinaryIO, _attempt("open", place, open, place.path, "rb"))
    size = _attempt("open", place, place.fs.info, place.path)["size"]
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(place, size), buffer_size))


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Yield a binary file to stream into: the object appears, whole, when the block ends, and not if it raises."""
    place = _locate(uri)
    if place.is_local:
        with _local_part("write", place, os.replace) as part:
            yield part
        return
    file: Any = _S3Upload(place) if place.is_s3 else _attempt("open", place, place.fs.open, place.path, "wb", **_LATER)
    try:
        yield file
        file.close()
        if place.is_s3:
            file.commit()
        else:
            _attempt("write", place, file.commit)
    except BaseException:
        try:
            file.discard()
        except (OSError, botocore.exceptions.BotoCoreError) as error:
            words = "an unfinished upload of %s stays until the bucket's lifecycle rule ends it: %s"
            log.warning(words, _without_passwords(uri), _reason(error))
        raise


_LATER = {"autocommit": False}  # of fsspec's files: the object appears with `commit`, and not with `discard`


def exists(uri: str) -> bool:
    """Return whether there is an object (or a folder that holds one) of this name."""
    place = _locate(uri)
    try:
        _attempt("look up", place, place.fs.info, place.path)
    except FileNotFoundError:
        return False
    return True


def list_names(uri: str, recursive: bool = False) -> list[str]:
    """Return the sorted names under a prefix, relative to it; empty where there is nothing.

    Direct children by default, with sub-folders ending in "/"; with `recursive` all objects beneath, and no
    folders.

    Raises:
        OSError: something could not be listed.
    """
    place = _locate(uri)
    try:
        if recursive and not place.is_s3:  # fsspec's own walk leaves out what it cannot list
            return sorted(name for files in list_tree(uri) for name, _ in files if not name.endswith("/"))
        if recursive:
            found = _attempt("list", place, place.fs.find, place.path, detail=True).values()
        else:
            found = _attempt("list", place, place.fs.ls, place.path, detail=True)
    except FileNotFoundError:
        return []
    prefix = place.path.rstrip("/") + "/"
    names = []
    for entry in found:
        is_folder = entry["type"] == "directory"
        name = entry["name"].rstrip("/") if is_folder else entry["name"]
        if name.startswith(prefix) and not name.endswith("/") and not _is_part(name):
            names.append(name.removeprefix(prefix) + ("/" if is_folder else ""))
    return sorted(names)


def size_of(uri: str) -> int | None:
    """Return the bytes of an object; None of a folder. FileNotFoundError where there is nothing."""
    place = _locate(uri)
    found = _attempt("look up", place, place.fs.info, place.path)
    return None if found["type"] == "directory" else found["size"]


def list_tree(uri: str) -> Iterator[list[tuple[str, int]]]:
    """Yield, folder by folder, (name, bytes) of all objects beneath a prefix; names are relative to it.

    An empty folder, where there is such a thing, is its name with a slash behind it, and 0 bytes.
    Several folders are listed at a time, and no more is held than these. On a local disk links to folders are
    followed, each folder once: under its own name, or under the first link to it if it lies elsewhere.
    """
    place = _locate(uri)
    root = place.path
    prefix = root.rstrip("/") + "/"
    followed = {os.path.realpath(root)}  # folders that were reached, by their real paths
    links: list[str] = []  # to folders, to be followed when all other folders are listed
    with ThreadPoolExecutor(_REQUESTS) as threads:
        pending = {threads.submit(_entries, place, root): ""}
        while pending or links:
            if not pending:
                name = min(links)
                links.remove(name)
                if (target := os.path.realpath(name)) in followed:
                    continue
                followed.add(target)
                pending[threads.submit(_entries, place, name)] = name.removeprefix(prefix)
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for listing in done:
                folder, entries = pending.pop(listing), listing.result()
                files = [] if entries or not folder else [(f"{folder}/", 0)]
                for entry in entries:
                    name = entry["name"].rstrip("/")
                    if not name.startswith(prefix) or _is_part(name):
                        continue
                    if entry.get("islink") and os.path.isdir(name):
                        links.append(name)
                    elif entry["type"] == "directory":
                        if "islink" in entry:  # on a local disk
                            followed.add(os.path.realpath(name))
                        pending[threads.submit(_entries, place, name)] = name.removeprefix(prefix)
                    else:
                        files.append((name.removeprefix(prefix), entry["size"]))
                yield files


def _entries(place: _Place, folder: str) -> list[dict[str, Any]]:
    """Return what lies in a folder of the tree at `place`; nothing where it was deleted meanwhile."""
    try:
        return list(_attempt("list", place, place.fs.ls, folder, detail=True))
    except FileNotFoundError:
        if folder == place.path:
            raise
        return []


class Range(NamedTuple):
    """Bytes [start, start + size) of an object."""

    name: str  # relative
    start: int
    size: int


def read_ranges(uri: str, ranges: Sequence[Range]) -> list[bytes]:
    """Read many ranges of the objects beneath `uri`, in their order; several requests at a time, each with retries.

    Ranges of one object that lie close together share a request.

    Raises:
        FileNotFoundError, PermissionError: an object cannot be read; the message names it.
        ValueError: an object ends before a range does.
    """
    root = _locate(uri)
    found: dict[int, bytes] = {index: b"" for index, wanted in enumerate(ranges) if not wanted.size}

    def read(group: list[int]) -> None:
        first, last = ranges[group[0]], ranges[group[-1]]
        place = _Place(join(uri, first.name), root.fs, f"{root.path.rstrip('/')}/{first.name}")
        end = max(ranges[index].start + ranges[index].size for index in group)
        data = memoryview(_attempt("read", place, root.fs.cat_file, place.path, start=first.start, end=end))
        if len(data) < end - first.start:
            end = first.start + len(data)
            raise ValueError(f"{place.uri} ends at byte {end}; expected {last.size} bytes at {last.start}")
        for index in group:
            begin = ranges[index].start - first.start
            found[index] = bytes(data[begin : begin + ranges[index].size])

    with ThreadPoolExecutor(_REQUESTS) as threads:
        list(threads.map(read, _merged(ranges)))
    return [found[index] for index in range(len(ranges))]


def _merged(ranges: Sequence[Range]) -> list[list[int]]:
    """Return the numbers of the ranges that one request fetches together, in the order of their places."""
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
    """Remove an object or, where the URI ends in "/", all beneath it; what is absent already is fine.

    Objects are removed one by one: many servers have no request that removes several, and it hides what is refused.
    """
    place = _locate(uri)

    def remove(path: str) -> None:
        _attempt("delete", place, place.fs.rm_file, path)

    with contextlib.suppress(FileNotFoundError):
        if not uri.endswith("/"):
            remove(place.path)
        elif place.is_local:
            _attempt("delete", place, place.fs.rm, place.path, recursive=True)
        elif place.is_s3:
            with ThreadPoolExecutor(_REQUESTS) as threads:
                objects: list[str] = _attempt("list", place, place.fs.find, place.path)
                list(threads.map(remove, objects))
        else:
            for name in list_names(uri, recursive=True):
                remove(f"{place.path}/{name}")


def make_bucket(uri: str) -> None:
    """Make sure that the bucket (or local folder) of this URI is there."""
    place = _locate(uri)
    if not place.is_s3:
        _attempt("make", place, place.fs.makedirs, place.path, exist_ok=True)
    elif not exists(f"s3://{(bucket := place.fs.split_path(place.path)[0])}"):
        region = place.fs.client_kwargs.get("region_name", "us-east-1")
        # us-east-1 is the one location that S3 does not accept by its name
        there = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        _attempt("make", place, place.fs.call_s3, "create_bucket", Bucket=bucket, **there)


def read_json(uri: str) -> Any:
    """Return the parsed object; ValueError naming the URI where it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    """Put `value` as indented JSON, whole."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return the one JSON form used on disk: indented, UTF-8, NaN refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


class _RemoteFile(io.RawIOBase):
    """Ranged reads of one object."""

    def __init__(self, place: _Place, size: int) -> None:
        self._place, self._size, self._position = place, size, 0

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
        data = _attempt("read", self._place, self._place.fs.cat_file, self._place.path, start=self._position, end=end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


# ------------------------------------------------------------------------------------------------ S3


class _S3Upload(io.RawIOBase):
    """Stream into one S3 object: by one PUT, or by a multipart upload with a few parts in flight."""

    def __init__(self, place: _Place) -> None:
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
        while len(self._buffer) > (size := _UPLOAD_BYTES << len(self._parts) // 2000):
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
        return _attempt("write", self._place, self._place.fs.call_s3, method, **self._object, **options)

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

        self._parts.append(self._threads.submit(_attempt, "write", self._place, send))


_CONDITIONAL: set[tuple[str | None, str]] = set()  # (endpoint, bucket) whose server is known to honour If-None-Match


def _create_on_s3(place: _Place, data: bytes) -> bool:
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
            if _error_code(error) not in ("PreconditionFailed", "412"):
                raise
            _CONDITIONAL.add(server)
            return False
        return True

    if server not in _CONDITIONAL and _writer(place) is not None:
        return False
    if not _attempt("create", place, put):
        return _is_written_by(place, writer)
    if server not in _CONDITIONAL and _attempt("create", place, put):
        raise _explained("create", place, OSError(errno.ENOSYS, "If-None-Match was ignored"))
    return True


def _writer(place: _Place) -> dict[str, str] | None:
    """Return the metadata of an S3 object; None where there is none."""
    try:
        return cast(dict[str, str], _attempt("look up", place, place.fs.metadata, place.path))
    except FileNotFoundError:
        return None


def _is_written_by(place: _Place, writer: dict[str, str]) -> bool:
    return _writer(place) == writer


def _s3_options() -> dict[str, Any]:
    """Return how to reach S3, by the standard environment and two variables for what it has no name for.

    ADMIRAL_S3_ADDRESSING is path or virtual (bucket in the path or in the host name); without it custom endpoints get
    path, AWS gets virtual, and a profile's own setting counts. ADMIRAL_S3_ANONYMOUS=1 sends no credentials.
    """
    options: dict[str, Any] = dict(_S3_OPTIONS)
    config = dict(options["config_kwargs"])
    options["endpoint_url"] = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if options["endpoint_url"] or _profile_has_endpoint(
        os.environ.get("AWS_PROFILE"), os.environ.get("AWS_CONFIG_FILE")
    ):
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
    return options | {"config_kwargs": config}


@functools.cache
def _profile_has_endpoint(profile: str | None, config_file: str | None) -> bool:
    """Return whether the AWS config file names another endpoint; the arguments say which file and profile count."""
    try:
        config = botocore.session.Session().get_scoped_config()
    except botocore.exceptions.BotoCoreError:
        return False
    return "endpoint_url" in config or "services" in config


# ------------------------------------------------------------------------------------------------ places


def _locate(uri: str) -> _Place:
    if (path := _local_path(uri)) is not None:
        return _Place(uri, fsspec.filesystem("file"), os.path.join(os.getcwd(), path).rstrip("/") or "/")
    protocol, _, rest = uri.partition("://")
    try:
        if protocol not in ("s3", "s3a"):
            return _Place(uri, *fsspec.core.url_to_fs(uri))
        receive_secrets()
        fs = fsspec.filesystem("s3", **_s3_options())
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {_without_passwords(uri)!r}: {error}") from error
    fs.retries = 1  # requests are retried by the client, whole operations by `_attempt`: not a third time
    return _Place(uri, fs, rest.rstrip("/"))


def _local_path(uri: str) -> str | None:
    """Return the path of a plain path or a file:// URI, with its `~` expanded; None of any other URI.

    Raises:
        ValueError: a relative file:// URI, which would be another folder for every process.
    """
    if not uri.startswith(("file:", "local:")):
        return None if "://" in uri else os.path.expanduser(uri)
    path = os.path.expanduser(uri.partition(":")[2].removeprefix("//"))
    if not os.path.isabs(path):
        raise ValueError(f"{uri} is relative; expected file:///absolute/path: pass that, or the plain path {path}")
    return path


# ------------------------------------------------------------------------------------------------ local files


@contextlib.contextmanager
def _local_part(action: str, place: _Place, put: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    """Yield a file to write; when the block ends well, `put` brings it to its place, safe on disk.

    Its name holds host and process, and its lock is held while it is written: so the next writer can tell and remove
    what a killed process of this host has left.
    """
    target = Path(place.path)
    part = target.with_name(f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}{_PART}")

    def begin() -> BinaryIO:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_parts(target.parent)
        file = part.open("xb")
        with contextlib.suppress(OSError):  # not every file system has locks; then nothing is removed either
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file

    def finish() -> None:
        os.fsync(file.fileno())
        put(part, target)
        _sync_folder(target.parent)

    file = _attempt(action, place, begin)
    try:
        try:
            yield file
            file.flush()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # it names the hidden part, or nothing
                raise _explained(action, place, error) from error
            raise
        _attempt(action, place, finish)
    finally:
        with contextlib.suppress(OSError):  # of a flush that has failed before
            file.close()
        part.unlink(missing_ok=True)


def _link(part: Path, target: Path) -> None:
    """Give a written file its name, if nothing has that name: a link appears whole and only where nothing is.

    On file systems without hard links (exFAT, SMB, some FUSE) an empty file takes the name first, and the written one
    then replaces it: still only one writer wins, but a kill between the two leaves an empty file.
    """
    try:
        os.link(part, target)
    except FileExistsError:
        if not os.path.lexists(target) or not os.path.samefile(part, target):  # the same: NFS lost the answer
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
            raise
        target.open("xb").close()
        try:
            os.replace(part, target)
        except OSError:
            target.unlink()
            raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # SMB and some FUSE file systems cannot sync a folder, and a folder may be writable and not readable. The
        # file is whole and has its name by now: this is no failed write.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES):
            raise


def _is_part(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(_PART)


def _remove_dead_parts(folder: Path) -> None:
    """Remove the unfinished files of this host's processes that are no more."""
    for name in filter(_is_part, os.listdir(folder)):
        host, pid, *_ = [*name.removeprefix(".").rsplit(".", 3), "", ""][:2]
        if host != socket.gethostname() or not pid.isdigit() or _is_running(int(pid)):
            continue
        # A process of another container may have this host's name, and a number that means nothing here: its lock
        # is held. Without locks nothing is removed.
        with contextlib.suppress(OSError), (folder / name).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / name).unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------------ errors and retries

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
_REFUSED_CREDENTIALS = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"} | {
    "InvalidAccessKeyId",
    "400",  # of a HEAD, which has no body: mostly an expired token
}

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


def _attempt(action: str, place: _Place, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`; retry transient errors, and errors of credentials with a fresh session.

    Raises:
        OSError: it names the action and the URI; FileNotFoundError, PermissionError, FileExistsError where they fit.
    """
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=8),  # seconds
        stop=tenacity.stop_after_delay(_retry_seconds()),
        before_sleep=_Report(place.uri),
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
        raise _explained(action, place, error) from error


def _asked_enough(state: tenacity.RetryCallState) -> bool:
    """Return whether to give up on credentials: a server that refuses them is asked twice, one that gives them four
    times."""
    error = state.outcome.exception() if state.outcome else None
    return state.attempt_number >= (2 if _response(error) else 4)


def _clarified(place: _Place, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `function(...)`; of a refused HEAD, whose answer cannot say why, raise the error of a request like it."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        if _error_code(error) in ("301", "403"):
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


class _Report:
    """Log once that an operation waits for storage."""

    def __init__(self, uri: str) -> None:
        self._uri, self._is_said = uri, False

    def __call__(self, state: tenacity.RetryCallState) -> None:
        if not self._is_said and (state.seconds_since_start or 0) >= _REPORT_SECONDS and state.outcome:
            self._is_said = True
            reason = _reason(state.outcome.exception())
            words = "storage does not respond at %s (%s); retrying for up to %g s, the work goes on afterwards"
            log.warning(words, _without_passwords(self._uri), reason, _retry_seconds())


def _explained(action: str, place: _Place, error: BaseException) -> OSError:
    """Return the error to show: what is wrong, where, and what to do."""
    code, number = _error_code(error), getattr(error, "errno", None)
    gated = getattr(getattr(error.__cause__, "response", None), "status_code", None) in (401, 403)  # Hugging Face
    kind: type[OSError] = OSError
    if _is_redirect_loop(error):
        code = "PermanentRedirect"
    if words := _WORDS.get(code) or _WORDS.get(cast(int, number)):
        wrong, advice = f": {words[0]}", words[1]
        kind = PermissionError if code == "400" else FileNotFoundError if code == "NoSuchUpload" else OSError
    elif gated or isinstance(error, (PermissionError, *_NO_CREDENTIALS)) or code in _REFUSED_CREDENTIALS:
        kind, wrong = PermissionError, f": access denied ({_reason(error)})"
        advice = f"make sure that this user may {action} there"
        if not place.is_local:
            advice = f"use credentials that may {action} there (docs/cluster.md, Credentials)"
    elif isinstance(error, FileNotFoundError) or (isinstance(error, NotADirectoryError) and action in _READING):
        kind, wrong = FileNotFoundError, ": there is no such object"
        advice = "check the URI, or run the job that writes it"
    else:
        kind, wrong = FileExistsError if isinstance(error, FileExistsError) else OSError, f" ({_reason(error)})"
        advice = "check the storage, then run the same command again"
        if _is_transient(error):
            advice = f"it was retried for {_retry_seconds():g} s (ADMIRAL_STORAGE_RETRY_SECONDS): {advice}"
    explained = kind(_without_passwords(f"cannot {action}{wrong}: '{place.uri}'; {advice}"))
    explained.errno = number  # for programs: the text of an error with one argument does not show it
    return explained


_READING = ("read", "open", "look up", "list", "delete")


def _is_transient(error: BaseException) -> bool:
    """Return whether asking again may help: connection errors, timeouts, server errors, throttling."""
    if response := _response(error):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        again = status >= 500 or status == 429 or _error_code(error) in _TRANSIENT_CODES
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
    """Return whether fresh credentials may help."""
    return isinstance(error, _NO_CREDENTIALS) or _error_code(error) in _REFUSED_CREDENTIALS


def _response(error: BaseException | None) -> dict[str, Any]:
    """Return the server's answer, which lies beneath the errors that were made of it; empty if none."""
    while error is not None:
        if isinstance(response := getattr(error, "response", None), dict):
            return response
        error = error.__cause__
    return {}


def _error_code(error: BaseException | None) -> str:
    """Return the server's name of the error; empty if none."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _reason(error: BaseException | None) -> str:
    """Return the words of an error, without its number."""
    said = _response(error).get("Error", {}).get("Message") or getattr(error, "strerror", None) or str(error)
    return _without_passwords(" ".join(str(said).split())) or "no answer"


def _without_passwords(text: str) -> str:
    """Return a text without the user:password@ of its URIs."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)
