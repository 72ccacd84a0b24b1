"""Access to all files: plain paths, file://, s3:// and every other URI that fsspec opens.

An object is either complete or absent: a local file is written under a temporary name and renamed, and an S3 object is
one PUT or one completed multipart upload. Names are literal: no function expands `*`, `?` or `[`. Transient errors
(503, resets, stalls) are retried with jitter for ADMIRAL_STORAGE_RETRY_SECONDS. Other errors are raised at once and
contain the URI. Credentials and endpoints come from the standard environment (AWS_ACCESS_KEY_ID, AWS_PROFILE,
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
from orchestrator.redaction import LOGIN
from orchestrator.storage_errors import Location, error_code, reason, with_retries, without_passwords
from orchestrator.storage_local import is_part, link_exclusively, local_part
from orchestrator.storage_s3 import UPLOAD_BYTES, S3Upload, create_on_s3, s3_options

_REQUESTS = 16  # concurrent requests
_MERGE_GAP = 256 << 10  # bytes; ranges with a smaller gap between them are read by one request, which is cheaper
_MERGED_BYTES = 16 << 20  # most bytes of such a request, to bound its memory
_PUT_BYTES = 64 << 20  # a larger object is written by a multipart upload

log = logging.getLogger(__name__)


def resolve(uri: str) -> str:
    """Return the URI without a trailing slash. A plain path becomes absolute, and a leading `~` is expanded."""
    if (path := local_path(uri)) is None or "://" in uri:
        return uri.rstrip("/")
    return os.path.abspath(path)


def local_path(uri: str) -> str | None:
    """Return the path of a plain path or a file:// URI with `~` expanded, or None for any other URI.

    Raises:
        ValueError: a file:// URI is relative, and would mean a different folder in every process.
    """
    if not uri.startswith(("file:", "local:")):
        return None if "://" in uri else os.path.expanduser(uri)
    path = os.path.expanduser(uri.partition(":")[2].removeprefix("//"))
    if not os.path.isabs(path):
        raise ValueError(f"{uri} is relative; expected file:///absolute/path: pass that, or the plain path {path}")
    return path


def is_absolute(uri: str) -> bool:
    """Return whether the meaning of `uri` does not depend on the working directory.

    Raises:
        ValueError: a relative file:// URI.
    """
    path = local_path(uri)
    return path is None or os.path.isabs(path)


def join(uri: str, *parts: str) -> str:
    """Return `uri` with further path parts. Raise ValueError if one of them is not relative."""
    for part in parts:
        if part.startswith("/") or "://" in part:
            raise ValueError(f"cannot join {part!r} to {uri!r}: expected a relative name")
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """Return the whole object.

    Raises:
        OSError: the object cannot be read; this is a FileNotFoundError if it does not exist.
    """
    location = _locate(uri)
    return with_retries("read", location, location.fs.cat_file, location.path)


def read_range(uri: str, begin: int, end: int) -> bytes:
    """Return bytes [begin, end) of the object by one request, or fewer bytes if the object ends before `end`."""
    location = _locate(uri)
    try:
        return with_retries("read", location, location.fs.cat_file, location.path, start=begin, end=end)
    except OSError as error:
        if error_code(error) == "InvalidRange":
            return b""
        raise


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object, and replace an existing one."""
    location = _locate(uri)
    if location.is_local or (location.is_s3 and len(data) > _PUT_BYTES):
        with open_output(uri) as file:
            for start in range(0, len(data), UPLOAD_BYTES):  # in parts, so that `data` is not copied as a whole
                file.write(memoryview(data)[start : start + UPLOAD_BYTES])
    else:
        with_retries("write", location, location.fs.pipe_file, location.path, data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write the whole object and return True, or return False if an object of this name exists.

    Raises:
        OSError: storage failed, or the S3 server does not support conditional writes.
    """
    location = _locate(uri)
    if location.is_s3:
        return create_on_s3(location, data)
    try:
        if location.is_local:
            with local_part("create", location, link_exclusively) as part:
                part.write(data)
        else:
            with_retries("create", location, location.fs.pipe_file, location.path, data, mode="create")
    except FileExistsError:
        if location.is_local and not os.path.lexists(location.path):
            raise  # a file has the name of the folder
        return False
    return True


def open_input(uri: str, buffer_size: int = 1 << 20) -> BinaryIO:
    """Return a seekable binary file to read.

    A remote object is fetched in ranges of at least `buffer_size` bytes when they are read, each with retries.
    """
    location = _locate(uri)
    if location.is_local:
        return cast(BinaryIO, with_retries("open", location, open, location.path, "rb"))
    size = with_retries("open", location, location.fs.info, location.path)["size"]
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(location, size), buffer_size))


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Yield a binary file to write. The complete object appears when the context ends, unless the context raises."""
    location = _locate(uri)
    if location.is_local:
        with local_part("write", location, os.replace) as part:
            yield part
        return
    if location.is_s3:
        file: Any = S3Upload(location)
    else:
        file = with_retries("open", location, location.fs.open, location.path, "wb", autocommit=False)
    try:
        yield file
        file.close()
        if location.is_s3:
            file.commit()
        else:
            with_retries("write", location, file.commit)
    except BaseException:
        if not location.is_s3:
            file.closed = True  # else fsspec flushes the file again when it is garbage-collected, and fails
        try:
            file.discard()
        except (OSError, botocore.exceptions.BotoCoreError) as error:
            message = "an unfinished upload of %s remains until the bucket's lifecycle rule deletes it: %s"
            log.warning(message, without_passwords(uri), reason(error))
        raise


def exists(uri: str) -> bool:
    """Return whether an object of this name exists, or a folder with objects."""
    location = _locate(uri)
    try:
        with_retries("look up", location, location.fs.info, location.path)
    except FileNotFoundError:
        return False
    return True


def list_names(uri: str, recursive: bool = False) -> list[str]:
    """Return the sorted names under a prefix, relative to it, or an empty list if there are none.

    By default these are the direct children, and the names of sub-folders end in "/". With `recursive` these are all
    objects beneath the prefix, without folders.

    Raises:
        OSError: something could not be listed.
    """
    location = _locate(uri)
    try:
        if recursive and not location.is_s3:  # fsspec's own walk omits folders that it cannot list
            return sorted(name for files in list_tree(uri) for name, _ in files if not name.endswith("/"))
        if recursive:
            entries = with_retries("list", location, location.fs.find, location.path, detail=True).values()
        else:
            entries = with_retries("list", location, location.fs.ls, location.path, detail=True)
    except FileNotFoundError:
        return []
    prefix = location.path.rstrip("/") + "/"
    names = []
    for entry in entries:
        is_folder = entry["type"] == "directory"
        name = entry["name"].rstrip("/") if is_folder else entry["name"]
        if name.startswith(prefix) and not name.endswith("/") and not is_part(name):
            names.append(name.removeprefix(prefix) + ("/" if is_folder else ""))
    return sorted(names)


def size_of(uri: str) -> int | None:
    """Return the size of an object in bytes, or None for a folder. Raise FileNotFoundError if neither exists."""
    location = _locate(uri)
    info = with_retries("look up", location, location.fs.info, location.path)
    return None if info["type"] == "directory" else info["size"]


def list_tree(uri: str) -> Iterator[list[tuple[str, int]]]:
    """Yield lists of (name, bytes) for all objects beneath a prefix, one list for each folder.

    Names are relative to the prefix. An empty folder on a disk appears as its name with a slash at the end, and with 0
    bytes. Several folders are listed concurrently, and memory holds only their entries. On a local disk, links to
    folders are followed. Each folder appears once: under its own name, or if it is outside the prefix, under the first
    link to it.
    """
    location = _locate(uri)
    root = location.path
    prefix = root.rstrip("/") + "/"
    followed = {os.path.realpath(root)}  # real paths of the folders that were listed
    links: list[str] = []  # paths of links to folders, which are followed after all other folders
    with ThreadPoolExecutor(_REQUESTS) as threads:
        pending = {threads.submit(_entries, location, root): ""}
        while pending or links:
            if not pending:
                link = min(links)
                links.remove(link)
                target = os.path.realpath(link)
                if target in followed:
                    continue
                followed.add(target)
                pending[threads.submit(_entries, location, link)] = link.removeprefix(prefix)
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for listing in done:
                folder, entries = pending.pop(listing), listing.result()
                files = [] if entries or not folder else [(f"{folder}/", 0)]
                for entry in entries:
                    path = entry["name"].rstrip("/")
                    if not path.startswith(prefix) or is_part(path):
                        continue
                    if entry.get("islink") and os.path.isdir(path):
                        links.append(path)
                    elif entry["type"] == "directory":
                        if "islink" in entry:  # on a local disk
                            followed.add(os.path.realpath(path))
                        pending[threads.submit(_entries, location, path)] = path.removeprefix(prefix)
                    else:
                        files.append((path.removeprefix(prefix), entry["size"]))
                yield files


def _entries(location: Location, folder: str) -> list[dict[str, Any]]:
    """Return the entries of a folder beneath `location`, or an empty list if it was deleted in the meantime."""
    try:
        return list(with_retries("list", location, location.fs.ls, folder, detail=True))
    except FileNotFoundError:
        if folder == location.path:
            raise
        return []


class Range(NamedTuple):
    """Bytes [start, start + size) of an object."""

    name: str  # relative to the URI of the call
    start: int
    size: int


def read_ranges(uri: str, ranges: Sequence[Range]) -> list[bytes]:
    """Return the bytes of many ranges of objects beneath `uri`, in the order of the ranges.

    Requests run concurrently, each with retries. Ranges of one object that lie close together share one request.

    Raises:
        FileNotFoundError, PermissionError: an object cannot be read; the message names it.
        ValueError: an object ends before a range does.
    """
    root = _locate(uri)
    contents: dict[int, bytes] = {index: b"" for index, requested in enumerate(ranges) if not requested.size}

    def read(group: list[int]) -> None:
        first, last = ranges[group[0]], ranges[group[-1]]
        location = Location(join(uri, first.name), root.fs, f"{root.path.rstrip('/')}/{first.name}")
        end = max(ranges[index].start + ranges[index].size for index in group)
        data = memoryview(with_retries("read", location, root.fs.cat_file, location.path, start=first.start, end=end))
        if len(data) < end - first.start:
            end = first.start + len(data)
            raise ValueError(f"{location.uri} ends at byte {end}; expected {last.size} bytes at {last.start}")
        for index in group:
            begin = ranges[index].start - first.start
            contents[index] = bytes(data[begin : begin + ranges[index].size])

    with ThreadPoolExecutor(_REQUESTS) as threads:
        list(threads.map(read, _merge(ranges)))
    return [contents[index] for index in range(len(ranges))]


def _merge(ranges: Sequence[Range]) -> list[list[int]]:
    """Return a list of indices of ranges for each request. Empty ranges are left out.

    The ranges of a request belong to one object, and are sorted by their positions.
    """
    groups: list[list[int]] = []
    begin = end = 0  # of the last group
    for index in sorted((i for i, requested in enumerate(ranges) if requested.size), key=lambda i: ranges[i]):
        name, start, size = ranges[index]
        is_same_object = groups and ranges[groups[-1][0]].name == name
        if is_same_object and start <= end + _MERGE_GAP and start + size <= begin + _MERGED_BYTES:
            groups[-1].append(index)
            end = max(end, start + size)
        else:
            groups.append([index])
            begin, end = start, start + size
    return groups


def delete(uri: str) -> None:
    """Delete an object or, if the URI ends in "/", everything beneath it. It is no error if nothing exists.

    Objects are deleted one by one, because many servers do not support DeleteObjects, and because it hides refusals.
    """
    location = _locate(uri)
    with contextlib.suppress(FileNotFoundError):
        if not uri.endswith("/"):
            with_retries("delete", location, location.fs.rm_file, location.path)
        elif location.is_local:
            with_retries("delete", location, location.fs.rm, location.path, recursive=True)
        else:
            if location.is_s3:  # `find` also returns the empty objects that some programs create for folders
                paths: list[str] = with_retries("list", location, location.fs.find, location.path)
            else:
                paths = [f"{location.path}/{name}" for name in list_names(uri, recursive=True)]
            with ThreadPoolExecutor(_REQUESTS) as threads:
                list(threads.map(lambda path: with_retries("delete", location, location.fs.rm_file, path), paths))


def make_bucket(uri: str) -> None:
    """Create the bucket of an s3:// URI on a local server if it does not exist. Jobs do not create buckets."""
    location = _locate(uri)
    bucket = location.fs.split_path(location.path)[0]
    if not exists(f"s3://{bucket}"):
        with_retries("make", location, location.fs.call_s3, "create_bucket", Bucket=bucket)


def read_json(uri: str) -> Any:
    """Return the parsed object. Raise ValueError with the URI if it is not valid JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> None:
    """Write `value` as indented JSON."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return `value` as indented JSON in UTF-8. Raise ValueError for NaN and infinity."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


class _RemoteFile(io.RawIOBase):
    """A file that reads ranges of a remote object."""

    def __init__(self, location: Location, size: int) -> None:
        self._location, self._size, self._position = location, size, 0

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
        read, path = self._location.fs.cat_file, self._location.path
        data = with_retries("read", self._location, read, path, start=self._position, end=end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _locate(uri: str) -> Location:
    """Return the filesystem of a URI and the path in it.

    Raises:
        ValueError: the URI contains a password, or no filesystem supports it.
    """
    if (path := local_path(uri)) is not None:
        path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        return Location(uri, fsspec.filesystem("file"), path.rstrip("/") or "/")
    protocol, _, rest = uri.partition("://")
    login = re.match(rf"{LOGIN}@", rest)
    if login and ":" in login[0]:  # the password would be stored wherever the URI is recorded
        raise ValueError(
            f"{without_passwords(uri)} was given with a password; expected a URI without one: set the credentials in "
            "the environment, as docs/cluster.md says"
        )
    try:
        if protocol not in ("s3", "s3a"):
            return Location(uri, *fsspec.core.url_to_fs(uri))
        receive_environment()
        fs = fsspec.filesystem("s3", **s3_options())
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {without_passwords(uri)!r}: {error}") from error
    fs.retries = 1  # the client retries requests, and `with_retries` retries operations: that is enough
    return Location(uri, fs, rest.rstrip("/"))
