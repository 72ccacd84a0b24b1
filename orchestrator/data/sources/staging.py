"""Parquet to be shuffled: its images are first laid end to end, since no row of it can be read alone.

A row group is read whole, so that reading rows at random would fetch each row group about once for every shard.
Instead every file is read once, in order, and the bytes of its images are put into one staged object; from there they
are read by ranges, like the members of a tar. It costs one more copy, which goes when the dataset is finished.
"""

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.workers import map_items
from orchestrator import storage
from orchestrator.data.dataset import Manifest
from orchestrator.data.sources.index import INDEX, Finding, Listing, Source, index_table, make_source, split_of_each
from orchestrator.data.sources.registration import IMAGE_COLUMN
from orchestrator.progress import progress_line

_BATCH_ROWS = 256  # read at a time


def staged_source(listing: Listing, manifest: Manifest, folder: str, num_workers: int) -> Source:
    """Lay the images of Parquet files, which `manifest` could register, into `folder`, unless they lie there already.

    A key is <file>/<row>. Images of splits without labels are left out and reported, unless there are no labels at all.
    """
    splits = [split for split in manifest.splits if split not in manifest.unlabelled]
    names = [shard.path for split in splits for shard in manifest.splits[split]]
    stage = partial(_stage, listing.uri, folder, split_of_each(names))
    with progress_line(sum(map(manifest.num_samples, splits)), "images", "staging") as progress:
        for _, rows in map_items(lambda: stage, names, num_workers):
            progress.update_to(progress.done + rows)
    parts = []
    for name in names:
        with storage.open_input(storage.join(folder, f"{name}.index")) as file:
            parts.append(pq.read_table(file))
    findings = {
        f"{split}_images_without_labels": Finding(count=manifest.num_samples(split), examples=())
        for split in manifest.unlabelled
    }
    return make_source("staged", folder, manifest.classes, pa.concat_tables(parts), findings)


def _stage(uri: str, folder: str, splits: dict[str, str], name: str) -> int:
    """One file's images end to end, then the index of their places, which says that it is done; return their number."""
    index_uri = storage.join(folder, f"{name}.index")
    if storage.exists(index_uri):
        with storage.open_input(index_uri) as file:
            return pq.read_metadata(file).num_rows
    labels: list[int] = []
    sizes: list[int] = []
    with (
        storage.open_input(storage.join(uri, name)) as file,
        storage.open_output(storage.join(folder, f"{name}.images")) as staged,
    ):
        for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=["label", IMAGE_COLUMN]):
            rows = pa.Table.from_batches([batch]).flatten()
            labels += rows["label"].to_pylist()
            for data in rows[IMAGE_COLUMN].to_pylist():
                sizes.append(staged.write(data or b""))  # no bytes: quarantined like any image that is none
    keys = [f"{name.removesuffix('.parquet')}/{row:08d}" for row in range(len(sizes))]
    objects, split = ([word] * len(sizes) for word in (f"{name}.images", splits[name]))
    starts = np.cumsum([0, *sizes])[:-1]
    index = index_table(pa.array(keys), np.array(labels), pa.array(objects), starts, np.array(sizes), pa.array(split))
    with storage.open_output(index_uri) as file, pq.ParquetWriter(file, INDEX) as writer:
        writer.write_table(index)
    return len(sizes)
