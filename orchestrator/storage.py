"""Access to all files: plain paths, file://, s3:// and every other URI that fsspec opens.

An object is either complete or absent: a local file is written under a temporary name and renamed, and an S3 object is
one PUT or one completed multipart upload. Names are literal; no function expands `*`, `?` or `[`. Transient errors
(503, resets, stalls) are retried with jitter for ADMIRAL_STORAGE_RETRY_SECONDS. Other errors are raised at once and
name the URI. Credentials and endpoints come from the standard environment (AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL, ...) and are never printed.
"""

import contextlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, BinaryIO, NamedTuple, cast

import botocore.exceptions
import fsspec

from cluster.session import receive_environment
from orchestrator.storage_errors import Place, attempt, error_code, reason, without_passwords
from orchestrator.storage_local import is_part, link_exclusively, local_part
from orchestrator.storage_s3 import UPLOAD_BYTES, S3Upload, create_on_s3, s3_options

_REQUESTS = 16  # concurrent requests
_MERGE_GAP = 256 << 10  # ranges with fewer bytes between them are read by one request, which is cheaper
_MERGED_BYTES = 16 << 20  # of such a request at most, to bound its memory
_PUT_BYTES = 64 << 20  # of an object that is written by one PUT at most

log = logging.getLogger(__name__)


def resolve(uri: str) -> str:
    """Return the URI without a trailing slash. A plain path becomes absolute, and a leading `~` is expanded."""
    if (path := local_path(uri)) is None or "://" in uri:
        return uri.rstrip("/")
    return os.path.abspath(path)


def local_path(uri: str) -> str | None:
    """Return the path of a plain path or a file:// URI with `~` expanded, or None for any other URI.

    Raises:
        ValueError: a file:// URI is relative, and would be a different folder for every process.
    """
    if not uri.startswith(("file:", "local:")):
        return None if "://" in uri else os.path.expanduser(uri)
    path = os.path.expanduser(uri.partition(":")[2].removeprefix("//"))
    if not os.path.isabs(path):
        raise ValueError(f"{uri} is relative; expected file:///absolute/path: pass that, or the plain path {path}")
    return path


def is_absolute(uri: str) -> bool:
    """Return whether `uri` names the same place whatever the working directory is.

    Raises:
        ValueError: a relative file:// URI.
    """
    path = local_path(uri)
    return path is None or os.path.isabs(path)


def join(uri: str, *parts: str) -> str:
    """Return `uri` with further path parts. Raises ValueError if one of them is not relative."""
    for part in parts:
        if part.startswith("/") or "://" in part:
            raise ValueError(f"cannot join {part!r} to {uri!r}: expected a relative name")
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """Return the whole object. Raises FileNotFoundError or PermissionError with the URI."""
    place = _locate(uri)
    return attempt("read", place, place.fs.cat_file, place.path)


def read_range(uri: str, begin: int, end: int) -> bytes:
    """Return bytes [begin, end) of the object by one request. If the object ends before `end`, there are fewer."""
    place = _locate(uri)
    try:
        return attempt("read", place, place.fs.cat_file, place.path, start=begin, end=end)
    except OSError as error:
        if error_code(error) == "InvalidRange":
            return b""
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object, and replace an existing one."""
    place = _locate(uri)
    if place.is_local or (place.is_s3 and len(data) > _PUT_BYTES):
        with open_output(uri) as file:
            for start in range(0, len(data), UPLOAD_BYTES):  # in parts, so that there is no second copy of all of it
                file.write(memoryview(data)[start : start + UPLOAD_BYTES])
    else:
        attempt("write", place, place.fs.pipe_file, place.path, data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write the whole object and return True, or return False if an object of this name exists.

    Raises:
        OSError: storage failed, or the S3 server does not support conditional writes.
    """
    place = _locate(uri)
    if place.is_s3:
        return create_on_s3(place, data)
    try:
        if place.is_local:
            with local_part("create", place, link_exclusively) as part:
                part.write(data)
        else:
            attempt("create", place, place.fs.pipe_file, place.path, data, mode="create")
    except FileExistsError:
        if place.is_local and not os.path.lexists(place.path):
            raise  # there is a file in the place of the folder
        return False
    return True


