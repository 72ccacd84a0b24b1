"""Stage images that cannot be read by ranges of bytes: copy them into objects in which they can.

A row group of Parquet can only be read as a whole. Reading rows in random order would fetch each row group about once
for each shard. Instead, every object is read once, in order, and its images are concatenated in a staged object, from
which they are read by ranges like the members of a tar. The copy is deleted when the dataset is finished.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa

from cluster.workers import map_items
from orchestrator import storage
from orchestrator.data.sources.index import INDEX, Source
from orchestrator.progress import progress_line


def staged(source: Source, folder: str, num_workers: int) -> Source:
    """Copy the images of a source into `folder`, unless they exist there; return a source that reads the copies."""
    index, images = source.index, source.reading.images
    assert images is not None
    stage = partial(_stage, source.uri, folder, images)
    names = index["object"].unique().to_pylist()
    objects = index["object"].to_numpy()
    numbers = index["start"].to_numpy()  # number of each image in its object, see `Reading.images`
    starts, sizes = np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
    with progress_line(len(index), "images", "staging") as progress:
        for name, image_sizes in map_items(lambda: stage, names, num_workers):
            in_object = objects == name
            image_starts = np.cumsum(image_sizes) - image_sizes
            starts[in_object] = image_starts[numbers[in_object]]
            sizes[in_object] = image_sizes[numbers[in_object]]
            # An object may have images that are not in the index, so the sum may be larger.
            progress.update_to(min(len(index), progress.done + len(image_sizes)))
    columns = {"object": [f"{name}.images" for name in objects], "start": starts, "size": sizes}
    for name, column in columns.items():
        field = INDEX.field(name)
        index = index.set_column(INDEX.get_field_index(name), field, pa.array(column, field.type))
    return replace(source, uri=folder, reading=replace(source.reading, images=None), index=index)


def _stage(uri: str, folder: str, images: Callable[[str], Iterator[bytes]], name: str) -> np.ndarray:
    """Concatenate the images of one object, then write their sizes, which mark the copy as complete.

    Return the sizes in bytes, int64 [n].
    """
    sizes_uri = storage.join(folder, f"{name}.sizes")
    if not storage.exists(sizes_uri):
        with storage.open_output(storage.join(folder, f"{name}.images")) as file:
            sizes = [file.write(data) for data in images(storage.join(uri, name))]
        storage.put_if_absent(sizes_uri, np.array(sizes, np.int64).tobytes())
    return np.frombuffer(storage.read_bytes(sizes_uri), np.int64)
