"""Test that the doctor reports every problem of a node, and no others."""

import base64
import http.server
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.nodes import Node
from orchestrator import doctor, storage
from orchestrator.doctor import DoctorConfig, Examination, Finding

HEAD, WORKER = Node("aaaaaaaa", "10.0.0.1", True, {}), Node("bbbbbbbb", "10.0.0.2", False, {"CPU": 8, "GPU": 8})


def fake_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, usable: int | None) -> None:
    """Install an nvidia-smi that finds a driver, and let torch use `usable` GPUs; None means no driver."""
    if usable is not None:
        program = folder / "nvidia-smi"
        program.write_text("#!/bin/sh\necho '550.54.15, NVIDIA H100 80GB HBM3'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(usable))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: usable or 0)


@pytest.mark.parametrize(
    ("ray_gpus", "usable", "level", "phrase"),
    [
        (0, None, "ok", "none"),
        (8, None, "WRONG", "nvidia-smi finds no driver"),
        (8, 0, "WRONG", "can use 0: driver 550.54.15"),
        (8, 7, "WRONG", "can use 7: see nvidia-smi for the others"),
        (8, 8, "ok", "8 GPUs, driver 550.54.15"),
        (0, 8, "warning", "Ray may use only 0"),
    ],
)
def test_gpus_of_ray_the_driver_and_torch_are_compared(
    ray_gpus: int, usable: int | None, level: str, phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch, usable)
    finding = doctor._gpus(replace(WORKER, resources={"CPU": 8, "GPU": ray_gpus}))
    assert (finding.check, finding.level) == ("GPU", level) and phrase in finding.text


def test_a_compiler_is_needed_where_there_are_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._compiler(needed=True).level == "ok"
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))  # where no headers are
    without_headers = doctor._compiler(needed=True)
    assert without_headers.level == "WRONG" and "Python.h" in without_headers.text
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler(needed=True) == Finding(
        "compiler", "WRONG", "g++ is not installed, and torch.compile needs it"
    )
    assert doctor._compiler(needed=False).level == "warning"


def test_little_shared_memory_and_little_disk_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 0)
    monkeypatch.setattr(doctor, "DISK", 0)
    assert doctor._shared_memory().level == doctor._disk().level == "ok"
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "DISK", 1 << 60)
    assert doctor._shared_memory().level == "WRONG" and "docker's --shm-size" in doctor._shared_memory().text
    assert doctor._disk().level == "warning"


def test_a_store_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    finding = doctor._store(str(tmp_path), 1)
    assert finding.level == "ok" and "created once" in finding.text
    assert not storage.list_names(str(tmp_path), recursive=True)


@pytest.mark.parametrize(
    ("broken", "phrase"),
    [
        ({"read_bytes": lambda uri: b""}, "returned other bytes"),
        ({"list_names": lambda uri: []}, "does not list"),
        ({"put_if_absent": lambda uri, data: True}, "does not support If-None-Match"),
    ],
)
def test_a_store_that_only_seems_to_work_is_reported(
    broken: dict[str, Callable[..., object]], phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, function in broken.items():
        monkeypatch.setattr(storage, name, function)
    finding = doctor._store(str(tmp_path), 1)
    assert finding.level == "WRONG" and phrase in finding.text


def test_an_inaccessible_store_is_reported() -> None:
    finding = doctor._store("/proc/nothing", 1)
    assert finding.level == "WRONG" and "/proc/nothing" in finding.text


def test_differences_between_nodes_are_named() -> None:
    now = time.time()
    versions = dict.fromkeys((*doctor.PACKAGES, "python"), "1.0")
    same = Examination([], versions, dict.fromkeys(doctor.SAME_EVERYWHERE, "digest"), now)
    assert [findings.level for findings in doctor._differences({HEAD: same, WORKER: same})] == ["ok"]
    other = same._replace(
        versions=versions | {"torch": "2.0"},
        environment=same.environment | {"AWS_SECRET_ACCESS_KEY": "another digest"},
        clock=now - 3600,
    )
    findings = doctor._differences({HEAD: same, WORKER: other})
    assert [finding.check for finding in findings] == ["versions", "environment", "clock"]
    assert {finding.level for finding in findings} == {"WRONG"}
    assert findings[0].text.startswith("torch: 1.0 on 10.0.0.1 (head), 2.0 on 10.0.0.2")
    assert "AWS_SECRET_ACCESS_KEY" in findings[1].text and "digest" not in findings[1].text
    assert "3600 s" in findings[2].text


def test_tracking_of_several_machines_needs_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = DoctorConfig(store=str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor._tracking(config, machines=1).level == "ok"
    several = doctor._tracking(config, machines=2)
    assert several.level == "WRONG" and "several machines need a server" in several.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    unreachable = doctor._tracking(config, machines=2)
    assert unreachable.level == "WRONG" and "does not respond" in unreachable.text


def test_the_tracking_server_is_asked_with_the_credentials_of_a_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that needs a login, whose address may contain it, is no failure if the login is right."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            user = base64.b64encode(b"user:password").decode()
            self.send_response(200 if self.headers["Authorization"] == f"Basic {user}" else 401)
            self.end_headers()
            self.wfile.write(b"{}")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    for address, level in [(f"user:password@{host}", "ok"), (host, "WRONG"), ("user:password@host:none", "WRONG")]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
        assert doctor._tracking(DoctorConfig(store=str(tmp_path)), machines=1).level == level, address
    server.shutdown()


def test_gpus_that_ray_hides_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides all GPUs from tasks that request none, such as the doctor's."""
    fake_driver(tmp_path, monkeypatch, usable=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if "CUDA_VISIBLE_DEVICES" in os.environ else 8)
    assert doctor._gpus(WORKER).level == "ok"
