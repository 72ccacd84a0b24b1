"""What samples are held against: a dataset's training split, or a published reference batch."""

from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy

from models.metrics import Gaussian, Moments
from orchestrator import storage
from orchestrator.data.dataset import load_manifest
from orchestrator.evaluation.extraction import ArrayName, FeatureFiles, extract_all, split_features
from orchestrator.evaluation.extractors import LoadedExtractor, LoadExtractor
from orchestrator.evaluation.inputs import ImageSet, batch_images, split_images
from orchestrator.evaluation.npz import open_batch


@dataclass(frozen=True)
class Reference:
    """The statistics of a reference by one extractor, and as far as there are images their features."""

    uri: str
    fingerprint: str  # of the extractor
    statistics: dict[ArrayName, Moments | Gaussian]  # of pooled and of spatial features, where it has them
    count: int | None  # images behind the statistics; None where a file does not say
    images: ImageSet | None = None
    files: FeatureFiles | None = None  # the features of these images
    classes: tuple[str, ...] = ()
    labels: np.ndarray | None = None  # int64 of all images, where they are at hand
    missing: dict[str, str] = field(default_factory=dict)  # what it cannot give, and why


def open_reference(
    uri: str,
    loader: LoadExtractor,
    loaded: LoadedExtractor,
    folder: str,
    image_size: int,
    num_workers: int,
    num_gpus: float = 0.0,
) -> Reference:
    """The reference at `uri`, a dataset's folder or an .npz; what of it is not extracted yet is extracted.

    folder: where features of an .npz are kept; those of a dataset lie beside it.

    Raises:
        ValueError: a damaged file, or statistics of another extractor.
    """
    if uri.endswith(".npz"):
        return _batch_reference(uri, loader, loaded, folder, num_workers, num_gpus)
    files = split_features(uri, "train", loader, image_size, num_workers, num_gpus)
    statistics, labels = _kept_statistics(files, num_workers)
    images, classes = split_images(uri, "train", image_size), load_manifest(uri).classes
    return Reference(uri, files.fingerprint, statistics, files.count, images, files, classes, labels)


def _kept_statistics(files: FeatureFiles, num_workers: int) -> tuple[dict[ArrayName, Moments | Gaussian], np.ndarray]:
    """Mean and covariance of all images, and their labels: formed once, then read from a file beside the features."""
    uri = storage.join(files.folder, "statistics.safetensors")
    if not storage.exists(uri):
        names: list[ArrayName] = ["pool"]
        if files.block(0).features.spatial is not None:
            names.append("spatial")
        formed = {name: files.moments(name, num_workers) for name in names}
        arrays = {f"{name}.{part}": getattr(m, part) for name, m in formed.items() for part in ("mean", "m2")}
        storage.put_if_absent(uri, safetensors.numpy.save(arrays | {"labels": files.labels()}))
    arrays = safetensors.numpy.load(storage.read_bytes(uri))
    if (n := len(arrays["labels"])) != files.count:
        raise ValueError(f"{uri} is of {n} images, but there are {files.count}: delete it, and it is formed again")
    kept: list[ArrayName] = ["pool", "spatial"]
    present = [name for name in kept if f"{name}.mean" in arrays]
    return {name: Moments(n, arrays[f"{name}.mean"], arrays[f"{name}.m2"]) for name in present}, arrays["labels"]


def _batch_reference(
    uri: str, loader: LoadExtractor, loaded: LoadedExtractor, folder: str, num_workers: int, num_gpus: float
) -> Reference:
    """A published batch: mu and sigma are the Inception network's; its images serve what needs single features.

    Where there is no mu, or the extractor is another one, the statistics are those of the images (arr_0).
    """
    batch = open_batch(uri)
    published: dict[ArrayName, Gaussian] = {}
    missing: dict[str, str] = {}
    if loaded.network.name == "inception":
        if batch.pool is not None:
            published["pool"] = batch.pool
        if batch.spatial is not None:
            published["spatial"] = batch.spatial
        elif batch.pool is not None:
            missing["spatial"] = f"{uri} holds mu and sigma, but not mu_s and sigma_s"
    elif not batch.num_images:
        raise ValueError(
            f"{uri} holds statistics of the Inception network and no images: they cannot be compared with features of "
            f"{loaded.fingerprint}; use extractor=inception, or a reference with images"
        )
    _check_dimensions(uri, loaded, published)
    if not batch.num_images:
        missing["rows"] = f"{uri} holds no images (arr_0), only their statistics"
        return Reference(uri, loaded.fingerprint, dict(published), None, missing=missing)
    images = batch_images(batch)
    files = extract_all(images, storage.join(folder, images.identity), loader, num_workers, num_gpus)
    if published:
        return Reference(uri, files.fingerprint, dict(published), None, images, files, missing=missing)
    statistics, labels = _kept_statistics(files, num_workers)
    return Reference(uri, files.fingerprint, statistics, files.count, images, files, labels=labels, missing=missing)


def _check_dimensions(uri: str, loaded: LoadedExtractor, published: dict[ArrayName, Gaussian]) -> None:
    if "pool" in published and (found := len(published["pool"].mean)) != loaded.network.dimension:
        raise ValueError(
            f"{uri}: mu has {found} dimensions, and features of {loaded.fingerprint} have {loaded.network.dimension}: "
            "statistics of different extractors do not compare"
        )
