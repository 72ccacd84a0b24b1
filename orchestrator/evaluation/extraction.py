"""Features of a set of images, which a pool of workers extracts and stores in files of 512 consecutive indices."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast

import numpy as np
import safetensors
import safetensors.numpy

from cluster.workers import map_items
from models.features import Features, extract
from models.metrics import BLOCK, GROUP, Moments, block_moments, merge_in_order
from orchestrator import storage
from orchestrator.arithmetic import prepare_device
from orchestrator.data.dataset import ahead
from orchestrator.evaluation.extractors import CPU, LoadExtractor
from orchestrator.evaluation.inputs import ImageSet, split_images
from orchestrator.progress import progress_line

EXTRACTOR_BATCH = 64  # images in a batch of the extractor; the last batch is padded
BLOCKS_PER_ITEM = 8  # blocks in a work item; a worker decodes the next one while it extracts features

ArrayName = Literal["pool", "spatial", "logits"]
Range = tuple[int, int]  # [begin, end) of indices


class Labelled(NamedTuple):
    """Features of n images and their labels int64 [n]."""

    features: Features
    labels: np.ndarray


@dataclass(frozen=True)
class FeatureFiles:
    """The stored features of a set of images. This can be pickled, so that workers read the blocks that they need."""

    folder: str
    count: int
    fingerprint: str  # of the extractor

    def block(self, number: int) -> Labelled:
        """Return the features of the indices [512 number, 512 number + 512).

        Raises:
            ValueError: the file is damaged.
        """
        begin, end = _blocks(self.count)[number]
        uri = storage.join(self.folder, _block_name(begin, end))
        try:
            arrays = safetensors.numpy.load(storage.read_bytes(uri))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{uri} is damaged ({error}); delete it, and run the same command again") from error
        if len(arrays["pool"]) != end - begin:
            raise ValueError(
                f"{uri} has {len(arrays['pool'])} rows, but {end - begin} are expected; delete it, and run the same "
                "command again"
            )
        return Labelled(Features(arrays["pool"], arrays.get("spatial"), arrays.get("logits")), arrays["labels"])

    @property
    def num_blocks(self) -> int:
        return len(_blocks(self.count))

    def array(self, name: ArrayName, rows: np.ndarray | None = None) -> np.ndarray | None:
        """Return an array of features, float32 [N, D], of all images or of the indices `rows`, in their order.

        Return None if the extractor does not have these features.
        """
        indices = np.arange(self.count) if rows is None else rows
        result: np.ndarray | None = None
        for number in np.unique(indices // BLOCK):
            block = getattr(self.block(int(number)).features, name)
            if block is None:
                return None
            positions = np.flatnonzero(indices // BLOCK == number)
            if result is None:
                result = np.empty((len(indices), block.shape[1]), block.dtype)
            result[positions] = block[indices[positions] % BLOCK]
        return result

    def pool(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the array of pooled features, which every extractor has; see `array`."""
        result = self.array("pool", rows)
        assert result is not None
        return result

    def pool_subset(self, limit: int) -> np.ndarray:
        """Return `pool` of the rows that `choose_rows` returns; a small subset is also stored in a separate file."""
        rows = choose_rows(self.count, limit)
        if len(rows) * 4 > self.count:
            return self.pool(rows)
        uri = storage.join(self.folder, f"pool-{limit}-of-{self.count}.safetensors")
        if not storage.exists(uri):
            storage.put_if_absent(uri, safetensors.numpy.save({"pool": self.pool(rows)}))
        return safetensors.numpy.load(storage.read_bytes(uri))["pool"]

    def labels(self) -> np.ndarray:
        """Return labels int64 [N]; -1 = no label."""
        return np.concatenate([self.block(number).labels for number in range(self.num_blocks)])

    def moments(self, name: ArrayName, num_workers: int) -> Moments:
        """Return the moments of all images' features; they are bit-equal for any number of workers."""
        groups = [(first, min(first + GROUP, self.num_blocks)) for first in range(0, self.num_blocks, GROUP)]
        make_worker = partial(_make_moments, self, name)
        by_group = dict(map_items(make_worker, groups, num_workers if len(groups) > 1 else 0))
        return merge_in_order(by_group[group] for group in groups)


