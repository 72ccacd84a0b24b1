"""Measure the overhead of Ray in a training: the same loop under Ray and in plain processes. Run by hand:

    python -m tests.benchmarks.train_overhead [--pairs 20] [--steps 16] [--workers 2]

One side is `train_loop` under Ray Train with its stream. The other side is the same loop in plain processes with gloo,
which decode their images themselves. Both sides are started once, and only one runs at a time: all processes of the
other, including Ray's, are stopped by SIGSTOP, so that each side pays for its own read-ahead. A pair is one window of
each side. Prints the seconds of a step on both sides, and the median ratio with a 95% interval. The exit code is 0 if
the lower end of the interval is at most 1.02.

Fewer images are read ahead than in a real training, so that each window pays for the images that it reads.
"""

import contextlib
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import tyro
from PIL import Image

from cluster.session import session
from cluster.trainer import WorkerContext, run_workers
from models.diffusion import DiffusionConfig
from models.unet import UNetConfig
from orchestrator.data import dataset
from orchestrator.data.config import PrepareConfig
from orchestrator.data.job import prepare
from orchestrator.order import OrderConfig
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train_loop
from tests.benchmarks.pool_efficiency import median_interval
from tests.chaos.plain import start_plainly

IMAGES = 2048  # JPEGs in the dataset
WIDTH, HEIGHT = 500, 375  # pixels, the median of ImageNet
TIMEOUT_SECONDS = 120.0  # for the steps of a window
Kind = Literal["plain", "ray"]


@dataclass(frozen=True)
class Options:
    """The measurement."""

    pairs: int = 20  # alternating windows of both sides
    steps: int = 16  # of a window
    workers: int = 2  # training processes of each side
    image_size: int = 32  # pixels
    batch_size: int = 64  # images in a step, over all workers
    read_ahead: int = 1024  # rows that Ray reads before they are needed
    side: Kind | None = None  # set by the benchmark itself to run one side in `folder`
    folder: str = ""


def main(options: Options) -> int:
    """Print the results, and return the exit code."""
    if options.side is not None:
        serve(options, options.side)
        return 0
    times: dict[Kind, list[float]] = {"plain": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="admiral-overhead-") as folder:
        make_dataset(folder)
        with contextlib.ExitStack() as stack:
            sides: list[Side] = []
            for kind in times:
                sides.append(stack.enter_context(start_side(replace(options, side=kind, folder=folder))))
                sides[-1].halt()
            for pair in range(-2, options.pairs):  # the first two pairs are a warm-up
                for side in sides:
                    seconds = side.measure(options.steps)
                    if pair >= 0:
                        times[side.kind].append(seconds)
    ratios = np.sort(np.array(times["ray"]) / np.array(times["plain"]))
    low, high = median_interval(ratios)
    for kind, values in times.items():
        print(f"{kind:5} {np.median(values) * 1e3:7.1f} ms a step of {options.batch_size} images")
    print(f"ray/plain over {options.pairs} pairs: {np.median(ratios):.3f}, 95% interval {low:.3f} to {high:.3f}")
    return 0 if low <= 1.02 else 1


class Side:
    """One side: a tree of processes that can be stopped and continued."""

    def __init__(self, kind: Kind, process: subprocess.Popen, stamps: Path) -> None:
        self.kind = kind
        self._process, self._stamps = process, stamps

    def measure(self, steps: int) -> float:
        """Continue for `steps` steps after the interrupted one, and return their mean seconds."""
        before = len(self.step_ends())
        self._signal(signal.SIGCONT)
        self.await_steps(before + 1 + steps)
        self.halt()
        ends = self.step_ends()[before : before + 1 + steps]
        return (ends[-1] - ends[0]) / steps

    def halt(self) -> None:
        """Stop all processes."""
        self._signal(signal.SIGSTOP)

    def step_ends(self) -> list[float]:
        """Return the times at which rank 0 finished its steps."""
        if not self._stamps.exists():
            return []
        data = self._stamps.read_bytes()
        return [moment for (moment,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]

    def await_steps(self, count: int) -> None:
        """Wait until `count` steps are finished."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(self.step_ends()) < count:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the {self.kind} side is stalled (exit code {self._process.returncode})")
            time.sleep(0.02)

    def _signal(self, number: signal.Signals) -> None:
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(number)


@contextlib.contextmanager
def start_side(options: Options) -> Iterator[Side]:
    """Start a side in its own processes, and yield it after its first steps."""
    assert options.side is not None
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()]
    process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.train_overhead", *settings])
    side = Side(options.side, process, _stamps(options))
    try:
        side.await_steps(50)
        yield side
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def serve(options: Options, kind: Kind) -> None:
    """Run one side until it is killed."""
    loop = partial(stamped_loop, config_of(options), str(_stamps(options)), options.read_ahead)
    if kind == "plain":
        start_plainly(loop, options.workers).join()
    else:
        with session(2 * options.workers, object_store_memory=200 << 20):
            run_workers(loop, options.workers, lambda record: None)


def stamped_loop(config: AdmConfig, stamps: str, read_ahead: int, context: WorkerContext) -> None:
    """Run the training loop; rank 0 writes the time of every step to a file."""
    dataset.READ_AHEAD_ROWS = read_ahead
    with open(stamps if context.rank == 0 else "/dev/null", "ab", buffering=0) as file:

        def stopping() -> bool:  # the loop calls this once a step
            file.write(struct.pack("d", time.monotonic()))
            return context.stopping()

        train_loop(config, replace(context, stopping=stopping))


def config_of(options: Options) -> AdmConfig:
    """Return the config of a small ADM, whose step takes about four times as long as decoding its images."""
    model = UNetConfig(
        image_size=options.image_size, model_channels=32, num_res_blocks=1, channel_mult=(1, 1),
        attention_resolutions=(16,), num_head_channels=32, num_classes=None,
    )  # fmt: skip
    return AdmConfig(
        store=options.folder, dataset="dataset", output=f"run-{options.side}", model=model,
        diffusion=DiffusionConfig(schedule="cosine"), order=OrderConfig(num_streams=4, shuffle_row_groups=2),
        total_images=10**12, batch_size=options.batch_size, checkpoint_every=10**12, preview_every=10**12,
        log_every=10**12, num_workers=options.workers,
    )  # fmt: skip


def make_dataset(folder: str) -> None:
    """Write JPEGs of smooth noise, and prepare them as a dataset."""
    rng = np.random.default_rng(0)
    source = Path(folder) / "images" / "0"
    source.mkdir(parents=True)
    for number in range(IMAGES):
        noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(source / f"{number}.jpg", quality=90)
    prepare(PrepareConfig(store=folder, source=str(source.parent), output="dataset", name="noise"))


def _stamps(options: Options) -> Path:
    return Path(options.folder) / f"steps-{options.side}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
