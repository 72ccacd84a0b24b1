"""The doctor: looks at every node before the first GPU second is paid for, and says in words what is wrong."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from cluster.nodes import Node, all_reduce_bandwidth, nodes, on_each
from cluster.session import receive_environment, session
from orchestrator import storage
from orchestrator.config import JobConfig, tracking_uri
from orchestrator.progress import counted

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "mlflow")
SHARED_MEMORY = 1 << 30  # bytes; a container's default is 64 MB
DISK = 20 << 30  # bytes
CLOCK_SECONDS = 60.0  # S3 refuses requests that are 15 minutes off; more than this means that nobody sets the clocks
SAME_EVERYWHERE = ("ADMIRAL_STORE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")

Level = Literal["ok", "warning", "WRONG"]


class DoctorConfig(JobConfig):
    """Sizes and timeouts of the checks."""

    megabytes: int = Field(
        32, gt=0
    )  # size of the object that times the store, and of the all-reduce that times the network
    timeout: float = Field(120.0, gt=0)  # seconds within which a node must answer


def doctor_presets() -> dict[str, tuple[str, DoctorConfig]]:
    """Ways to look at a cluster."""
    return {"cluster": ("every node, the store, the tracking server and the network", DoctorConfig())}


class Finding(NamedTuple):
    """What one check found."""

    check: str
    level: Level
    words: str


def examine(config: DoctorConfig) -> None:
    """Check every node and what lies between them; print what was found.

    Raises:
        RuntimeError: something is wrong; it says how much, and the lines above it what.
    """
    with session(1):
        there = nodes()
        cpus, gpus = counted(sum(n.cpus for n in there), "CPU"), counted(sum(n.gpus for n in there), "GPU")
        print(f"{counted(len(there), 'node')}, {cpus}, {gpus}")
        look = partial(examine_node, store=config.path(""), megabytes=config.megabytes)
        answers = on_each(there, look, config.timeout)
        wrong = 0
        for node, answer in answers.items():
            sick = Finding("node", "WRONG", f"{type(answer).__name__}: {answer}")
            wrong += _print(str(node), answer.findings if isinstance(answer, Examination) else [sick])
        sound = {node: answer for node, answer in answers.items() if isinstance(answer, Examination)}
        wrong += _print(
            "all nodes",
            [*_differences(sound), *_roles(there), _tracking(config, len({node.address for node in there}))],
        )
        wrong += _print("network", _network([*sound], config))
    if wrong:
        raise RuntimeError(f"{counted(wrong, 'check')} failed: see the lines that say WRONG")
    print("nothing is wrong")


def plan(config: DoctorConfig) -> tuple[DoctorConfig, str]:
    """Return the config, and what the doctor would look at."""
    return config, (
        f"reads   every node: packages, GPUs, /dev/shm, compiler, disk, clock; {config.path('')}; the tracking server\n"
        f"writes  {config.megabytes} MB from each node below {storage.join(config.path(''), 'doctor')}, deleted again"
    )


def _print(place: str, findings: list[Finding]) -> int:
    print(f"\n{place}")
    for finding in findings:
        print(f"  {finding.level:8} {finding.check:14} {finding.words}")
    return sum(finding.level == "WRONG" for finding in findings)


# ------------------------------------------------------------------------------------------------ on a node


class Examination(NamedTuple):
    """What a node tells of itself."""

    findings: list[Finding]
    versions: dict[str, str]
    environment: dict[str, str]  # name -> digest of the value, so that a secret is compared and not told
    clock: float  # seconds since 1970


def examine_node(node: Node, store: str, megabytes: int) -> Examination:
    """Make all checks that a node makes on itself."""
    receive_environment()
    # A store that is away is a finding: it must not take longer than the time that a node has to answer.
    os.environ.setdefault("ADMIRAL_STORAGE_RETRY_SECONDS", "20")
    checks: list[Callable[[], Finding]] = [
        partial(_gpus, node),
        _shared_memory,
        partial(_compiler, needed=node.gpus > 0),
        _disk,
        partial(_store, store, megabytes),
    ]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    digests = {name: sha256(os.environ.get(name, "").encode()).hexdigest() for name in SAME_EVERYWHERE}
    return Examination([check() for check in checks], versions, digests, time.time())


def _gpus(node: Node) -> Finding:
    """Ray's GPUs against those that torch can use."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # a task without GPUs of its own sees none
    driver = _output(["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"])
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not node.gpus and driver is None:
        return Finding("GPU", "ok", "none")
    if driver is None:
        return Finding("GPU", "WRONG", f"Ray counts {node.gpus:g} GPUs, but nvidia-smi finds no driver: install it")
    first = driver.splitlines()[0]
    if usable < node.gpus:
        found = f"Ray counts {node.gpus:g} GPUs, torch {torch.__version__} (CUDA {torch.version.cuda}) can use {usable}"
        reason = "see nvidia-smi for the others" if usable else f"driver {first} is older or CUDA is absent"
        return Finding("GPU", "WRONG", f"{found}: {reason}")
    if usable > node.gpus:
        return Finding("GPU", "warning", f"{usable} GPUs ({first}), but Ray may hand out {node.gpus:g}")
    return Finding("GPU", "ok", f"{usable} GPUs, driver {first}, CUDA {torch.version.cuda}")


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    words = f"{size / 2**30:.1f} GiB"
    if size < SHARED_MEMORY:
        return Finding(
            "/dev/shm", "WRONG", f"{words}: NCCL and the object store need more; see docker's --ipc or an emptyDir"
        )
    return Finding("/dev/shm", "ok", words)


