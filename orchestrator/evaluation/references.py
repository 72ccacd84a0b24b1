"""What samples are compared with: a dataset's training split, or a published reference batch."""

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
    training: bool = True  # whether its images may have been trained on; those of a published batch are only compared


@dataclass(frozen=True)
class ReferenceInput:
    """A reference of which nothing is extracted yet."""

    uri: str
    image_size: int  # of a dataset's images; 0 for an .npz
    images: ImageSet | None  # None: a file that holds statistics alone
    batch: PublishedBatch | None = None  # None: a dataset

    def statistics(self, loaded: LoadedExtractor) -> dict[ArrayName, Gaussian]:
        """Return the statistics that a file holds, if they come from this extractor.

        A file that states no extractor is a published one, whose statistics are the Inception network's.

        Raises:
            ValueError: they come from another extractor, and there are no images to be taken instead.
        """
        if self.batch is None or self.batch.pool is None:
            return {}
        stated, fingerprint = self.batch.extractor, loaded.fingerprint
        if stated != fingerprint if stated else loaded.network.name != "inception":
            if self.images is not None:
                return {}
            owner = stated or "the Inception network (the file states no other extractor)"
            raise ValueError(
                f"{self.uri} holds statistics of {owner} and no images: they cannot be compared with features of "
                f"{fingerprint}. Choose its --extractor, or a reference with images"
            )
        if (found := len(self.batch.pool.mean)) != loaded.network.dimension:
            raise ValueError(
                f"{self.uri}: mu has {found} dimensions, and features of {fingerprint} have "
                f"{loaded.network.dimension}: statistics of different extractors do not compare"
            )
        published: dict[ArrayName, Gaussian] = {"pool": self.batch.pool}
        if self.batch.spatial is not None:
            published["spatial"] = self.batch.spatial
        return published


def load_reference_manifest(uri: str) -> Manifest:
    """Return the manifest of a dataset that serves as a reference.

    Raises:
        FileNotFoundError: there is no finished dataset.
        ValueError: it is something else; the message says what to pass instead.
    """
    check_ending(uri, "reference")
    try:
        return load_manifest(uri)
    except (FileNotFoundError, ValueError):
        if storage.exists(storage.join(uri, "run.json")):
            raise ValueError(
                f"{uri} holds samples, not a dataset: pass a dataset, or these samples as an .npz (--export npz)"
            ) from None
        raise


def find_reference(uri: str, image_size: int) -> ReferenceInput:
    """Return what lies at `uri`, a dataset's folder or an .npz, before any feature is made.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is neither, or damaged, or a dataset of images of another size.
    """
    if uri.endswith(".npz"):
        if not storage.exists(uri):
            raise FileNotFoundError(f"{uri} does not exist")
        batch = open_batch(uri)
        return ReferenceInput(uri, 0, batch_images(batch) if batch.num_images else None, batch)
    load_reference_manifest(uri)
    return ReferenceInput(uri, image_size, split_images(uri, "train", image_size))


def open_reference(
    uri: str,
    loader: LoadExtractor,
    loaded: LoadedExtractor,
    folder: str,
    image_size: int,
    num_workers: int,
    num_gpus: float = 0.0,
) -> Reference:
    """Find the reference at `uri` and extract what of it is not extracted yet."""
    return extract_reference(find_reference(uri, image_size), loader, loaded, folder, num_workers, num_gpus)


def extract_reference(
    found: ReferenceInput,
    loader: LoadExtractor,
    loaded: LoadedExtractor,
    folder: str,
    num_workers: int,
    num_gpus: float = 0.0,
) -> Reference:
    """Extract what of a reference is not extracted yet, and return its statistics and features.

    folder: where features of an .npz are kept; those of a dataset lie beside it.

    Raises:
        ValueError: a damaged file, or statistics of another extractor.
    """
    uri = found.uri
    if found.batch is not None:
        return _batch_reference(found, loader, loaded, folder, num_workers, num_gpus)
    files = split_features(uri, "train", loader, found.image_size, num_workers, num_gpus)
    statistics, labels = _kept_statistics(files, num_workers)
    classes = load_manifest(uri).classes
    return Reference(uri, files.fingerprint, statistics, files.count, found.images, files, classes, labels)


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
    found: ReferenceInput,
    loader: LoadExtractor,
    loaded: LoadedExtractor,
    folder: str,
    num_workers: int,
    num_gpus: float,
) -> Reference:
    """Take mu and sigma of a file where they come from this extractor; its images serve what needs single features.

    Otherwise the statistics are those of the images (arr_0).
    """
    uri, images, missing = found.uri, found.images, dict[str, str]()
    published = found.statistics(loaded)
    if published and "spatial" not in published:
        missing["spatial"] = f"{uri} holds mu and sigma, but not mu_s and sigma_s"
    if images is None:
        missing["rows"] = f"{uri} holds no images (arr_0), only their statistics"
        return Reference(uri, loaded.fingerprint, dict(published), None, missing=missing, training=False)
    files = extract_all(images, storage.join(folder, images.identity), loader, num_workers, num_gpus)
    if published:
        return Reference(uri, files.fingerprint, dict(published), None, images, files, missing=missing, training=False)
    statistics, labels = _kept_statistics(files, num_workers)
    return Reference(
        uri, files.fingerprint, statistics, files.count, images, files, labels=labels, missing=missing, training=False
    )
