"""Measure memory and time of indexing a source with many images in one process. Run by hand:

    python -m tests.benchmarks.index_memory [--classes 21841] [--images 640]

Reads a simulated source with the class folders of ImageNet-21k, and prints the peak of resident memory and the resident
memory before it.
"""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import tyro

from orchestrator import storage
from orchestrator.data.config import PrepareConfig
from orchestrator.data.sources import read_source
from orchestrator.data.sources.index import list_source

PERMUTED = 7919  # a prime, by which folders are listed unsorted, as by a file system


@dataclass(frozen=True)
class Options:
    """The size of the source."""

    classes: int = 21_841  # folders
    images: int = 640  # in each folder


def main(options: Options) -> None:
    """List and index the source, and print time and memory."""

    def list_tree(uri: str) -> Iterator[list[tuple[str, int]]]:
        for number in range(options.classes):
            name = f"n{number * PERMUTED % options.classes:08d}"
            yield [(f"{name}/{name}_{image}.JPEG", 100_000 + image) for image in range(options.images)]

    config = PrepareConfig(source="/nowhere", output="/nowhere", name="simulated")
    before, begun = _peak_mib(), time.monotonic()
    with (
        mock.patch.object(storage, "list_tree", list_tree),
        mock.patch.object(storage, "size_of", lambda uri: None),
    ):
        listing = list_source(config)
        listed = _peak_mib()
        source = read_source(listing, config)
    print(
        f"{len(source.index):,} images of {len(source.classes):,} classes in {time.monotonic() - begun:.0f} s: "
        f"peak {_peak_mib():,.0f} MiB, {listed:,.0f} when they were listed, {before:,.0f} before; "
        f"the index itself {source.index.nbytes / 2**20:,.0f} MiB"
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