def _compiler(needed: bool) -> Finding:
    """Compiles a line of C++ that includes Python's headers, as torch.compile does."""
    level: Level = "WRONG" if needed else "warning"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\nint probe() { return PY_MAJOR_VERSION; }\n")
        headers = sysconfig.get_path("include")
        command = ["g++", "-shared", "-fPIC", f"-I{headers}", str(source), "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except FileNotFoundError:
            return Finding("compiler", level, "g++ is not installed, and torch.compile needs it")
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "g++ failed")
        return Finding("compiler", level, f"{reason.strip()}; torch.compile needs g++ and Python's headers")
    return Finding("compiler", "ok", "g++ and Python's headers")


def _disk() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    level: Level = "ok" if free >= DISK else "warning"
    return Finding("disk", level, f"{free / 2**30:.0f} GiB free in {tempfile.gettempdir()}, where Ray spills")


def _store(store: str, megabytes: int) -> Finding:
    """Write, read, list, create once and only once, delete; and how fast."""
    folder = storage.join(store, "doctor", uuid.uuid4().hex)
    try:
        finding = _store_is_used(store, folder, megabytes)
    except (OSError, ValueError) as error:
        finding = Finding("store", "WRONG", " ".join(str(error).split()))
    try:
        storage.delete(folder + "/")
    except (OSError, ValueError) as error:
        if finding.level == "ok":
            words = f"{finding.words}; but old checkpoints will stay, and files of this check do: {error}"
            return Finding("store", "warning", " ".join(words.split()))
    return finding


def _store_is_used(store: str, folder: str, megabytes: int) -> Finding:
    """Use the store as jobs do, below `folder`."""
    data, uri = os.urandom(megabytes * 1_000_000), storage.join(folder, "object")
    begin = time.perf_counter()
    storage.write_bytes(uri, data)
    written = time.perf_counter()
    if storage.read_bytes(uri) != data:
        return Finding("store", "WRONG", f"{store} gives back other bytes than were written")
    read = time.perf_counter()
    if storage.list_names(folder) != ["object"]:
        return Finding("store", "WRONG", f"{store} does not list what was just written")
    claim = storage.join(folder, "claim")
    if not storage.put_if_absent(claim, b"first") or storage.put_if_absent(claim, b"second"):
        return Finding(
            "store", "WRONG", f"{store} does not honour If-None-Match: two writers would overwrite each other"
        )
    rates = f"{megabytes / (written - begin):.0f} MB/s written, {megabytes / (read - written):.0f} MB/s read"
    return Finding("store", "ok", f"{store}: {rates}, listed, created once")


def _output(command: list[str]) -> str | None:
    """What a program prints; None where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------------ between nodes


def _differences(answers: dict[Node, Examination]) -> list[Finding]:
    """What should be the same everywhere and is not."""
    findings = []
    for package in (*PACKAGES, "python"):
        found = {node: answer.versions[package] for node, answer in answers.items()}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{version} on {node}" for node, version in found.items())
            findings.append(Finding("versions", "WRONG", f"{package}: {listed}: use one image on all nodes"))
    for name in SAME_EVERYWHERE:
        if len({answer.environment[name] for answer in answers.values()}) > 1:
            findings.append(Finding("environment", "WRONG", f"{name} is not the same on all nodes"))
    clocks = [answer.clock for answer in answers.values()]
    if clocks and max(clocks) - min(clocks) > CLOCK_SECONDS:
        findings.append(
            Finding("clock", "WRONG", f"clocks differ by {max(clocks) - min(clocks):.0f} s: set them by NTP")
        )
    if not findings and answers:
        versions = next(iter(answers.values())).versions
        findings.append(Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return findings


def _roles(there: list[Node]) -> list[Finding]:
    """A head beside other nodes should leave the work to them."""
    head = there[0]
    if len(there) == 1 or not head.is_head:
        return []
    if head.cpus or head.gpus:
        words = f"{head} offers {head.cpus:g} CPUs and {head.gpus:g} GPUs, so work may land on it: start it with none"
        return [Finding("head", "warning", words)]
    return [Finding("head", "ok", "holds no work")]


def _tracking(config: DoctorConfig, machines: int) -> Finding:
    """The tracking server, as the driver sees it: it alone talks to it."""
    try:
        uri = tracking_uri(config)
    except ValueError as error:
        return Finding("MLflow", "WRONG", str(error))
    if not uri.startswith("http"):
        level: Level = "ok" if machines == 1 else "WRONG"
        return Finding(
            "MLflow",
            level,
            f"{uri.split('://')[0]} file" + ("" if machines == 1 else ": several machines want a server"),
        )
    begin = time.perf_counter()
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            answer.read()
    except OSError as error:
        return Finding("MLflow", "WRONG", f"{uri} does not answer: {error}")
    return Finding("MLflow", "ok", f"{uri} answers in {1e3 * (time.perf_counter() - begin):.0f} ms")


def _network(there: list[Node], config: DoctorConfig) -> list[Finding]:
    """What nodes that train together exchange: gradients between GPUs over NCCL, everything else over gloo."""
    workers = [node for node in there if node.gpus] or [node for node in there if node.cpus]
    if len(workers) < 2:
        return [Finding("all-reduce", "ok", "one node: nothing to cross")]
    found = []
    for library in ("NCCL", "gloo") if all(node.gpus for node in workers) else ("gloo",):
        name = f"all-reduce by {library}"
        try:
            rate = all_reduce_bandwidth(workers, config.megabytes, config.timeout, use_gpu=library == "NCCL")
        except RuntimeError as error:
            reason = f"{error}: see {library.upper()}_SOCKET_IFNAME in the container file"
            found.append(Finding(name, "WRONG", reason))
        else:
            words = f"{rate:.2f} GB/s between {len(workers)} nodes, {config.megabytes} MB"
            found.append(Finding(name, "ok", words))
    return found
