"""Write local files for `storage`, so that they are complete or absent, also on NFS and limited file systems."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from orchestrator.storage_errors import Location, explain, with_retries

_PART = ".part"  # extension of a hidden file that is being written; such files are never listed


@contextlib.contextmanager
def local_part(action: str, location: Location, rename: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    """Yield a temporary file to write. When the context ends, sync it and call `rename(part, target)`.

    action: a verb for error messages. The temporary name contains the host and the process, and the file is locked
    while it is written. Therefore the next writer can find and remove the files of killed processes of this host.
    """
    target = Path(location.path)
    part = target.with_name(f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}{_PART}")

    def begin() -> BinaryIO:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_parts(target.parent)
        file = part.open("xb")
        with contextlib.suppress(OSError):  # on file systems without locks, no file of a killed process is removed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file

    def finish() -> None:
        os.fsync(file.fileno())
        rename(part, target)
        _sync_folder(target.parent)

    file = with_retries(action, location, begin)
    try:
        try:
            yield file
            file.flush()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # such an error names the hidden file, or none
                raise explain(action, location, error) from error
            raise
        with_retries(action, location, finish)
    finally:
        with contextlib.suppress(OSError):  # a flush that failed before fails again
            file.close()
        part.unlink(missing_ok=True)


def link_exclusively(part: Path, target: Path) -> None:
    """Give a written file its final name by a hard link. Raise FileExistsError if the name exists.

    On file systems without hard links (exFAT, SMB, some FUSE), an empty file takes the name first, and the written file
    then replaces it. There, too, only one writer succeeds, but a kill between the two steps leaves an empty file.
    """
    try:
        os.link(part, target)
    except FileExistsError:
        if not os.path.lexists(target) or not os.path.samefile(part, target):  # the same file if NFS lost a response
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
    """Sync `folder`, so that a rename survives a power failure, if the file system supports that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # SMB and some FUSE file systems cannot sync a folder, and a folder may be writable but not readable. The file
        # is complete and has its name, so the write has not failed.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES):
            raise


def is_part(path: str) -> bool:
    """Return whether a file has the name of a temporary file."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(_PART)


def _remove_dead_parts(folder: Path) -> None:
    """Remove the unfinished files of processes of this host that have ended, as far as that is possible."""
    with contextlib.suppress(OSError):
        for name in filter(is_part, os.listdir(folder)):
            match = re.fullmatch(rf"\.{re.escape(socket.gethostname())}\.(\d+)\.\w+\.part", name)
            if not match or psutil.pid_exists(int(match[1])):
                continue
            # The process may run in another container of this name under another id. Then it holds the lock. Without
            # locks no file is removed.
            with contextlib.suppress(OSError), (folder / name).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / name).unlink()
