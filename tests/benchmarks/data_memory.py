"""Measure the memory of the stream for a dataset larger than the object store, which must not spill. Run by hand:

    python -m tests.benchmarks.data_memory [--store-mib 300] [--times 10] [--image-size 64] [--step-ms 0]

Writes synthetic photographs of ImageNet's sizes, reads all of them once with one worker, and prints one line of JSON:
the bytes spilled, the peak of the object store, the peak memory of each kind of process (USS), and the seconds from the
first `next()` to the first batch with running workers.
"""

import json
import tempfile
import threading
import time
from dataclasses import dataclass

import psutil
import tyro

from cluster.session import session
from orchestrator.data.dataset import batches
from orchestrator.order import OrderConfig, OrderPlan
from tests.synthetic import photographs, sizes_of, write_dataset

ROW_GROUP = 64


@dataclass(frozen=True)
class Options:
    """The dataset and its reader."""

    store_mib: int = 300  # of the object store; Ray needs at least 75
    times: float = 10.0  # size of the set, in object stores
    image_size: int = 64  # pixels
    distinct: int = 600  # photographs; the set repeats them
    batch_size: int = 256  # images in a step
    step_ms: float = 0.0  # duration of a step, milliseconds
    workers: int = 1  # training workers that share the set; only the first one is run


class Peaks(threading.Thread):
    """Records peaks of the object store, of this process and of Ray's processes every 0.1 s until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.store = self.driver = self.task = 0  # bytes
        self._stopped = threading.Event()

    def run(self) -> None:
        this = psutil.Process()
        while not self._stopped.wait(0.1):
            self.store = max(self.store, _store_statistics()["used"])
            self.driver = max(self.driver, this.memory_full_info().uss)
            for child in this.children(recursive=True):
                try:
                    if child.name().startswith("ray::"):
                        self.task = max(self.task, child.memory_full_info().uss)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue  # the process has just ended

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _store_statistics() -> dict[str, int]:
    """Return the bytes of all object stores in the cluster: used now, and spilled to disk since their start."""
    import ray
    from ray._private import internal_api  # there is no public interface

    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    statistics = internal_api.get_memory_info_reply(state).store_stats
    return {"used": statistics.object_store_bytes_used, "spilled": statistics.spilled_bytes_total}


def measure(options: Options) -> dict[str, float]:
    """Read the dataset once, and return sizes in MiB and times in seconds."""
    images = photographs(options.distinct)
    mean = sum(map(len, images)) / len(images)
    rows = int(options.times * (options.store_mib << 20) / mean / ROW_GROUP + 1) * ROW_GROUP
    with tempfile.TemporaryDirectory() as folder, session(4, options.store_mib << 20):
        manifest = write_dataset(folder, images, sizes_of(images), rows, ROW_GROUP)
        del images
        order = OrderPlan(manifest.row_group_sizes("train"), options.batch_size, OrderConfig(num_streams=4))

        def read(end: int) -> tuple[int, float]:
            """Return the number of images, and the seconds until the first batch."""
            begin, first, count = time.perf_counter(), 0.0, 0
            for shares in batches(manifest, order, 0, options.workers, 0, options.image_size, flip=True, end=end):
                first = first or time.perf_counter() - begin
                count += sum(len(share.images) for share in shares)
                time.sleep(options.step_ms / 1e3)
            return count, first

        read(options.batch_size)  # starts Ray's processes
        peaks = Peaks()
        peaks.start()
        begin = time.perf_counter()
        count, first = read(order.images_per_epoch)
        seconds = time.perf_counter() - begin
        peaks.stop()
        assert count * options.workers == order.images_per_epoch
        return {
            "set_mib": sum(shard.bytes for shard in manifest.shards("train")) / 2**20,
            "store_mib": options.store_mib,
            "images": count,
            "decoded_mib": count * options.image_size**2 * 3 / 2**20,
            "spilled_mib": _store_statistics()["spilled"] / 2**20,
            "peak_store_mib": peaks.store / 2**20,
            "peak_driver_mib": peaks.driver / 2**20,
            "peak_task_mib": peaks.task / 2**20,
            "first_batch_s": first,
            "images_per_s": count / seconds,
        }


if __name__ == "__main__":
    print(json.dumps({name: round(value, 2) for name, value in measure(tyro.cli(Options)).items()}))
