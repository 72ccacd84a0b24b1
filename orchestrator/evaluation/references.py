"""References for samples: the training split of a dataset, or a published reference batch."""

from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy

from models.metrics import Gaussian, Moments
from orchestrator import storage
from orchestrator.data.dataset import Manifest, load_manifest
from orchestrator.evaluation.extraction import ArrayName, FeatureFiles, extract_all, split_features
from orchestrator.evaluation.extractors import LoadedExtractor, LoadExtractor
from orchestrator.evaluation.inputs import ImageSet, batch_images, check_ending, split_images
from orchestrator.evaluation.npz import PublishedBatch, open_batch


@dataclass(frozen=True)
class Reference:
    """The statistics of a reference by one extractor, and the features of its images if it has any."""

    uri: str
    fingerprint: str  # of the extractor
    statistics: dict[ArrayName, Moments | Gaussian]  # of pooled features, and of spatial features if it has them
    count: int | None  # number of images behind the statistics; None = unknown
    images: ImageSet | None = None
    files: FeatureFiles | None = None  # the features of these images
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None  # int64 of all images, if they are already loaded
    missing: dict[str, str] = field(default_factory=dict)  # see `Comparison.missing`
    training: bool = True  # whether these are the training images, which they are for a dataset and not for an .npz


@dataclass(frozen=True)
class ReferenceInput:
    """A reference before its features are extracted."""

    uri: str
    image_size: int  # of a dataset's images; 0 for an .npz
    images: ImageSet | None  # None = an .npz with statistics only
    batch: PublishedBatch | None = None  # None = a dataset

    def statistics(self, loaded: LoadedExtractor) -> dict[ArrayName, Gaussian]:
        """Return the statistics in an .npz if they come from this extractor, and otherwise an empty dictionary.

        An .npz that states no extractor is assumed to have statistics of the Inception network.

        Raises:
            ValueError: the statistics come from another extractor, and the file has no images; or their dimension is
                not the extractor's.
        """
        if self.batch is None or self.batch.pool is None:
            return {}
        stated, fingerprint = self.batch.extractor, loaded.fingerprint
        matches = stated == fingerprint if stated else loaded.network.name == "inception"
        if not matches and self.images is not None:
            return {}
        if not matches:
            source = stated or "the Inception network (the file states no other extractor)"
            raise ValueError(
                f"{self.uri} has statistics of {source} and no images, so they cannot be compared with features of "
                f"{fingerprint}. Use that --extractor, or a reference with images"
            )
        dimension = len(self.batch.pool.mean)
        if dimension != loaded.network.dimension:
            raise ValueError(
                f"{self.uri}: mu has {dimension} dimensions, and features of {fingerprint} have "
                f"{loaded.network.dimension}; both must come from the same extractor"
            )
        published: dict[ArrayName, Gaussian] = {"pool": self.batch.pool}
        if self.batch.spatial is not None:
            published["spatial"] = self.batch.spatial
        return published


def load_reference_manifest(uri: str) -> Manifest:
    """Return the manifest of a dataset that is used as a reference.

    Raises:
        FileNotFoundError: there is no complete dataset.
        ValueError: it is not a dataset; the message says what to pass instead.
    """
    check_ending(uri, "reference")
    try:
        return load_manifest(uri)
    except (FileNotFoundError, ValueError):
        if storage.exists(storage.join(uri, "run.json")):
            raise ValueError(
                f"{uri} has samples, not a dataset; pass a dataset, or these samples as an .npz (--export npz)"
            ) from None
        raise


def find_reference(uri: str, image_size: int) -> ReferenceInput:
    """Return the reference at `uri`, a dataset's folder or an .npz, without extracting features.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is neither of the two, it is damaged, or its images have another size.
    """
    if uri.endswith(".npz"):
        if not storage.exists(uri):
            raise FileNotFoundError(f"{uri} does not exist")
        batch = open_batch(uri)
        return ReferenceInput(uri, 0, batch_images(batch) if batch.num_images else None, batch)
    load_reference_manifest(uri)
    return ReferenceInput(uri, image_size, split_images(uri, "train", image_size))


def extract_reference(
    reference_input: ReferenceInput,
    loader: LoadExtractor,
    loaded: LoadedExtractor,
    folder: str,
    num_workers: int,
    num_gpus: float = 0.0,
) -> Reference:
    """Extract the missing features of a reference, and return its statistics and features.

    mu and sigma of an .npz are used if they come from this extractor; then its images are only used for metrics of
    pairs. Otherwise the statistics are those of the images.

    Args:
        loaded: the extractor that `loader` loads.
        folder: where features of an .npz are stored; those of a dataset are stored in the dataset's folder.

    Raises:
        ValueError: a file is damaged, or it has statistics of another extractor and no images.
    """
    uri, images = reference_input.uri, reference_input.images
    missing: dict[str, str] = {}
    published = reference_input.statistics(loaded)
    if published and "spatial" not in published:
        missing["spatial"] = f"{uri} has mu and sigma, but not mu_s and sigma_s"
    if images is None:
        missing["rows"] = f"{uri} has statistics but no images (arr_0)"
        return Reference(uri, loaded.fingerprint, dict(published), None, missing=missing, training=False)
    is_dataset = reference_input.batch is None
    classes: tuple[str, ...] = ()
    if is_dataset:
        files = split_features(uri, "train", loader, reference_input.image_size, num_workers, num_gpus)
        classes = load_manifest(uri).classes
    else:
        files = extract_all(images, storage.join(folder, images.identity), loader, num_workers, num_gpus)
    if published:
        return Reference(uri, files.fingerprint, dict(published), None, images, files, missing=missing, training=False)
    statistics, labels = _stored_statistics(files, num_workers)
    return Reference(
        uri, files.fingerprint, statistics, files.count, images, files, classes, labels, missing, training=is_dataset
    )


def _stored_statistics(files: FeatureFiles, num_workers: int) -> tuple[dict[ArrayName, Moments | Gaussian], np.ndarray]:
    """Return the moments and labels of all images; compute them only once, and store them beside the features."""
    uri = storage.join(files.folder, "statistics.safetensors")
    names: tuple[ArrayName, ...] = ("pool", "spatial")
    if not storage.exists(uri):
        arrays = {"labels": files.labels()}
        has_spatial = files.block(0).features.spatial is not None
        for name in names if has_spatial else names[:1]:
            moments = files.moments(name, num_workers)
            arrays |= {f"{name}.mean": moments.mean, f"{name}.m2": moments.m2}
        storage.put_if_absent(uri, safetensors.numpy.save(arrays))
    arrays = safetensors.numpy.load(storage.read_bytes(uri))
    n = len(arrays["labels"])
    if n != files.count:
        raise ValueError(f"{uri} is for {n} images, but there are {files.count}; delete it, and run the command again")
    present = [name for name in names if f"{name}.mean" in arrays]
    return {name: Moments(n, arrays[f"{name}.mean"], arrays[f"{name}.m2"]) for name in present}, arrays["labels"]