def _make_moments(files: FeatureFiles, name: ArrayName) -> Callable[[tuple[int, int]], Moments]:
    """Return the function that computes the moments of the blocks [first, last)."""

    def moments_of_blocks(first: int, last: int) -> Iterator[Moments]:
        for number in range(first, last):
            yield from block_moments(getattr(files.block(number).features, name))

    return lambda group: merge_in_order(moments_of_blocks(*group))


def choose_rows(count: int, limit: int) -> np.ndarray:
    """Return at most `limit` of `count` indices, sorted.

    They are drawn at random with a fixed seed, because equally spaced indices could miss classes.
    """
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng([count, limit]).choice(count, limit, replace=False))


def subset(images: ImageSet, count: int) -> ImageSet:
    """Return at most `count` of the images, those that `choose_rows` returns."""
    if images.count <= count:
        return images
    rows = choose_rows(images.count, count)
    return replace(images, count=count, identity=f"{images.identity}-{count}", read=partial(_read_subset, images, rows))


def _read_subset(images: ImageSet, rows: np.ndarray, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    return images.pick(rows[begin:end])


def extract_all(
    images: ImageSet, folder: str, extractor: LoadExtractor, num_workers: int, num_gpus: float = 0.0
) -> FeatureFiles:
    """Extract the features of all images into `folder`, in blocks of 512; finished blocks are reused."""
    fingerprint = extractor(CPU).fingerprint
    files = FeatureFiles(storage.join(folder, fingerprint), images.count, fingerprint)
    missing = _missing_blocks(files.folder, _blocks(images.count))
    size = min(BLOCKS_PER_ITEM, -(-len(missing) // max(num_workers, 1)))
    with progress_line(files.num_blocks, "blocks", f"features of {images.uri}") as progress:
        done = files.num_blocks - len(missing)
        progress.update_to(done)
        if not missing:  # then neither a worker nor a GPU is needed
            return files
        make_worker = partial(_make_extraction, images, files.folder, extractor, num_gpus)
        items = [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
        for item, _ in map_items(make_worker, items, num_workers, num_gpus=num_gpus):
            done += len(item)
            progress.update_to(done)
    return files


def _make_extraction(
    images: ImageSet, folder: str, extractor: LoadExtractor, num_gpus: float
) -> Callable[[tuple[Range, ...]], None]:
    """Load the extractor, and return the function that extracts blocks and decodes the next one in the background."""
    network = extractor(prepare_device(num_gpus)).network

    def work(item: tuple[Range, ...]) -> None:
        blocks = _missing_blocks(folder, item)  # without those that a worker wrote before it died
        for block, (pixels, labels) in zip(blocks, ahead(images.read(*block) for block in blocks), strict=True):
            features = extract(network, pixels, EXTRACTOR_BATCH)
            arrays = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
            present = {name: array for name, array in arrays.items() if array is not None}
            data = safetensors.numpy.save(present | {"labels": labels.astype(np.int64)})
            storage.put_if_absent(storage.join(folder, _block_name(*block)), data)

    return work


def _blocks(count: int) -> list[Range]:
    return [(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK)]


def _missing_blocks(folder: str, blocks: Iterable[Range]) -> list[Range]:
    existing = set(storage.list_names(folder))
    return [block for block in blocks if _block_name(*block) not in existing]


def _block_name(begin: int, end: int) -> str:
    return f"{begin:08d}-{end:08d}.safetensors"


def concatenate(blocks: Iterator[Labelled] | list[Labelled]) -> Labelled:
    """Concatenate features and labels of blocks, which must be in index order."""
    parts = list(blocks)

    def join(name: ArrayName) -> np.ndarray | None:
        arrays = [getattr(part.features, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    features = Features(cast(np.ndarray, join("pool")), join("spatial"), join("logits"))
    return Labelled(features, np.concatenate([part.labels for part in parts]))


def split_features(
    dataset: str, split: str, extractor: LoadExtractor, image_size: int, num_workers: int, num_gpus: float = 0.0
) -> FeatureFiles:
    """Return the features of a split of a dataset, which are extracted once and stored in the dataset's folder."""
    folder = storage.join(dataset, "features", f"{split}-{image_size}")
    return extract_all(split_images(dataset, split, image_size), folder, extractor, num_workers, num_gpus)
