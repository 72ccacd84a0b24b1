"""How `storage` writes local files: whole or absent, on local disks, NFS and file systems that lack something."""

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

from orchestrator.storage_errors import Place, attempt, explained

_PART = ".part"  # ending of a hidden file that is still being written; never listed


@contextlib.contextmanager
def local_part(action: str, place: Place, put: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
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

    file = attempt(action, place, begin)
    try:
        try:
            yield file
            file.flush()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # it names the hidden part, or nothing
                raise explained(action, place, error) from error
            raise
        attempt(action, place, finish)
    finally:
        with contextlib.suppress(OSError):  # of a flush that has failed before
            file.close()
        part.unlink(missing_ok=True)


def link_exclusively(part: Path, target: Path) -> None:
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


def is_part(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(_PART)


def _remove_dead_parts(folder: Path) -> None:
    """Remove the unfinished files of this host's processes that are no more; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for name in filter(is_part, os.listdir(folder)):
            found = re.fullmatch(rf"\.{re.escape(socket.gethostname())}\.(\d+)\.\w+\.part", name)
            if not found or _is_running(int(found[1])):
                continue
            # The process may run in another container of this name, where it has another number: then it holds the
            # lock. Without locks nothing is removed.
            with contextlib.suppress(OSError), (folder / name).open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / name).unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True
