"""Local and network file systems: failing listings, no hard links, full disks, killed writers, unusual paths."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import storage
from orchestrator.config import JobConfig


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("recursive", [False, True])
def test_a_listing_that_fails_is_an_error(
    recursive: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(str(tmp_path / "run" / "checkpoints" / "x"), b"")
    scandir = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("checkpoints"):
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    folder = tmp_path / "run" if recursive else tmp_path / "run" / "checkpoints"
    with pytest.raises(OSError, match="cannot list") as caught:
        storage.list_names(str(folder), recursive)
    assert str(folder) in str(caught.value) and "Errno" not in str(caught.value)


def test_a_folder_deleted_during_a_listing_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x", "b/x"):
        storage.write_bytes(str(tmp_path / name), b"")
    scandir = os.scandir

    def vanishing(path: str) -> object:
        if str(path).endswith("/a"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert storage.list_names(str(tmp_path), recursive=True) == ["b/x"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_may_lack_hard_links(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "run" / "commit")
    assert storage.put_if_absent(uri, b"first") and not storage.put_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert os.listdir(tmp_path / "run") == ["commit"]


def test_a_link_whose_response_was_lost_counts_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose response was lost, and then finds its own file."""
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert storage.put_if_absent(str(tmp_path / "x"), b"first")
    monkeypatch.setattr(os, "link", link)
    assert not storage.put_if_absent(str(tmp_path / "x"), b"second")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_may_be_unable_to_sync_a_folder(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    storage.write_bytes(str(tmp_path / "x"), b"data")
    assert storage.read_bytes(str(tmp_path / "x")) == b"data"


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_a_full_quota_has_its_own_message_and_leaves_the_old_object(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    uri = str(tmp_path / "x")
    storage.write_bytes(uri, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"quota|space") as caught:
        storage.write_bytes(uri, b"new")
    assert uri in str(caught.value) and "Errno" not in str(caught.value)
    assert storage.read_bytes(uri) == b"old" and os.listdir(tmp_path) == ["x"]


def stream_out(uri: str, data: bytes) -> None:
    with storage.open_output(uri) as file:
        file.write(data)


@pytest.mark.parametrize("write", [storage.write_bytes, storage.put_if_absent, stream_out])
def test_a_full_disk_is_one_clear_error(write: Callable[[str, bytes], object], tmp_path: Path) -> None:
    uri = str(tmp_path / "run" / "x")
    with _file_size_limit(1 << 20), pytest.raises(OSError, match=r"cannot (write|create): .*run/x'") as caught:
        write(uri, bytes(4 << 20))
    assert "too large" in str(caught.value).lower() and "Errno" not in str(caught.value)
    assert list((tmp_path / "run").iterdir()) == [], "an incomplete file was left"
    write(uri, b"small")
    assert storage.read_bytes(uri) == b"small"


@contextmanager
def _file_size_limit(limit: int) -> Iterator[None]:
    """Limit the size of this process's files, which looks like a full disk to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


WRITER = """
import sys, time
from orchestrator import storage
with storage.open_output(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("write", [storage.write_bytes, storage.put_if_absent])
def test_files_of_killed_writers_are_removed(write: Callable[[str, bytes], object], tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    (part,) = tmp_path.iterdir()
    write(str(tmp_path / "b"), b"data")
    assert part.exists(), "its writer lives"
    assert storage.list_names(str(tmp_path)) == storage.list_names(str(tmp_path), recursive=True) == ["b"]
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    foreign = part.with_name(".another-host.1.0123.part")
    foreign.touch()
    write(str(tmp_path / "c"), b"data")
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "b", "c"]


def test_a_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match=r"cannot create .*run/x"):
        storage.put_if_absent(str(tmp_path / "run" / "x"), b"")


def test_listings_omit_only_parts_with_a_leading_dot(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "volume.part"), b"")
    assert storage.list_names(str(tmp_path)) == ["volume.part"]


@pytest.mark.parametrize(
    "uri", ["https://someone:canary@host/x", "memory://a:canary@b", "s3://AKIA:canary/ary@bucket/x"]
)
def test_a_password_in_a_uri_is_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ValueError, match="was given with a password") as refused:
        storage.exists(uri)
    assert "ary" not in str(refused.value).replace("credentials in the", "")


@pytest.mark.parametrize("uri", ["file://runs", "file:runs", "file://localhost/runs"])
def test_a_relative_file_uri_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (storage.is_absolute, storage.resolve, storage.exists, JobConfig(store="/shared").path):
        with pytest.raises(ValueError, match="is relative"):
            use(uri)
    with pytest.raises(ValueError, match="is relative"):
        JobConfig(store=uri).path("digits")


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert storage.is_absolute("~/runs") and storage.resolve("~/runs") == f"{tmp_path}/home/runs"
    assert JobConfig(store="~/runs").path("digits") == f"{tmp_path}/home/runs/digits"
    assert JobConfig(store="/shared").path("~/weights.pt") == f"{tmp_path}/home/weights.pt"
    storage.write_bytes("~/runs/x", b"")
    assert os.listdir(tmp_path) == ["home"] and storage.list_names("~/runs") == ["x"]
    assert not storage.is_absolute("runs~") and storage.resolve("runs~") == f"{tmp_path}/runs~"
