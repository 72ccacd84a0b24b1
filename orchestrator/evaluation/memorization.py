"""Memorisation: the nearest training image of a sample, among all of them, in features and in pixels.

The training set streams by in chunks, shared out among the pool; what is held is the queries and one chunk.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from cluster.workers import map_items
from models.images import area_downsample
from models.metrics import BLOCK
from models.neighbours import Neighbours, nearest
from orchestrator.evaluation.extraction import FeatureFiles
from orchestrator.evaluation.inputs import ImageSet
from orchestrator.generation.worker import prepare_device

CHUNK = 16 * BLOCK  # rows of the training set that are compared at once
PIXELS = 32  # on a side: larger images are compared at this size

Rows = Callable[[int, int], np.ndarray]  # [begin, end) -> float32 [n, D]


def feature_rows(files: FeatureFiles, begin: int, end: int) -> np.ndarray:
    """Pooled features of a range of indices."""
    return files.pool(np.arange(begin, end))


def pixel_rows(images: ImageSet, begin: int, end: int) -> np.ndarray:
    """Pixels 0..255 of a range of images, one row each; those of more than 32 pixels are shrunk by means over areas."""
    parts = []
    for start in range(begin, end, BLOCK):  # no more full-size images at once than that
        pixels, _ = images.read(start, min(start + BLOCK, end))
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
        parts.append((area_downsample(x, PIXELS) if min(x.shape[2:]) > PIXELS else x).flatten(1).numpy())
    return np.concatenate(parts)


def nearest_rows(
    queries: Callable[[], np.ndarray], rows: Rows, count: int, k: int, num_workers: int, num_gpus: float = 0.0
) -> Neighbours:
    """The k of `count` rows that are nearest to each query: exact, whatever the number of workers.

    queries: loads them, here or in a worker; float32 [Q, D].
    """
    chunks = [(begin, min(begin + CHUNK, count)) for begin in range(0, count, CHUNK)]
    if len(chunks) == 1 and num_workers:
        num_workers, num_gpus = 0, 0.0  # too little to start workers for, and this process may have no GPU
    make_worker = partial(_make_search, queries, rows, k, num_gpus)
    found = dict(map_items(make_worker, chunks, num_workers, num_gpus=num_gpus))
    index = np.concatenate([found[chunk].index + chunk[0] for chunk in chunks], axis=1)
    squared = np.concatenate([found[chunk].squared for chunk in chunks], axis=1)
    order = np.lexsort((index, squared), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(index, order, axis=1), np.take_along_axis(squared, order, axis=1))


def _make_search(
    queries: Callable[[], np.ndarray], rows: Rows, k: int, num_gpus: float
) -> Callable[[tuple[int, int]], Neighbours]:
    """A worker: the queries loaded once, then chunks."""
    device, wanted = prepare_device(num_gpus), queries()

    def work(chunk: tuple[int, int]) -> Neighbours:
        targets = rows(*chunk)
        with device:
            return nearest(wanted, targets, min(k, len(targets)))

    return work


def nearest_training_features(
    samples: FeatureFiles, rows: np.ndarray, training: FeatureFiles, num_workers: int, num_gpus: float = 0.0
) -> tuple[Neighbours, np.ndarray]:
    """Of the samples `rows`: the nearest training image, and its own squared distance to the nearest other [Q]."""
    read = partial(feature_rows, training)
    found = nearest_rows(partial(samples.pool, rows), read, training.count, 1, num_workers, num_gpus)
    matched, place = np.unique(found.index[:, 0], return_inverse=True)
    around = nearest_rows(partial(training.pool, matched), read, training.count, 2, num_workers, num_gpus)
    # A row finds itself first, unless it has copies: then any of them will do.
    others = np.where(around.index[:, 0] == matched, around.squared[:, 1], around.squared[:, 0])
    return found, others[place]


def nearest_training_pixels(
    images: ImageSet, count: int, training: ImageSet, num_workers: int, num_gpus: float = 0.0
) -> list[float]:
    """Distance of the first `count` images to the nearest training image: root mean square in grey levels 0..255.

    Copies of training images would lie near 0, far below held-out images.
    """
    queries = partial(pixel_rows, images, 0, min(count, images.count))
    found = nearest_rows(queries, partial(pixel_rows, training), training.count, 1, num_workers, num_gpus)
    size = pixel_rows(images, 0, 1).shape[1]
    return [float(distance) for distance in np.sqrt(found.squared[:, 0] / size)]
