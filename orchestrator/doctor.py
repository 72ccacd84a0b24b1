"""The doctor: checks of every node, the store and the tracking server, before a job uses GPUs."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
import uuid
from functools import partial
from hashlib import sha256
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from cluster.nodes import Node, all_reduce_bandwidth, nodes, on_each
from cluster.session import receive_environment, session
from orchestrator import storage
from orchestrator.config import JobConfig, tracking_uri
from orchestrator.mlflow_run import reason, response_seconds
from orchestrator.progress import counted

PACKAGES = ("ray", "torch", "numpy", "pyarrow", "mlflow")
SHARED_MEMORY = 1 << 30  # bytes; the default of containers is 64 MB
DISK = 20 << 30  # bytes that should be free for Ray's spilling
CLOCK_SECONDS = 60.0  # largest difference of clocks; S3 refuses requests that are 15 minutes off
SAME_EVERYWHERE = ("ADMIRAL_STORE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")

Level = Literal["ok", "warning", "WRONG"]


class DoctorConfig(JobConfig):
    """Sizes and timeouts of the checks."""

    megabytes: int = Field(32, gt=0)  # size of the object that times the store, and of the all-reduce
    timeout: float = Field(120.0, gt=0)  # seconds within which a node must respond


def doctor_presets() -> dict[str, tuple[str, DoctorConfig]]:
    """Return the doctor's only preset."""
    return {"cluster": ("every node, the store, the tracking server and the network", DoctorConfig())}


class Finding(NamedTuple):
    """The result of a check."""

    check: str
    level: Level
    text: str


def examine(config: DoctorConfig) -> None:
    """Check every node, and the connections between nodes; print the results.

    Raises:
        RuntimeError: some checks failed; their lines are printed above.
    """
    with session(1):
        cluster_nodes = nodes()
        cpus = counted(sum(node.cpus for node in cluster_nodes), "CPU")
        gpus = counted(sum(node.gpus for node in cluster_nodes), "GPU")
        print(f"{counted(len(cluster_nodes), 'node')}, {cpus}, {gpus}")
        examine_this_node = partial(examine_node, store=config.path(""), megabytes=config.megabytes)
        results = on_each(cluster_nodes, examine_this_node, config.timeout)
        examinations = {}
        num_failed = 0
        for node, result in results.items():
            if isinstance(result, Examination):
                examinations[node] = result
                findings = result.findings
            else:
                findings = [Finding("node", "WRONG", f"{type(result).__name__}: {result}")]
            num_failed += _print(str(node), findings)
        tracking = _tracking(config, machines=len({node.address for node in cluster_nodes}))
        num_failed += _print("all nodes", [*_differences(examinations), tracking])
        num_failed += _print("network", _network([*examinations], config))
    if num_failed:
        raise RuntimeError(f"{counted(num_failed, 'check')} failed; see the lines with WRONG above")
    print("all checks passed")


def plan(config: DoctorConfig) -> tuple[DoctorConfig, str]:
    """Return the config and the text of a dry run: what the doctor would check."""
    return config, (
        f"reads   every node: packages, GPUs, /dev/shm, compiler, disk, clock; {config.path('')}; the tracking server\n"
        f"writes  {config.megabytes} MB from each node below {storage.join(config.path(''), 'doctor')}, deleted again"
    )


def _print(heading: str, findings: list[Finding]) -> int:
    """Print findings under a heading; return the number of those that are WRONG."""
    print(f"\n{heading}")
    for finding in findings:
        print(f"  {finding.level:8} {finding.check:14} {finding.text}")
    return sum(finding.level == "WRONG" for finding in findings)


# ------------------------------------------------------------------------------------------------ on a node


class Examination(NamedTuple):
    """The results of all checks of a node."""

    findings: list[Finding]
    versions: dict[str, str]
    environment: dict[str, str]  # hash of the value by name, so that secrets are compared without being sent
    clock: float  # seconds since 1970


def examine_node(node: Node, store: str, megabytes: int) -> Examination:
    """Run the checks of the node of this process."""
    receive_environment()
    # An unreachable store must be reported before the timeout of the node.
    os.environ.setdefault("ADMIRAL_STORAGE_RETRY_SECONDS", "20")
    findings = [_gpus(node), _shared_memory(), _compiler(node.gpus > 0), _disk(), _store(store, megabytes)]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    digests = {name: sha256(os.environ.get(name, "").encode()).hexdigest() for name in SAME_EVERYWHERE}
    return Examination(findings, versions, digests, time.time())


