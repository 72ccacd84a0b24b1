"""The local cluster: only its owner may enter its folder, which contains tokens, and its servers start and end."""

import os
import stat
import sys
from pathlib import Path

import psutil
import pytest

from cluster import local
from cluster.local import LocalCluster, make_private, write_private
from cluster.servers import start_server


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_default_folder_is_the_users_own_and_short_enough_for_rays_sockets() -> None:
    assert local.FOLDER.is_relative_to(Path.home())
    longest = "ray/session_2026-11-29_12-00-00_123456_1234567/sockets/plasma_store.1"
    assert len(str(Path("/home/a-long-name") / ".admiral/cluster" / longest)) <= 107


def test_a_folder_is_closed_to_other_users_whatever_its_mode_was(tmp_path: Path) -> None:
    make_private(new := tmp_path / "a" / "b")
    (old := tmp_path / "open").mkdir(mode=0o777)
    old.chmod(0o777)
    make_private(old)
    assert mode(new) == mode(old) == 0o700


@pytest.mark.parametrize("action", ["start", "stop"])
def test_a_link_or_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "environment").touch()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(RuntimeError, match="link must be a folder of the user"):
        getattr(LocalCluster(tmp_path / "link"), action)()
    user_id = os.geteuid()
    monkeypatch.setattr(local.os, "geteuid", lambda: user_id + 1)
    with pytest.raises(RuntimeError, match="other must be a folder of the user"):
        getattr(LocalCluster(tmp_path / "other"), action)()
    assert (tmp_path / "other" / "environment").exists(), "nothing of theirs is removed"


def test_a_file_of_tokens_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "environment"
    path.touch(mode=0o666)
    path.chmod(0o666)
    with path.open() as held_open:
        write_private(path, "export TOKEN=canary")
        assert held_open.read() == ""
    assert mode(path) == 0o600 and path.read_text() == "export TOKEN=canary"


def test_stopping_removes_everything_but_the_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "ray" / "session").mkdir(parents=True)
    (tmp_path / "environment").touch()
    assert LocalCluster(tmp_path).stop() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_server_that_ends_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the port is taken')"]
    with pytest.raises(RuntimeError, match="the port is taken"):
        start_server(command, lambda: False, tmp_path / "log")


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    script = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-c", script]
    with pytest.raises(RuntimeError, match="was not ready within 2 s"):
        start_server(command, lambda: False, seconds=2)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