def open_input(uri: str, buffer_size: int = 1 << 20) -> BinaryIO:
    """Return a seekable binary file.

    Of a remote object, ranges of at least `buffer_size` bytes are fetched when they are read, each with retries.
    """
    place = _locate(uri)
    if place.is_local:
        return cast(BinaryIO, attempt("open", place, open, place.path, "rb"))
    size = attempt("open", place, place.fs.info, place.path)["size"]
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(place, size), buffer_size))


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Yield a binary file to write. The object appears when the block ends, complete, or not at all if it raises."""
    place = _locate(uri)
    if place.is_local:
        with local_part("write", place, os.replace) as part:
            yield part
        return
    if place.is_s3:
        file: Any = S3Upload(place)
    else:
        file = attempt("open", place, place.fs.open, place.path, "wb", autocommit=False)
    try:
        yield file
        file.close()
        if place.is_s3:
            file.commit()
        else:
            attempt("write", place, file.commit)
    except BaseException:
        if not place.is_s3:
            file.closed = True  # else fsspec's finalizer flushes it again when it is garbage-collected, and fails
        try:
            file.discard()
        except (OSError, botocore.exceptions.BotoCoreError) as error:
            message = "an unfinished upload of %s remains until the bucket's lifecycle rule deletes it: %s"
            log.warning(message, without_passwords(uri), reason(error))
        raise


def exists(uri: str) -> bool:
    """Return whether there is an object of this name, or a folder with objects."""
    place = _locate(uri)
    try:
        attempt("look up", place, place.fs.info, place.path)
    except FileNotFoundError:
        return False
    return True


def list_names(uri: str, recursive: bool = False) -> list[str]:
    """Return the sorted names under a prefix, relative to it, or an empty list if there are none.

    These are the direct children by default, where the names of sub-folders end in "/". With `recursive` they are all
    objects beneath, without folders.

    Raises:
        OSError: something could not be listed.
    """
    place = _locate(uri)
    try:
        if recursive and not place.is_s3:  # fsspec's own walk omits folders that it cannot list
            return sorted(name for files in list_tree(uri) for name, _ in files if not name.endswith("/"))
        if recursive:
            entries = attempt("list", place, place.fs.find, place.path, detail=True).values()
        else:
            entries = attempt("list", place, place.fs.ls, place.path, detail=True)
    except FileNotFoundError:
        return []
    prefix = place.path.rstrip("/") + "/"
    names = []
    for entry in entries:
        is_folder = entry["type"] == "directory"
        name = entry["name"].rstrip("/") if is_folder else entry["name"]
        if name.startswith(prefix) and not name.endswith("/") and not is_part(name):
            names.append(name.removeprefix(prefix) + ("/" if is_folder else ""))
    return sorted(names)


def size_of(uri: str) -> int | None:
    """Return the size of an object in bytes, or None for a folder. Raises FileNotFoundError if there is neither."""
    place = _locate(uri)
    info = attempt("look up", place, place.fs.info, place.path)
    return None if info["type"] == "directory" else info["size"]


def list_tree(uri: str) -> Iterator[list[tuple[str, int]]]:
    """Yield lists of (name, bytes) for all objects beneath a prefix, one list for each folder.

    Names are relative to the prefix. An empty folder on a disk appears as its name with a slash at the end, and 0
    bytes. Several folders are listed at a time, and only these are held in memory. On a local disk, links to folders
    are followed. Each folder appears once, under its own name, or under the first link to it if it lies elsewhere.
    """
    place = _locate(uri)
    root = place.path
    prefix = root.rstrip("/") + "/"
    followed = {os.path.realpath(root)}  # real paths of the folders that were listed
    links: list[str] = []  # links to folders, which are followed after all other folders
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
                    if not name.startswith(prefix) or is_part(name):
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


def _entries(place: Place, folder: str) -> list[dict[str, Any]]:
    """Return the entries of a folder in the tree at `place`, or none if it was deleted in the meantime."""
    try:
        return list(attempt("list", place, place.fs.ls, folder, detail=True))
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
    """Return the bytes of many ranges of objects beneath `uri`, in the order of the ranges.

    Several requests run at the same time, each with retries. Ranges of one object that lie close together share one.

    Raises:
        FileNotFoundError, PermissionError: an object cannot be read; the message names it.
        ValueError: an object ends before a range does.
    """
    root = _locate(uri)
    contents: dict[int, bytes] = {index: b"" for index, requested in enumerate(ranges) if not requested.size}

    def read(group: list[int]) -> None:
        first, last = ranges[group[0]], ranges[group[-1]]
        place = Place(join(uri, first.name), root.fs, f"{root.path.rstrip('/')}/{first.name}")
        end = max(ranges[index].start + ranges[index].size for index in group)
        data = memoryview(attempt("read", place, root.fs.cat_file, place.path, start=first.start, end=end))
        if len(data) < end - first.start:
            end = first.start + len(data)
            raise ValueError(f"{place.uri} ends at byte {end}; expected {last.size} bytes at {last.start}")
        for index in group:
            begin = ranges[index].start - first.start
            contents[index] = bytes(data[begin : begin + ranges[index].size])

    with ThreadPoolExecutor(_REQUESTS) as threads:
        list(threads.map(read, _merged(ranges)))
    return [contents[index] for index in range(len(ranges))]


def _merged(ranges: Sequence[Range]) -> list[list[int]]:
    """Return lists of indices of ranges, one list for each request, sorted by their places."""
    groups: list[list[int]] = []
    begin = end = 0
    for index in sorted((i for i, requested in enumerate(ranges) if requested.size), key=lambda i: ranges[i]):
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
    """Delete an object or, if the URI ends in "/", everything beneath it. It is no error if there is nothing.

    Objects are deleted one by one, because many servers do not support DeleteObjects, which also hides refusals.
    """
    place = _locate(uri)
    with contextlib.suppress(FileNotFoundError):
        if not uri.endswith("/"):
            attempt("delete", place, place.fs.rm_file, place.path)
        elif place.is_local:
            attempt("delete", place, place.fs.rm, place.path, recursive=True)
        else:
            if place.is_s3:  # includes the empty objects that some programs create for folders
                paths: list[str] = attempt("list", place, place.fs.find, place.path)
            else:
                paths = [f"{place.path}/{name}" for name in list_names(uri, recursive=True)]
            with ThreadPoolExecutor(_REQUESTS) as threads:
                list(threads.map(lambda path: attempt("delete", place, place.fs.rm_file, path), paths))


def make_bucket(uri: str) -> None:
    """Create the bucket of an s3:// URI on a local server if it does not exist. Jobs do not create buckets."""
    place = _locate(uri)
    bucket = place.fs.split_path(place.path)[0]
    if not exists(f"s3://{bucket}"):
        attempt("make", place, place.fs.call_s3, "create_bucket", Bucket=bucket)


