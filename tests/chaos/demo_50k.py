"""Fifty thousand samples while workers and drivers are killed: nothing lost, nothing doubled, every pixel the same.

    make demo-50k SAMPLES=50000 KILLS=10 SEED=0

Trains the digits' networks where they are not there yet, generates the samples to s3:// on a server of this machine,
once undisturbed and once while sampling workers are SIGKILLed and the driver is SIGKILLed and started again by the same
command, compares both image by image, and measures the disturbed ones. Keeps the drivers' memory as memory.csv and
memory.png. Ends with one line of JSON; exit code 1 where a promise is broken.
"""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import tyro

from cluster.actor import WorkerActor
from cluster.servers import s3_server
from cluster.session import address, session
from orchestrator import storage
from orchestrator.generation.samples import list_shards, read_rows

matplotlib.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
WORKER = f"ray::{WorkerActor.__name__}"  # what Ray calls the process of a sampling worker
LOOK_SECONDS = 0.05  # between two looks at the run
GROWTH = 16 << 20  # bytes by which a driver may grow from a tenth of the samples to their end: what allocators keep


@dataclass(frozen=True)
class Demo:
    """How much is made, and how much is broken on the way."""

    samples: int = 50_000  # images
    kills: int = 10  # sampling workers to SIGKILL
    driver_kills: int = 2  # times that the driver is SIGKILLed and started again
    seed: int = 0  # of the moments and the victims
    shard_size: int = 512  # images in a shard
    folder: str = "runs/demo-50k"  # networks, curves and the tracking file
    settings: tuple[str, ...] = (
        "--sampler.name", "ddim", "--sampler.num-steps", "5", "--guidance.scale", "1.0",
    )  # further options of jobs/generate_samples.py digits  # fmt: skip
    weights: str | None = None  # the digits' diffusion model and classifier where they are trained already,
    classifier: str | None = None  # as files; without them both are trained here
    evaluate: bool = True  # measure the samples


@dataclass
class Run:
    """What was seen of one generation, over all lives of its driver."""

    shards: int  # to be made
    killed: list[str] = field(default_factory=list)  # what each victim was doing
    memory: list[tuple[float, int, int, int]] = field(default_factory=list)  # seconds, life, shards done, driver's RSS

    def growth(self, life: int) -> tuple[float, float]:
        """The driver's memory in MiB at a tenth of all samples (or where its life began) and at its end."""
        rows = [(done, rss) for _, number, done, rss in self.memory if number == life]
        tenth = next(rss for done, rss in rows if done >= max(self.shards / 10, rows[0][0] + 1))
        return tenth / 2**20, rows[-1][1] / 2**20


def demonstrate(demo: Demo, bucket: str) -> dict[str, Any]:
    """Both runs and their comparison, on a Ray session and an S3 server that are there; answers the JSON line."""
    undisturbed = generate(demo, f"{bucket}/undisturbed", events=[])
    rng = np.random.default_rng(demo.seed)
    workers = [(moment, "worker") for moment in rng.uniform(0.0, 0.9, demo.kills)]
    drivers = [(moment, "driver") for moment in rng.uniform(0.2, 0.8, demo.driver_kills)]
    disturbed = generate(demo, f"{bucket}/disturbed", sorted(workers + drivers), rng)
    draw_memory(demo, {"undisturbed": undisturbed, "disturbed": disturbed})
    result = {"samples": demo.samples, "seed": demo.seed, **compare(demo, bucket)}
    lives = max(life for _, life, _, _ in disturbed.memory)
    begin, end = undisturbed.growth(0)
    result |= {
        "kills": disturbed.killed.count("working") + disturbed.killed.count("starting"),
        "kills_while_starting": disturbed.killed.count("starting"),
        "driver_kills": disturbed.killed.count("driver"),
        "driver_mib_at_tenth": round(begin, 1),
        "driver_mib_at_end": round(end, 1),
        "last_driver_mib": [round(number, 1) for number in disturbed.growth(lives)],
    }
    result["broken"] = broken_promises(demo, result)
    return result


def broken_promises(demo: Demo, result: dict[str, Any]) -> list[str]:
    """In words, what a result does not keep of what was promised."""
    promises = {
        f"{result['missing']} samples are missing": result["missing"] == 0,
        f"{result['doubled']} samples are doubled": result["doubled"] == 0,
        "pixels differ from the undisturbed run's": result["hashes_equal"],
        f"only {result['kills']} workers were killed": result["kills"] == demo.kills,
        f"only {result['driver_kills']} drivers were killed": result["driver_kills"] == demo.driver_kills,
        "the driver's memory grew": result["driver_mib_at_end"] - result["driver_mib_at_tenth"] < GROWTH / 2**20,
    }
    return [broken for broken, kept in promises.items() if not kept]


# ------------------------------------------------------------------------------------------------ one generation


