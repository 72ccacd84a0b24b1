"""Compare the images/s of Admiral's stream with other loaders on the same cores. Run by hand:

    python -m tests.benchmarks.data_speed [--image-size 64] [--store local] [--rounds 7] [--mosaic-python PYTHON]

All loaders decode the same synthetic photographs of ImageNet's sizes with `--processes` processes, crop them with
`center_crop`, and pass them to a loop that only counts them. The ceiling is a pool of processes that reads the same row
groups, decodes and crops, but returns no images. The others are a torch DataLoader over one file for each image, and
mosaicml-streaming over its own local shards. The latter needs another numpy: install `.[bench]` in a separate
environment and pass its Python. Every round runs all loaders in a new random order. A row has the median rate, and the
median ratio of Admiral's rate to this rate with a 95% interval.
"""

import io
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cluster.servers import s3_server
from cluster.session import session
from orchestrator import storage
from orchestrator.data.crops import center_crop
from orchestrator.data.dataset import Manifest, batches
from orchestrator.data.images import decode
from orchestrator.data.row_groups import read_row_group
from orchestrator.order import OrderConfig, OrderPlan
from tests import servers
from tests.benchmarks.pool_efficiency import median_interval
from tests.synthetic import photographs, sizes_of, write_dataset

BATCH = 256  # images
Pass = Callable[[], float]  # reads all images once, and returns the seconds


@dataclass(frozen=True)
class Options:
    """The dataset and the loaders."""

    image_size: int = 64  # pixels
    store: Literal["local", "s3"] = "local"  # storage of shards and files
    rounds: int = 7
    images: int = 12288  # in a pass
    distinct: int = 600  # photographs; the set repeats them
    processes: int = 2  # of every loader; for Admiral, CPUs for its tasks
    mosaic_python: str = ""  # Python of an environment with mosaicml-streaming; empty: do not measure it


def main(options: Options) -> None:
    """Print the table."""
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(options))
        pictures = photographs(options.distinct)
        manifest = write_dataset(folder, pictures, sizes_of(pictures), options.images)
        paths = [storage.join(folder, "files", f"{i:06d}.jpg") for i in range(options.images)]
        for i, path in enumerate(paths):
            storage.write_bytes(path, pictures[i % len(pictures)])
        del pictures
        stack.enter_context(session(options.processes))
        passes: dict[str, Pass] = {"ours": lambda: _ours(manifest, options)}
        pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.processes))
        passes["ceiling"] = lambda: _bare(pool, manifest, options)
        passes["DataLoader"] = _data_loader(paths, options)
        if options.mosaic_python and options.store == "local":
            passes["mosaicml-streaming"] = stack.enter_context(_mosaic(paths, options))
        for run in passes.values():
            run()  # warm up: processes, caches
        rng = np.random.default_rng(0)
        seconds = {name: np.zeros(options.rounds) for name in passes}
        for number in range(options.rounds):
            for name in rng.permutation(list(passes)):
                seconds[name][number] = passes[name]()
    print(options)
    print(f"{'loader':22} {'images/s':>9} {'ours/this':>10} {'95% interval':>17}")
    for name, durations in seconds.items():
        ratios = np.sort(durations / seconds["ours"])
        low, high = median_interval(ratios)
        rate = options.images / np.median(durations)
        print(f"{name:22} {rate:9.0f} {np.median(ratios):10.3f} {low:8.3f} to {high:5.3f}", flush=True)


@contextmanager
def _folder(options: Options) -> Iterator[str]:
    """Yield a folder for the dataset: a temporary one, or a bucket of an S3 server on this machine."""
    if options.store == "local":
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    else:
        with s3_server() as endpoint, servers.environment(AWS_ENDPOINT_URL=endpoint, **servers.S3_SETTINGS):
            storage.make_bucket("s3://speed")
            yield "s3://speed"


def _ours(manifest: Manifest, options: Options) -> float:
    order = OrderPlan(manifest.row_group_sizes("train"), BATCH, OrderConfig(num_streams=4))
    assert order.images_per_epoch == options.images, "every image once"
    begin, count = time.perf_counter(), 0
    for shares in batches(manifest, order, 0, 1, 0, options.image_size, flip=True, end=order.images_per_epoch):
        count += sum(len(share.images) for share in shares)
    assert count == options.images
    return time.perf_counter() - begin


def _bare(pool: "multiprocessing.pool.Pool", manifest: Manifest, options: Options) -> float:
    jobs = [
        (storage.join(manifest.root, shard.path), shard.bytes, group, options.image_size)
        for shard in manifest.shards("train")
        for group in range(len(shard.row_groups))
    ]
    begin = time.perf_counter()
    assert sum(pool.imap_unordered(_decode_row_group, jobs)) == options.images
    return time.perf_counter() - begin


def _decode_row_group(job: tuple[str, int, int, int]) -> int:
    uri, size, group, image_size = job
    images = read_row_group(uri, size, group, ("label", "image"))["image"]
    for number, data in enumerate(images):
        _crop(decode(data.as_py()), image_size, number % 2 == 1)
    return len(images)


def _crop(image: Image.Image, size: int, mirrored: bool) -> np.ndarray:
    crop = center_crop(image, size)
    return np.array(crop[:, ::-1] if mirrored else crop)


class Files(Dataset):
    """A torch dataset with one file for each image."""

    def __init__(self, paths: list[str], image_size: int) -> None:
        self.paths, self.image_size = paths, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.paths[index]
        data = storage.read_bytes(path) if "://" in path else Path(path).read_bytes()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return _crop(image, self.image_size, index % 2 == 1), index % 10


def _data_loader(paths: list[str], options: Options) -> Pass:
    loader = DataLoader(
        Files(paths, options.image_size),
        batch_size=BATCH,
        shuffle=True,
        num_workers=options.processes,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    return lambda: _seconds(loader, options.images)


def _seconds(loader: "DataLoader[tuple[np.ndarray, int]]", images: int) -> float:
    begin, count = time.perf_counter(), 0
    for batch, _ in loader:
        count += len(batch)
    assert count == images
    return time.perf_counter() - begin


# -------------------------------------------------------------------------------------- in a separate environment


@contextmanager
def _mosaic(paths: list[str], options: Options) -> Iterator[Pass]:
    """Yield a function that requests a pass of mosaic_peer.py, a process with shards of the same files."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "paths").write_text("\n".join(paths))
        command = [options.mosaic_python, "-m", "tests.benchmarks.mosaic_peer", folder]
        command += [str(options.image_size), str(options.processes), str(BATCH)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert peer.stdin and peer.stdout

        def run() -> float:
            assert peer.stdin and peer.stdout
            print("pass", file=peer.stdin, flush=True)
            return float(peer.stdout.readline())

        yield run
        peer.stdin.close()
        peer.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options, description=__doc__))
    sys.exit()
