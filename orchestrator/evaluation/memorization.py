"""Memorisation: the training images that are nearest to samples, in feature space and in pixels.

The workers of a pool search the training set in chunks. Each worker has the queries and one chunk in memory.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from cluster.workers import map_items
from models.images import area_downsample
from models.metrics import BLOCK
from models.neighbours import Neighbours, nearest
from orchestrator.arithmetic import prepare_device
from orchestrator.evaluation.extraction import FeatureFiles
from orchestrator.evaluation.inputs import ImageSet

CHUNK = 16 * BLOCK  # rows of the training set that are compared at once
PIXELS = 32  # height and width at which larger images are compared

Rows = Callable[[int, int], np.ndarray]  # [begin, end) -> float32 [n, D]


def feature_rows(files: FeatureFiles, begin: int, end: int) -> np.ndarray:
    """Return pooled features of a range of indices."""
    return files.pool(np.arange(begin, end))


def pixel_rows(images: ImageSet, begin: int, end: int) -> np.ndarray:
    """Return pixels 0..255 of a range of images, one row each; large images are downsampled to 32 pixels."""
    parts = []
    for start in range(begin, end, BLOCK):  # limits the number of full-size images in memory
        pixels, _ = images.read(start, min(start + BLOCK, end))
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
        parts.append((area_downsample(x, PIXELS) if min(x.shape[2:]) > PIXELS else x).flatten(1).numpy())
    return np.concatenate(parts)


def nearest_rows(
    queries: Callable[[], np.ndarray], rows: Rows, count: int, k: int, num_workers: int, num_gpus: float = 0.0
) -> Neighbours:
    """Return the k of `count` rows that are nearest to each query, exactly, for any number of workers.

    Args:
        queries: function that loads the queries float32 [Q, D], in this process or in a worker.
        count: number of rows that are searched.
    """
    chunks = [(begin, min(begin + CHUNK, count)) for begin in range(0, count, CHUNK)]
    if len(chunks) == 1 and num_workers:
        num_workers, num_gpus = 0, 0.0  # too little work to start workers; this process may have no GPU
    make_worker = partial(_make_search, queries, rows, k, num_gpus)
    by_chunk = dict(map_items(make_worker, chunks, num_workers, num_gpus=num_gpus))
    index = np.concatenate([by_chunk[chunk].index + chunk[0] for chunk in chunks], axis=1)
    squared = np.concatenate([by_chunk[chunk].squared for chunk in chunks], axis=1)
    order = np.lexsort((index, squared), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(index, order, axis=1), np.take_along_axis(squared, order, axis=1))


def _make_search(
    queries: Callable[[], np.ndarray], rows: Rows, k: int, num_gpus: float
) -> Callable[[tuple[int, int]], Neighbours]:
    """Load the queries, and return the function that searches a chunk."""
    device, loaded_queries = prepare_device(num_gpus), queries()

    def work(chunk: tuple[int, int]) -> Neighbours:
        targets = rows(*chunk)
        with device:
            return nearest(loaded_queries, targets, min(k, len(targets)))

    return work


def nearest_training_features(
    samples: FeatureFiles, rows: np.ndarray, training: FeatureFiles, num_workers: int, num_gpus: float = 0.0
) -> tuple[Neighbours, np.ndarray]:
    """Return the nearest training image of each of the samples `rows` [Q], and squared distances [Q].

    These are the squared distances of the training images to their own nearest other training images.
    """
    read = partial(feature_rows, training)
    neighbours = nearest_rows(partial(samples.pool, rows), read, training.count, 1, num_workers, num_gpus)
    matches, inverse = np.unique(neighbours.index[:, 0], return_inverse=True)
    second = nearest_rows(partial(training.pool, matches), read, training.count, 2, num_workers, num_gpus)
    # An image is its own nearest one, or an exact copy is, at distance 0 as well.
    own_squared = np.where(second.index[:, 0] == matches, second.squared[:, 1], second.squared[:, 0])
    return neighbours, own_squared[inverse]


def nearest_training_pixels(
    images: ImageSet, count: int, training: ImageSet, num_workers: int, num_gpus: float = 0.0
) -> list[float]:
    """Return the distance of the first `count` images to the nearest training image, as RMS in grey levels 0..255.

    Copies of training images have distances near 0, far below those of held-out images.
    """
    queries = partial(pixel_rows, images, 0, min(count, images.count))
    neighbours = nearest_rows(queries, partial(pixel_rows, training), training.count, 1, num_workers, num_gpus)
    size = pixel_rows(images, 0, 1).shape[1]
    return [float(distance) for distance in np.sqrt(neighbours.squared[:, 0] / size)]