def generate(demo: Demo, output: str, events: list[tuple[float, str]], rng: Any = None) -> Run:
    """Run the job to its end, whatever is killed on the way: at each (share of shards done, victim) of `events`."""
    command = [
        sys.executable, "jobs/generate_samples.py", "digits", "--store", demo.folder, "--output", output,
        "--num-samples", str(demo.samples), "--shard-size", str(demo.shard_size), "--num-workers", "2", *demo.settings,
    ]  # fmt: skip
    run, begun, life = Run(-(-demo.samples // demo.shard_size)), time.monotonic(), 0
    driver = subprocess.Popen(command, cwd=ROOT)
    while driver.poll() is None:
        time.sleep(LOOK_SECONDS)
        done = len(list_shards(output))
        with contextlib.suppress(psutil.NoSuchProcess):
            if rss := psutil.Process(driver.pid).memory_info().rss:  # nothing while it ends
                run.memory.append((time.monotonic() - begun, life, done, rss))
        if not events or done < events[0][0] * run.shards or not (victims := sampling_workers()):
            continue
        time.sleep(float(rng.uniform(0, 0.5)))  # so that it hits anything, not only the end of a shard
        if events[0][1] == "driver":
            driver.kill()
            if driver.wait() == -signal.SIGKILL:
                events.pop(0)
                run.killed.append("driver")
                driver, life = subprocess.Popen(command, cwd=ROOT), life + 1
        elif did := kill(victims[int(rng.integers(len(victims)))]):
            events.pop(0)
            run.killed.append(did)
    if driver.returncode:
        raise RuntimeError(f"the generation ended with exit code {driver.returncode}")
    return run


def sampling_workers() -> list[psutil.Process]:
    """The processes beneath this one's Ray that sample or get ready to."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith(WORKER):
                found.append(process)
    return found


def kill(victim: psutil.Process) -> str:
    """SIGKILL a worker; answers what it was doing, or nothing where it had ended by itself."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        doing = "working" if victim.cmdline()[0].startswith(f"{WORKER}.work") else "starting"
        victim.kill()
        victim.wait(timeout=30)
        return doing
    return ""


# ------------------------------------------------------------------------------------------------ what came out


def compare(demo: Demo, bucket: str) -> dict[str, Any]:
    """Every index counted, and its pixels' hash beside the undisturbed run's."""
    hashes: dict[str, dict[int, bytes]] = {}
    doubled = 0
    for name in ("undisturbed", "disturbed"):
        hashes[name] = {}
        for _, rows in read_rows(f"{bucket}/{name}", 0, demo.samples):
            doubled += len(hashes[name].keys() & set(rows["index"]))
            hashes[name] |= zip(rows["index"], rows["sha256"], strict=True)
    missing = sum(demo.samples - len(found) for found in hashes.values())
    equal = hashes["undisturbed"] == hashes["disturbed"] and len(set(hashes["disturbed"].values())) > demo.samples // 2
    return {"missing": missing, "doubled": doubled, "hashes_equal": equal}


def evaluate(demo: Demo, samples: str, output: str) -> dict[str, Any]:
    """The metrics of the samples, by the job, in shards; its report is kept beside the curves."""
    command = [
        sys.executable, "jobs/evaluate_samples.py", "digits", "--store", demo.folder,
        "--samples", samples, "--output", output, "--num-workers", "2",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("report.json", "report.html"):  # the server forgets everything
        Path(demo.folder, name).write_bytes(storage.read_bytes(storage.join(output, name)))
    metrics = storage.read_json(storage.join(output, "report.json"))["metrics"]
    return {name: {"value": metric["value"], "interval": metric["interval"]} for name, metric in metrics.items()}


def draw_memory(demo: Demo, runs: dict[str, Run]) -> None:
    """memory.csv and memory.png: what the drivers held against the shards done."""
    os.makedirs(demo.folder, exist_ok=True)
    with open(Path(demo.folder, "memory.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "seconds", "life", "shards_done", "driver_rss_bytes"])
        table.writerows([name, f"{row[0]:.2f}", *row[1:]] for name, run in runs.items() for row in run.memory)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, run in runs.items():
        for life in sorted({row[1] for row in run.memory}):
            rows = [row for row in run.memory if row[1] == life]
            axes.plot(
                [100 * row[2] / run.shards for row in rows],
                [row[3] / 2**20 for row in rows],
                label=name if run.memory[-1][1] == 0 else f"{name}, driver {life + 1}",
            )
    axes.set(xlabel="samples on storage, %", ylabel="resident memory of the driver, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(Path(demo.folder, "memory.png"), dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ its surroundings


def train(demo: Demo) -> Demo:
    """The digits, and their diffusion model and classifier, as the quickstart makes them, where they are not given."""
    trained = demo.weights and demo.classifier
    for job in ("prepare_dataset",) if trained else ("prepare_dataset", "train_adm", "train_classifier"):
        subprocess.run([sys.executable, f"jobs/{job}.py", "digits", "--store", demo.folder], cwd=ROOT, check=True)
    if not (demo.weights and demo.classifier):
        return demo
    given = ("--weights", os.path.abspath(demo.weights), "--classifier", os.path.abspath(demo.classifier))
    return replace(demo, settings=(*demo.settings, *given))


@contextlib.contextmanager
def bucket_on_local_s3() -> Iterator[str]:
    """A bucket on an S3 server of this machine, spoken to over HTTP; the server ends with the context."""
    with s3_server() as endpoint:
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        storage.make_bucket("s3://demo")
        yield "s3://demo"


def main(demo: Demo) -> int:
    """Everything; prints the JSON line and answers the exit code."""
    demo = replace(demo, folder=os.path.abspath(demo.folder))
    os.makedirs(demo.folder, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{demo.folder}/mlflow.db"
    begun = time.monotonic()
    with bucket_on_local_s3() as bucket, session(4):
        os.environ["RAY_ADDRESS"] = address()
        demo = train(demo)
        result = demonstrate(demo, bucket)
        if demo.evaluate:
            result["metrics"] = evaluate(demo, f"{bucket}/disturbed", f"{bucket}/evaluation")
    result["seconds"] = round(time.monotonic() - begun)
    print(json.dumps(result))
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Demo, description=__doc__)))
