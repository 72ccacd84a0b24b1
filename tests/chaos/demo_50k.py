"""Generation of 50,000 samples under kills: none is missing, none is duplicated, and all pixels are equal.

    make demo-50k SAMPLES=50000 KILLS=10 SEED=0

Trains the digits networks if they do not exist yet, and generates the samples twice to s3:// on a local server. In the
second generation, sampling workers are killed, and the driver is killed and restarted by the same command. Compares
both sets image by image, and the memory of the drivers at half and at the end. The last line is JSON. The exit code is
1 if a promise is broken.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro

from cluster.actor import WorkerActor
from cluster.servers import s3_server
from cluster.session import address, session
from orchestrator import storage
from orchestrator.generation.samples import list_shards, read_rows
from tests import servers

ROOT = Path(__file__).resolve().parents[2]
WORKER = f"ray::{WorkerActor.__name__}"  # process title of a sampling worker
POLL_SECONDS = 0.05
# Accepted growth of a driver, in bytes, after half of the samples. The first picture, which comes after a minute, takes
# 23 MiB once.
GROWTH = 16 << 20


@dataclass(frozen=True)
class Demo:
    """The samples and the kills."""

    samples: int = 50_000  # images
    kills: int = 10  # sampling workers to SIGKILL
    driver_kills: int = 2  # times that the driver is killed and restarted
    seed: int = 0  # of the times and the victims
    shard_size: int = 512  # images in a shard
    folder: str = "runs/demo-50k"  # networks and the MLflow file
    settings: tuple[str, ...] = (
        "--sampler.name", "ddim", "--sampler.num-steps", "5", "--guidance.scale", "1.0",
    )  # further options of jobs/generate_samples.py digits  # fmt: skip


@dataclass
class Run:
    """The observations of a generation, over all restarts of its driver."""

    shards: int  # number of shards to generate
    killed: list[str] = field(default_factory=list)  # the state of each killed process
    memory: list[tuple[int, int, int]] = field(default_factory=list)  # restarts, shards done, resident bytes of driver

    def growth(self, life: int) -> tuple[float, float]:
        """Return the driver's MiB after `life` restarts, at half of all samples (or at its start) and at its end."""
        rows = [(done, rss) for number, done, rss in self.memory if number == life]
        half = next(rss for done, rss in rows if done >= max(self.shards / 2, rows[0][0] + 1))
        return half / 2**20, rows[-1][1] / 2**20


def demonstrate(demo: Demo, bucket: str) -> dict[str, Any]:
    """Run both generations on the running Ray session and S3 server, and return their comparison."""
    undisturbed = generate(demo, f"{bucket}/undisturbed", events=[])
    disturbed = disturb(demo, bucket)
    result = {"samples": demo.samples, "seed": demo.seed, **compare(demo, bucket)}
    begin, end = undisturbed.growth(0)
    result |= {
        "kills": disturbed.killed.count("working") + disturbed.killed.count("starting"),
        "kills_while_starting": disturbed.killed.count("starting"),
        "driver_kills": disturbed.killed.count("driver"),
        "driver_mib_at_half": round(begin, 1),
        "driver_mib_at_end": round(end, 1),
        "last_driver_mib": [round(number, 1) for number in disturbed.growth(disturbed.memory[-1][0])],
    }
    result["broken"] = broken_promises(demo, result)
    return result


def disturb(demo: Demo, bucket: str) -> Run:
    """Run the generation with its kills, each as soon as a random share of the shards is done."""
    rng = np.random.default_rng(demo.seed)
    workers = [(moment, "worker") for moment in rng.uniform(0.0, 0.9, demo.kills)]
    drivers = [(moment, "driver") for moment in rng.uniform(0.2, 0.8, demo.driver_kills)]
    return generate(demo, f"{bucket}/disturbed", sorted(workers + drivers), rng)


def broken_promises(demo: Demo, result: dict[str, Any]) -> list[str]:
    """Return a description of each broken promise."""
    promises = {
        f"{result['missing']} samples are missing": result["missing"] == 0,
        f"{result['doubled']} samples are duplicated": result["doubled"] == 0,
        "pixels differ from the undisturbed run's": result["hashes_equal"],
        f"only {result['kills']} workers were killed": result["kills"] == demo.kills,
        f"only {result['driver_kills']} drivers were killed": result["driver_kills"] == demo.driver_kills,
        "the driver's memory grew": result["driver_mib_at_end"] - result["driver_mib_at_half"] < GROWTH / 2**20,
    }
    return [broken for broken, kept in promises.items() if not kept]