def _gpus(node: Node) -> Finding:
    """Compare the GPUs that Ray counts with those that torch can use."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs from a task that requests none
    gpu_lines = None  # for each GPU "version of the driver, name of the GPU", or None without a driver
    with contextlib.suppress(FileNotFoundError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
        gpu_lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip() or None
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not node.gpus and gpu_lines is None:
        return Finding("GPU", "ok", "none")
    if gpu_lines is None:
        return Finding("GPU", "WRONG", f"Ray counts {node.gpus:g} GPUs, but nvidia-smi finds no driver: install it")
    first = gpu_lines.splitlines()[0]
    if usable < node.gpus:
        torch_version = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        reason = "see nvidia-smi for the others" if usable else f"driver {first} is older or CUDA is absent"
        text = f"Ray counts {node.gpus:g} GPUs, {torch_version} can use {usable}: {reason}"
        return Finding("GPU", "WRONG", text)
    if usable > node.gpus:
        return Finding("GPU", "warning", f"{usable} GPUs ({first}), but Ray may use only {node.gpus:g}")
    return Finding("GPU", "ok", f"{usable} GPUs, driver {first}, CUDA {torch.version.cuda}")


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    text = f"{size / 2**30:.1f} GiB"
    if size < SHARED_MEMORY:
        text += ": NCCL and the object store need more; set docker's --shm-size, or mount an emptyDir"
        return Finding("/dev/shm", "WRONG", text)
    return Finding("/dev/shm", "ok", text)


def _compiler(needed: bool) -> Finding:
    """Compile a line of C++ that includes Python's headers, as torch.compile does."""
    level: Level = "WRONG" if needed else "warning"
    command = ["g++", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-", "-o", "/dev/null"]
    source = "#include <Python.h>\nint probe() { return PY_MAJOR_VERSION; }\n"
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=60, check=False)
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
    """Use the store as jobs do, and time it. Delete everything at the end."""
    folder = storage.join(store, "doctor", uuid.uuid4().hex)
    try:
        finding = _exercise_store(store, folder, megabytes)
    except (OSError, ValueError) as error:
        finding = Finding("store", "WRONG", " ".join(str(error).split()))
    try:
        storage.delete(folder + "/")
    except (OSError, ValueError) as error:
        if finding.level == "ok":
            text = f"{finding.text}; but nothing can be deleted, so old checkpoints and files of this check stay"
            return Finding("store", "warning", f"{text}: {' '.join(str(error).split())}")
    return finding


def _exercise_store(store: str, folder: str, megabytes: int) -> Finding:
    """Write, read, list and create objects in `folder`, as jobs do."""
    data, uri = os.urandom(megabytes * 1_000_000), storage.join(folder, "object")
    begin = time.perf_counter()
    storage.write_bytes(uri, data)
    written = time.perf_counter()
    if storage.read_bytes(uri) != data:
        return Finding("store", "WRONG", f"{store} returned other bytes than were written")
    read = time.perf_counter()
    if storage.list_names(folder) != ["object"]:
        return Finding("store", "WRONG", f"{store} does not list an object that was just written")
    claim = storage.join(folder, "claim")
    if not storage.put_if_absent(claim, b"first") or storage.put_if_absent(claim, b"second"):
        text = f"{store} does not support If-None-Match, so two writers could overwrite each other"
        return Finding("store", "WRONG", text)
    rates = f"{megabytes / (written - begin):.0f} MB/s written, {megabytes / (read - written):.0f} MB/s read"
    return Finding("store", "ok", f"{store}: {rates}, listed, created once")


# ------------------------------------------------------------------------------------------------ between nodes


def _differences(examinations: dict[Node, Examination]) -> list[Finding]:
    """Compare package versions, environment variables and clocks of all nodes."""
    findings = []
    for package in (*PACKAGES, "python"):
        by_node = {node: examination.versions[package] for node, examination in examinations.items()}
        if len(set(by_node.values())) > 1:
            listed = ", ".join(f"{version} on {node}" for node, version in by_node.items())
            findings.append(Finding("versions", "WRONG", f"{package}: {listed}; use one image on all nodes"))
    for name in SAME_EVERYWHERE:
        if len({examination.environment[name] for examination in examinations.values()}) > 1:
            findings.append(Finding("environment", "WRONG", f"{name} is not the same on all nodes"))
    clocks = [examination.clock for examination in examinations.values()]
    if clocks and (spread := max(clocks) - min(clocks)) > CLOCK_SECONDS:
        findings.append(Finding("clock", "WRONG", f"clocks differ by {spread:.0f} s; synchronise them by NTP"))
    if not findings and examinations:
        versions = next(iter(examinations.values())).versions
        findings.append(Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return findings


def _tracking(config: DoctorConfig, machines: int) -> Finding:
    """Check the tracking server from this process, because only drivers use it."""
    try:
        uri = tracking_uri(config)
    except ValueError as error:
        return Finding("MLflow", "WRONG", str(error))
    if not uri.startswith("http"):
        text = f"{uri.split('://')[0]} file"
        if machines == 1:
            return Finding("MLflow", "ok", text)
        return Finding("MLflow", "WRONG", f"{text}, but several machines need a server")
    try:
        seconds = response_seconds(uri)
    except Exception as error:  # noqa: BLE001 - MLflow raises errors of several libraries
        return Finding("MLflow", "WRONG", f"{uri} does not respond as expected: {reason(error)}")
    return Finding("MLflow", "ok", f"{uri} responds in {1e3 * seconds:.0f} ms")


def _network(cluster_nodes: list[Node], config: DoctorConfig) -> list[Finding]:
    """Time all-reduce between the nodes: by NCCL between GPUs, and by gloo."""
    workers = [node for node in cluster_nodes if node.gpus] or [node for node in cluster_nodes if node.cpus]
    if len(workers) < 2:
        return [Finding("all-reduce", "ok", "not needed on one node")]
    findings = []
    for library in ("NCCL", "gloo") if all(node.gpus for node in workers) else ("gloo",):
        name = f"all-reduce by {library}"
        try:
            rate = all_reduce_bandwidth(workers, config.megabytes, config.timeout, use_gpu=library == "NCCL")
        except RuntimeError as error:
            text = f"{error}: see {library.upper()}_SOCKET_IFNAME in cluster/deploy/Dockerfile"
            findings.append(Finding(name, "WRONG", text))
        else:
            text = f"{rate:.2f} GB/s between {len(workers)} nodes, {config.megabytes} MB"
            findings.append(Finding(name, "ok", text))
    return findings