def read_json(uri: str) -> Any:
    """Return the parsed object. Raises ValueError with the URI if it is not valid JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    """Write `value` as indented JSON."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return `value` as indented JSON in UTF-8. Raises ValueError for NaN and infinity."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


class _RemoteFile(io.RawIOBase):
    """A file that reads ranges of a remote object."""

    def __init__(self, place: Place, size: int) -> None:
        self._place, self._size, self._position = place, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = attempt("read", self._place, self._place.fs.cat_file, self._place.path, start=self._position, end=end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _locate(uri: str) -> Place:
    if (path := local_path(uri)) is not None:
        path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        return Place(uri, fsspec.filesystem("file"), path.rstrip("/") or "/")
    protocol, _, rest = uri.partition("://")
    if re.match(r"[^/@]+:[^/]*@", rest):  # it would be stored wherever the URI is recorded
        raise ValueError(
            f"{without_passwords(uri)} was given with a password; expected a URI without one: set the credentials in "
            "the environment, as docs/cluster.md says"
        )
    try:
        if protocol not in ("s3", "s3a"):
            return Place(uri, *fsspec.core.url_to_fs(uri))
        receive_environment()
        fs = fsspec.filesystem("s3", **s3_options())
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {without_passwords(uri)!r}: {error}") from error
    fs.retries = 1  # the client retries requests and `attempt` retries operations; a third level is too much
    return Place(uri, fs, rest.rstrip("/"))
