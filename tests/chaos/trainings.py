"""A small training that can be killed: on scanned digits, on s3:// behind a fault proxy, by the real job."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from cluster.servers import s3_server
from jobs.command_line import parse
from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.data.presets import dataset_presets
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from orchestrator.training.presets import adm_presets
from tests import servers
from tests.chaos.killer import Account, Kill, Killer
from tests.chaos.plain import train_plainly
from tests.chaos.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16  # images in a step
CHECKPOINT = 4 * BATCH  # images from one checkpoint to the next


class Ground(NamedTuple):
    """Where trainings take place."""

    proxy: Proxy
    store: str


@contextlib.contextmanager
def ground(seed: int) -> Iterator[Ground]:
    """An S3 server, a fault proxy before it, and a bucket that holds the digits."""
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(s3_server())
        proxy = Proxy(endpoint, seed)
        stack.callback(proxy.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="admiral-chaos-"))
        settings = {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "OMP_NUM_THREADS": "1",
        }
        stack.enter_context(servers.environment(**settings, **servers.S3_SETTINGS))
        store = "s3://chaos"
        storage.make_bucket(store)
        prepare_digits(store)
        yield Ground(proxy, store)


def prepare_digits(store: str) -> None:
    """The dataset of all trainings here."""
    prepare(parse(None, dataset_presets(), ["digits", "--store", store]))


def arguments(store: str, output: str, workers: int, checkpoints: int, **changes: Any) -> list[str]:
    """The command line of a training of so many checkpoints. Dropout, flips and averages of two lengths play a part."""
    settings = {
        "store": store, "output": output, "audit_dir": f"{output}/audit", "num_workers": workers, "reduction": "exact",
        "total_images": checkpoints * CHECKPOINT, "batch_size": BATCH, "checkpoint_every": CHECKPOINT,
        "random_flip": "", "model.dropout": 0.1, "ema_rates": "0.9 0.99", "log_every": CHECKPOINT, "max_failures": 20,
        "snapshot_every": CHECKPOINT,  # such checkpoints are never skipped, and kills are planned at each
    }  # fmt: skip
    argv = ["digits"]
    for name, value in (settings | changes).items():
        argv += [f"--{name.replace('_', '-')}", *str(value).split()]
    return argv


def config_of(argv: list[str]) -> AdmConfig:
    return parse(None, adm_presets(), argv)


def train_here(config: AdmConfig, proxy: Proxy, plan: list[Kill], seed: int = 0) -> Account:
    """Train to the end by this process as the driver, through the workers' deaths that a plan names."""
    killer = Killer(proxy, config, plan, os.getpid, seed)
    killer.start()
    try:
        train(config)
    finally:
        killer.check()
    return killer.account


def train_by_processes(config: AdmConfig, proxy: Proxy, plan: list[Kill], seed: int = 0) -> Account:
    """Train to the end by plain processes, without Ray, whose group starts again after every death."""
    killer = Killer(proxy, config, plan, os.getpid, seed)
    killer.start()
    try:
        for _ in range(len(plan)):
            with contextlib.suppress(ProcessExitedException, ProcessRaisedException):
                train_plainly(config, config.num_workers)
        train_plainly(config, config.num_workers)
    finally:
        killer.check()
    return killer.account


def train_in_parts(configs: list[AdmConfig], proxy: Proxy, plan: list[Kill]) -> None:
    """Train by one config after the other, each stopped by SIGTERM to this process where the plan says so."""
    killer = Killer(proxy, configs[0], plan, os.getpid)
    killer.start()
    try:
        for config in configs[:-1]:
            with contextlib.suppress(KeyboardInterrupt):  # it was asked to stop, and did
                train(config)
        train(configs[-1])
    finally:
        killer.check()


def train_by_job(argv: list[str], proxy: Proxy, plan: list[Kill], seed: int = 0) -> Account:
    """Train to the end by the real job in a process of its own, started again after every death of its own."""
    jobs: list[subprocess.Popen[str]] = []
    killer = Killer(proxy, config_of(argv), plan, lambda: jobs[-1].pid, seed)
    if plan:
        killer.start()
    while True:
        job = start_job(argv)
        jobs.append(job)
        output, _ = job.communicate()
        if job.returncode == 0:
            break
        if job.returncode > 0 or len(jobs) > len(plan) + 1:
            raise RuntimeError(f"the job ended with code {job.returncode}: {output[-3000:]}")
    killer.check()
    return killer.account


def start_job(argv: list[str]) -> subprocess.Popen[str]:
    """The real job, in a process of its own; what it says comes through its stdout."""
    command = [sys.executable, "jobs/train_adm.py", *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
