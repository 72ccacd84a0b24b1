"""Small trainings for fault injection: on scanned digits, on s3:// behind a fault proxy."""

import contextlib
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
from orchestrator.training.presets import adm_presets
from tests import servers
from tests.chaos.killer import Kill, killing
from tests.chaos.plain import train_plainly
from tests.chaos.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16  # images in a step
CHECKPOINT = 4 * BATCH  # images from one checkpoint to the next


class ChaosStorage(NamedTuple):
    """A bucket with the digits dataset, and the fault proxy in front of its server."""

    proxy: Proxy
    store: str


@contextlib.contextmanager
def chaos_storage(seed: int) -> Iterator[ChaosStorage]:
    """Yield an S3 server with a fault proxy and a bucket with the digits dataset."""
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
        yield ChaosStorage(proxy, store)


def prepare_digits(store: str) -> None:
    """Prepare the digits dataset."""
    prepare(parse(None, dataset_presets(), ["digits", "--store", store]))


def arguments(store: str, output: str, workers: int, checkpoints: int, **changes: Any) -> list[str]:
    """Return the command line of a training of `checkpoints` checkpoints, with dropout, flips and two EMAs."""
    settings = {
        "store": store, "output": output, "audit_dir": f"{output}/audit", "num_workers": workers, "reduction": "exact",
        "total_images": checkpoints * CHECKPOINT, "batch_size": BATCH, "checkpoint_every": CHECKPOINT,
        "random_flip": "", "model.dropout": 0.1, "ema_rates": "0.9 0.99", "log_every": CHECKPOINT, "max_failures": 20,
        "snapshot_every": CHECKPOINT,  # checkpoints with a snapshot are never skipped, and kills need each of them
    }  # fmt: skip
    argv = ["digits"]
    for name, value in (settings | changes).items():
        argv += [f"--{name.replace('_', '-')}", *str(value).split()]
    return argv


def config_of(argv: list[str]) -> AdmConfig:
    return parse(None, adm_presets(), argv)


def train_by_processes(config: AdmConfig, proxy: Proxy, plan: list[Kill], seed: int = 0) -> None:
    """Train to the end in plain processes, without Ray; the process group is restarted after every kill."""
    with killing(proxy, config, plan, seed=seed):
        for _ in range(len(plan)):
            with contextlib.suppress(ProcessExitedException, ProcessRaisedException):
                train_plainly(config, config.num_workers)
        train_plainly(config, config.num_workers)


def train_by_job(argv: list[str], proxy: Proxy, plan: list[Kill], seed: int = 0) -> None:
    """Train to the end by the job in its own process, which is restarted whenever it is killed."""
    jobs: list[subprocess.Popen[str]] = []
    with killing(proxy, config_of(argv), plan, lambda: jobs[-1].pid, seed):
        while not jobs or jobs[-1].returncode:
            if len(jobs) > len(plan) + 1:
                raise RuntimeError(f"the job ended {len(jobs)} times")
            jobs.append(start_job(argv))
            output, _ = jobs[-1].communicate()
            if jobs[-1].returncode > 0:
                raise RuntimeError(f"the job ended with code {jobs[-1].returncode}: {output[-3000:]}")


def start_job(argv: list[str]) -> subprocess.Popen[str]:
    """Start the training job in its own process, with stderr redirected to stdout."""
    command = [sys.executable, "jobs/train_adm.py", *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