def generate(demo: Demo, output: str, events: list[tuple[float, str]], rng: Any = None) -> Run:
    """Run the job to its end, with a kill at each (share of finished shards, victim) of `events`."""
    command = [
        sys.executable, "jobs/generate_samples.py", "digits", "--store", demo.folder, "--output", output,
        "--num-samples", str(demo.samples), "--shard-size", str(demo.shard_size), "--num-workers", "2", *demo.settings,
    ]  # fmt: skip
    run, life = Run(-(-demo.samples // demo.shard_size)), 0
    driver = subprocess.Popen(command, cwd=ROOT)
    while driver.poll() is None:
        time.sleep(POLL_SECONDS)
        done = len(list_shards(output))
        with contextlib.suppress(psutil.NoSuchProcess):
            if rss := psutil.Process(driver.pid).memory_info().rss:  # 0 while the process ends
                run.memory.append((life, done, rss))
        if not events or done < events[0][0] * run.shards or not (victims := sampling_workers()):
            continue
        time.sleep(float(rng.uniform(0, 0.5)))  # so that a kill can occur at any moment of a shard
        if events[0][1] == "driver":
            driver.kill()
            if driver.wait() == -signal.SIGKILL:
                events.pop(0)
                run.killed.append("driver")
                driver, life = subprocess.Popen(command, cwd=ROOT), life + 1
        elif state := kill(victims[int(rng.integers(len(victims)))]):
            events.pop(0)
            run.killed.append(state)
    if driver.returncode:
        raise RuntimeError(f"the generation ended with exit code {driver.returncode}")
    return run


def sampling_workers() -> list[psutil.Process]:
    """Return the processes of Ray workers that sample or start."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith(WORKER):
                processes.append(process)
    return processes


def kill(victim: psutil.Process) -> str:
    """Kill a worker; return whether it was working or starting, or an empty string if it had already ended."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        state = "working" if victim.cmdline()[0].startswith(f"{WORKER}.work") else "starting"
        victim.kill()
        victim.wait(timeout=30)
        return state
    return ""


def compare(demo: Demo, bucket: str) -> dict[str, Any]:
    """Count missing and duplicated indices, and compare the pixel hashes of both generations."""
    hashes: dict[str, dict[int, bytes]] = {}
    doubled = 0
    for name in ("undisturbed", "disturbed"):
        hashes[name] = {}
        for _, rows in read_rows(f"{bucket}/{name}", 0, demo.samples):
            doubled += len(hashes[name].keys() & set(rows["index"]))
            hashes[name] |= zip(rows["index"], rows["sha256"], strict=True)
    missing = sum(demo.samples - len(digests) for digests in hashes.values())
    equal = hashes["undisturbed"] == hashes["disturbed"] and len(set(hashes["disturbed"].values())) > demo.samples // 2
    return {"missing": missing, "doubled": doubled, "hashes_equal": equal}


def main(demo: Demo) -> int:
    """Run the demo, print the result as JSON, and return the exit code."""
    demo = replace(demo, folder=os.path.abspath(demo.folder))
    os.makedirs(demo.folder, exist_ok=True)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{demo.folder}/mlflow.db"}
        server = {"AWS_ENDPOINT_URL": stack.enter_context(s3_server()), **servers.S3_SETTINGS}
        stack.enter_context(servers.environment(**tracking, **server))
        stack.enter_context(session(4))
        stack.enter_context(servers.environment(RAY_ADDRESS=address()))
        storage.make_bucket("s3://demo")
        for job in ("prepare_dataset", "train_adm", "train_classifier"):
            subprocess.run([sys.executable, f"jobs/{job}.py", "digits", "--store", demo.folder], cwd=ROOT, check=True)
        result = demonstrate(demo, "s3://demo")
    result["seconds"] = round(time.monotonic() - begun)
    print(json.dumps(result))
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Demo, description=__doc__)))
