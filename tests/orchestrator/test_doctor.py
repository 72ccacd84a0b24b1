"""Test that the doctor reports every problem of a node, and no others."""

import os
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


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, usable: int | None) -> None:
    """An nvidia-smi that finds a driver, and so many GPUs that torch can use; None: no driver."""
    if usable is not None:
        program = folder / "nvidia-smi"
        program.write_text("#!/bin/sh\necho '550.54.15, NVIDIA H100 80GB HBM3'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(usable))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: usable or 0)


@pytest.mark.parametrize(
    ("counted", "usable", "level", "words"),
    [
        (0, None, "ok", "none"),
        (8, None, "WRONG", "nvidia-smi finds no driver"),
        (8, 0, "WRONG", "can use 0: driver 550.54.15"),
        (8, 7, "WRONG", "can use 7: see nvidia-smi for the others"),
        (8, 8, "ok", "8 GPUs, driver 550.54.15"),
        (0, 8, "warning", "Ray may use only 0"),
    ],
)
def test_gpus(
    counted: int, usable: int | None, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path, monkeypatch, usable)
    found = doctor._gpus(replace(WORKER, resources={"CPU": 8, "GPU": counted}))
    assert (found.check, found.level) == ("GPU", level) and words in found.text


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


def test_little_shared_memory_and_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 0)
    monkeypatch.setattr(doctor, "DISK", 0)
    assert doctor._shared_memory().level == doctor._disk().level == "ok"
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "DISK", 1 << 60)
    assert doctor._shared_memory().level == "WRONG" and "docker's --shm-size" in doctor._shared_memory().text
    assert doctor._disk().level == "warning"


def test_a_store_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    found = doctor._store(str(tmp_path), 1)
    assert found.level == "ok" and "created once" in found.text
    assert not storage.list_names(str(tmp_path), recursive=True)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"read_bytes": lambda uri: b""}, "returned other bytes"),
        ({"list_names": lambda uri: []}, "does not list"),
        ({"put_if_absent": lambda uri, data: True}, "does not support If-None-Match"),
    ],
)
def test_a_store_that_only_seems_to_work(
    broken: dict[str, Callable[..., object]], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, function in broken.items():
        monkeypatch.setattr(storage, name, function)
    found = doctor._store(str(tmp_path), 1)
    assert found.level == "WRONG" and words in found.text


def test_a_store_that_is_not_there() -> None:
    found = doctor._store("/proc/nothing", 1)
    assert found.level == "WRONG" and "/proc/nothing" in found.text


def test_what_differs_between_nodes_is_named() -> None:
    now = time.time()
    versions = dict.fromkeys((*doctor.PACKAGES, "python"), "1.0")
    alike = Examination([], versions, dict.fromkeys(doctor.SAME_EVERYWHERE, "digest"), now)
    assert [found.level for found in doctor._differences({HEAD: alike, WORKER: alike})] == ["ok"]
    other = alike._replace(
        versions=versions | {"torch": "2.0"},
        environment=alike.environment | {"AWS_SECRET_ACCESS_KEY": "another digest"},
        clock=now - 3600,
    )
    found = doctor._differences({HEAD: alike, WORKER: other})
    assert [(f.check, f.level) for f in found] == [(c, "WRONG") for c in ("versions", "environment", "clock")]
    assert found[0].text.startswith("torch: 1.0 on 10.0.0.1 (head), 2.0 on 10.0.0.2")
    assert "AWS_SECRET_ACCESS_KEY" in found[1].text and "digest" not in found[1].text
    assert "3600 s" in found[2].text


def test_tracking_of_several_machines_wants_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = DoctorConfig(store=str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor._tracking(config, machines=1).level == "ok"
    several = doctor._tracking(config, machines=2)
    assert several.level == "WRONG" and "several machines need a server" in several.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    away = doctor._tracking(config, machines=2)
    assert away.level == "WRONG" and "does not respond" in away.text


def test_nothing_of_the_gpus_that_ray_hid_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides all GPUs from a task that asks for none, as the doctor's do."""
    driver(tmp_path, monkeypatch, usable=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if "CUDA_VISIBLE_DEVICES" in os.environ else 8)
    assert doctor._gpus(WORKER).level == "ok"
