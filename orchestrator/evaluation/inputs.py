"""Sets of images that can be evaluated: a samples folder, a published .npz, or a folder or tar of images."""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from orchestrator import storage
from orchestrator.data.dataset import Manifest, load_manifest, read_images
from orchestrator.data.images import IMAGE_ENDINGS
from orchestrator.evaluation.files import ImageFiles, Listing, folder_files, list_images, tar_files
from orchestrator.evaluation.npz import ImageRows, PublishedBatch, open_batch
from orchestrator.generation.samples import count_samples, read_range

PICKED_AT_ONCE = 512  # images read at once to pick some of them
_RECORDS = {"run.json", "config.json"}  # files of a samples folder that state how the samples were generated
_PICKLE = "is a pickle, which is never opened because it can run code; if you trust it, load it and save "
_PREPARE = "prepare a dataset from it with jobs/prepare_dataset.py --source, and pass that"
_ARRAY = "is a single array; save it as arr_0 of an .npz with numpy.savez('images.npz', numpy.load('images.npy'))"
# Endings of files that cannot be evaluated, with the advice for samples and for a reference.
_UNUSABLE = (
    (
        (".pkl", ".pickle"),
        f"{_PICKLE}its images as numpy.savez('samples.npz', images)",
        f"{_PICKLE}its statistics as numpy.savez('reference.npz', mu=mu, sigma=sigma)",
    ),
    ((".npy",), _ARRAY, _ARRAY),
    (
        (".pt", ".pth", ".ckpt", ".safetensors"),
        "has the weights of a network; generate samples with jobs/generate_samples.py --weights, and pass these",
        "has the weights of a network; pass a dataset or an .npz",
    ),
    (
        (".parquet",),
        "is a single Parquet file; pass the folder of the samples",
        f"is a single Parquet file; {_PREPARE}",
    ),
    (
        (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z"),
        "is compressed, so that its images cannot be read by index; pass a plain .tar, or unpack it",
        f"is an archive; {_PREPARE}",
    ),
    ((".tar",), "", f"is an archive; {_PREPARE}"),
    (IMAGE_ENDINGS, "is a single image; pass its folder", "is a single image; pass a dataset or an .npz"),
)

ReadImages = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. It can be pickled, and reads images only on demand."""

    uri: str
    kind: str  # "samples", "npz", "folder", "tar" or "dataset"
    count: int
    identity: str  # differs between sets of different images
    read: ReadImages  # (begin, end) -> images uint8 [n, H, W, 3], labels int64 [n] (-1 = no label) of [begin, end)
    seed: int | None = None  # of samples that Admiral generated
    classes: tuple[str, ...] = ()  # names in the order of the labels, if they are known
    num_classes: int = 0  # upper bound of labels without names
    warnings: tuple[str, ...] = ()  # for the user, before the evaluation
    made_by: dict[str, Any] = field(default_factory=dict)  # config and record of samples that Admiral generated

    def pick(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images and labels of these indices, in this order; each range of 512 is read once."""
        pixels: dict[int, np.ndarray] = {}
        labels = np.empty(len(indices), np.int64)
        for block in np.unique(indices // PICKED_AT_ONCE):
            positions = np.flatnonzero(indices // PICKED_AT_ONCE == block)
            begin = int(indices[positions].min())
            block_pixels, block_labels = self.read(begin, int(indices[positions].max()) + 1)
            pixels |= {int(i): block_pixels[indices[i] - begin] for i in positions}
            labels[positions] = block_labels[indices[positions] - begin]
        return np.stack([pixels[i] for i in range(len(indices))]), labels


def check_ending(uri: str, role: Literal["samples", "reference"]) -> None:
    """Raise ValueError if files with this ending cannot be used for `role`; the message says what to pass instead."""
    for endings, for_samples, for_reference in _UNUSABLE:
        reason = for_samples if role == "samples" else for_reference
        if reason and uri.lower().endswith(endings):
            raise ValueError(f"{uri} {reason}")


def open_images(uri: str, reference: Manifest | None = None, image_size: int | None = None) -> ImageSet:
    """Return the images at `uri`.

    Args:
        reference: the dataset with which the images of a folder or tar are compared. They are decoded like its images,
            and get labels if their folders are named after its classes.
        image_size: images of a folder or tar are cropped to it like ADM's training images; None = they must all have
            the same size.

    Raises:
        FileNotFoundError: it does not exist, or its samples are not complete.
        ValueError: it has none of the accepted forms, it is damaged, or its images have different sizes.
    """
    check_ending(uri, "samples")
    if uri.endswith((".npz", ".tar")) and not storage.exists(uri):
        raise FileNotFoundError(f"{uri} does not exist")
    if uri.endswith(".npz"):
        return batch_images(open_batch(uri))
    if uri.endswith(".tar"):
        listing = list_images(tar_files(uri))
        if not listing.files:
            raise ValueError(f"{uri} has no images; names of images end in {', '.join(IMAGE_ENDINGS)}")
        return _image_files("tar", uri, listing, reference, image_size)
    if {"manifest.json", *_RECORDS} & set(storage.list_names(uri)):
        return _generated_samples(uri)
    listing = list_images(folder_files(uri))
    if not listing.files:
        raise FileNotFoundError(
            f"{uri} has no finished samples; generate them first, or pass an .npz, a .tar or a folder of images"
        )
    return _image_files("folder", uri, listing, reference, image_size)


def split_images(dataset: str, split: str, image_size: int) -> ImageSet:
    """Return a split of a prepared dataset, centre-cropped."""
    manifest = load_manifest(dataset)
    manifest.check(split, image_size, "center")
    shards = [shard.model_dump(mode="json") for shard in manifest.shards(split)]
    read = partial(read_images, manifest, split, image_size=image_size)
    identity = _digest([split, image_size, shards])
    classes = () if split in manifest.unlabelled else manifest.classes
    warnings: tuple[str, ...] = ()
    if manifest.width and manifest.height:
        largest = min(manifest.width[1], manifest.height[1])
        if largest < image_size:
            warnings = (f"all its images are upsampled to {image_size} pixels, because they have at most {largest}",)
    count = manifest.num_samples(split)
    return ImageSet(f"{dataset} {split}", "dataset", count, identity, read, classes=classes, warnings=warnings)


def image_size_of(images: ImageSet) -> int:
    """Return height and width of square images; ValueError for others."""
    shape = images.read(0, 1)[0].shape
    if shape[1] != shape[2]:
        raise ValueError(f"{images.uri}: images have {shape[2]}x{shape[1]} pixels; a dataset needs square images")
    return int(shape[1])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ samples


def _generated_samples(folder: str) -> ImageSet:
    """Return the samples in a folder of jobs/generate_samples.py."""
    manifest_uri = storage.join(folder, "manifest.json")
    if storage.exists(manifest_uri) and "splits" in storage.read_json(manifest_uri):
        raise ValueError(f"{folder} is a dataset, not samples; pass it as the reference")
    count = count_samples(folder)
    run = storage.join(folder, "run.json")  # a config.json beside it is that of an evaluation
    content = storage.read_json(run if storage.exists(run) else storage.join(folder, "config.json"))
    config = content.get("config", content) | {"num_samples": count}
    record = content.get("record", {})
    return ImageSet(
        folder,
        "samples",
        count,
        identity=_digest(config),
        read=partial(read_range, folder),
        seed=config.get("seed"),
        classes=tuple(record.get("classes", ())),  # older folders do not have them
        made_by={"config": config, "record": record},
    )


# ------------------------------------------------------------------------------------------------ .npz


def batch_images(batch: PublishedBatch) -> ImageSet:
    """Return the images of a published batch; ValueError if it holds statistics only."""
    read = partial(_read_batch, batch.rows, batch.labels)
    identity = f"{batch.checksum:08x}-{batch.num_images}"
    if batch.labels is not None:  # they are stored with the features
        identity += f"-{zlib.crc32(batch.labels.tobytes()):08x}"
    num_classes = 0 if batch.labels is None else int(batch.labels.max()) + 1
    return ImageSet(batch.uri, "npz", batch.num_images, identity, read, num_classes=num_classes)


def _read_batch(rows: ImageRows, labels: np.ndarray | None, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    return rows(begin, end), np.full(end - begin, -1) if labels is None else labels[begin:end]


# ------------------------------------------------------------------------------------------------ images as files


def _image_files(kind: str, uri: str, listing: Listing, reference: Manifest | None, image_size: int | None) -> ImageSet:
    """Return image files as a set, with labels if all their folders are named after classes of the reference."""
    files, warnings = listing.files, list(listing.warnings)
    classes = reference.classes if reference else ()
    decoding = reference.model_dump(include={"background", "exif_orientation"}) if reference else {}
    if decoding == {"background": "drop", "exif_orientation": "ignore"}:
        decoding = {}  # the defaults, so that the identity is that without a reference
    label_of = {name: label for label, name in enumerate(classes)}
    folders = [file.name.rsplit("/", 2)[-2] if "/" in file.name else "" for file in files]
    matching = sorted(set(folders) & set(classes))
    others = sorted(set(folders) - set(classes))
    if matching and others:
        warnings.append(
            f"{matching[0]!r} is a class of the reference, but {others[0]!r} is not; so folders give images no labels"
        )
    classes = () if others else classes
    labels = np.array([label_of[folder] if classes else -1 for folder in folders])
    content = [image_size, [(file.name, file.offset, file.size) for file in files]]
    identity = _digest([*content, *filter(None, (decoding, classes))])  # labels are stored with the features
    read = ImageFiles(uri, kind == "tar", files, labels, image_size, decoding)
    first = next(i for i, file in enumerate(files) if file.name not in listing.unusual)
    if image_size is None:
        read = replace(read, shape=read(first, first + 1)[0].shape[1:])
        read.check_sizes(listing.unusual)
    if listing.unusual:
        examples = ", ".join(sorted(listing.unusual)[:3])
        warnings.append(
            f"{examples}: most names are like {files[first].name}; remove these files if they are not samples"
        )
    return ImageSet(uri, kind, len(files), identity, read, classes=classes, warnings=tuple(warnings))
