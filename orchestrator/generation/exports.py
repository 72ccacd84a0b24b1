"""Samples for other programs: the published .npz, or a folder of pictures; streamed, shard by shard."""

import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib import format as npy

from orchestrator import storage
from orchestrator.generation.samples import count_samples, read_range, read_rows

BLOCK = 512  # images held at once
THREADS = 8  # pictures written at once
NEVER = (1980, 1, 1, 0, 0, 0)  # the zip format's first moment, so that equal samples give equal files


def export_npz(folder: str, uri: str) -> None:
    """Write a finished folder as the published code does: `arr_0` uint8 [N, H, W, 3] and, where samples have
    labels, `arr_1` int64 [N].

    Raises:
        FileNotFoundError: the samples are not all there.
    """
    count, labels = count_samples(folder), list[np.ndarray]()

    def blocks() -> Iterator[np.ndarray]:
        for begin in range(0, count, BLOCK):
            images, some = read_range(folder, begin, min(begin + BLOCK, count))
            labels.append(some)
            yield images

    shape = read_range(folder, 0, 1)[0].shape[1:]
    with storage.open_output(uri) as file, zipfile.ZipFile(file, "w") as archive:
        write_array(archive, "arr_0", (count, *shape), np.dtype(np.uint8), blocks())
        if labels[0][0] >= 0:
            write_array(archive, "arr_1", (count,), np.dtype(np.int64), labels)


def write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> None:
    """Stream an array, whose blocks follow each other along its first axis, into an archive as `name`.npy."""
    member = zipfile.ZipInfo(f"{name}.npy", NEVER)
    member.file_size = int(np.prod(shape, dtype=object)) * dtype.itemsize  # says whether 64-bit sizes are needed
    with archive.open(member, "w") as data:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(data, header)
        for block in blocks:
            data.write(np.ascontiguousarray(block, dtype).data)


def export_png(folder: str, uri: str) -> None:
    """Write each sample of a finished folder as `uri`/000017.png, the very bytes that its shard holds.

    Raises:
        FileNotFoundError: the samples are not all there.
    """
    count = count_samples(folder)

    def write(item: tuple[int, bytes]) -> None:
        storage.write_bytes(storage.join(uri, f"{item[0]:06d}.png"), item[1])

    with ThreadPoolExecutor(THREADS) as threads:
        for _, rows in read_rows(folder, 0, count):
            list(threads.map(write, zip(rows["index"], rows["image"], strict=True)))
