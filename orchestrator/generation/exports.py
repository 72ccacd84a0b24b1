"""Exports of samples for other programs: the published .npz, or a folder of PNGs; streamed shard by shard."""

import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib import format as npy

from orchestrator import storage
from orchestrator.generation.samples import count_samples, read_range, read_rows

BLOCK = 512  # images that are decoded at a time
THREADS = 8  # PNG files that are written at the same time
EPOCH = (1980, 1, 1, 0, 0, 0)  # first date of the zip format; a fixed date, so that equal samples give equal files


def export_npz(folder: str, uri: str) -> None:
    """Write samples in the published format: `arr_0` uint8 [N, H, W, 3], and `arr_1` int64 [N] if they have labels.

    Raises:
        FileNotFoundError: the folder is not finished.
    """
    count = count_samples(folder)
    labels: list[np.ndarray] = []

    def image_blocks() -> Iterator[np.ndarray]:
        """Yield the images block by block, and keep their labels for the second array."""
        for begin in range(0, count, BLOCK):
            images, block_labels = read_range(folder, begin, min(begin + BLOCK, count))
            labels.append(block_labels)
            yield images

    shape = read_range(folder, 0, 1)[0].shape[1:]
    with storage.open_output(uri) as file, zipfile.ZipFile(file, "w") as archive:
        _write_array(archive, "arr_0", (count, *shape), np.dtype(np.uint8), image_blocks())
        if labels[0][0] >= 0:  # -1 = no labels
            _write_array(archive, "arr_1", (count,), np.dtype(np.int64), labels)


def _write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]
) -> None:
    """Stream an array into an archive as `name`.npy; its blocks are consecutive along the first axis."""
    member = zipfile.ZipInfo(f"{name}.npy", EPOCH)
    member.file_size = int(np.prod(shape, dtype=object)) * dtype.itemsize  # zipfile uses zip64 if this is large
    with archive.open(member, "w") as data:
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(data, header)
        for block in blocks:
            data.write(np.ascontiguousarray(block, dtype).data)


def export_png(folder: str, uri: str) -> None:
    """Write each sample as `uri`/000017.png, with the same bytes as in its shard.

    Raises:
        FileNotFoundError: the folder is not finished.
    """
    count = count_samples(folder)

    def write(index: int, image: bytes) -> None:
        storage.write_bytes(storage.join(uri, f"{index:06d}.png"), image)

    with ThreadPoolExecutor(THREADS) as threads:
        for _, rows in read_rows(folder, 0, count):
            list(threads.map(write, rows["index"], rows["image"]))  # list, so that errors are raised here
