"""Evaluation: features shard by shard over a pool, then the metrics, each with its count and interval."""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
import safetensors.torch
from pydantic import Field

from cluster.session import session
from cluster.workers import map_items
from models.features import DigitsNetwork, Extractor, Features, extract, train_digits_network
from models.metrics import (
    Estimate,
    frechet_estimate,
    inception_score,
    kid,
    moments,
    proportion_estimate,
    softmax,
)
from models.neighbours import density_coverage, nearest, precision_recall
from orchestrator import storage
from orchestrator.config import JobConfig, claim
from orchestrator.dataset import load_manifest, read_images
from orchestrator.progress import progress_line
from orchestrator.samples import count_samples, read_range
from orchestrator.tracking import tracked

BLOCK = 512  # rows in a block of features: blocks are cut alike whatever the shards were
EXTRACTOR_BATCH = 64  # images in a batch of the extractor, the last one padded


class EvaluationConfig(JobConfig):
    """What is measured, against what, by which features."""

    samples: str  # a samples folder
    reference: str  # a prepared dataset: its training split is the reference, its validation split held out
    output: str  # the evaluation's folder
    extractor: Literal["digits"] = "digits"  # feature network
    extractor_seed: int = Field(7, ge=0)  # of the digits network: its weights and its own split
    image_size: int = Field(16, gt=0)  # of samples and reference, pixels
    num_workers: int = Field(1, ge=0)  # feature workers; 0 = in this process, without Ray


class LoadedExtractor(NamedTuple):
    """A feature network and what tells it from all others."""

    network: Extractor
    fingerprint: str  # its name and the first digits of its weights' SHA-256
    held_out_accuracy: float


# ------------------------------------------------------------------------------------------------ features


def digits_extractor(reference: str, folder: str, seed: int, image_size: int) -> LoadedExtractor:
    """The digits network of `seed`: read from `folder`, or trained on all splits of `reference` and kept there.

    Its own split decides which images it learns from; the guiding classifier is another network altogether.
    """
    uri = storage.join(folder, f"digits-{image_size}-seed{seed}.safetensors")
    if not storage.exists(uri):
        manifest = load_manifest(reference)
        parts = [
            read_images(manifest, split, 0, manifest.num_samples(split), image_size)
            for split in ("train", "validation")
        ]
        network = train_digits_network(
            np.concatenate([images for images, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
            seed,
        )
        storage.create_bytes(uri, safetensors.torch.save(dict(network.state_dict())))
    data = storage.read_bytes(uri)
    network = DigitsNetwork.from_state_dict(safetensors.torch.load(data))
    return LoadedExtractor(network, f"digits-{hashlib.sha256(data).hexdigest()[:12]}", network.held_out_accuracy)


class Labelled(NamedTuple):
    """Features of n images beside their labels int64 [n]."""

    features: Features
    labels: np.ndarray


ReadImages = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # rows [begin, end) -> images, labels


def extract_all(
    source: str,
    read: ReadImages,
    count: int,
    folder: str,
    extractor: Callable[[], LoadedExtractor],
    num_workers: int,
) -> Labelled:
    """Features of `count` images of `source`, by blocks of 512 in index order; finished blocks are kept in `folder`."""
    fingerprint = extractor().fingerprint
    target = storage.join(folder, fingerprint)
    blocks = [(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK)]
    there = set(storage.list_names(target))
    todo = [block for block in blocks if _block_name(block) not in there]
    with progress_line(len(blocks), "blocks", f"features of {source}") as progress:
        done = len(blocks) - len(todo)
        progress.update_to(done)
        for _ in map_items(partial(_make_extraction, read, target, extractor), todo, num_workers if todo else 0):
            done += 1
            progress.update_to(done)
    return concatenate(_read_block(storage.join(target, _block_name(block))) for block in blocks)


def _make_extraction(
    read: ReadImages, target: str, extractor: Callable[[], LoadedExtractor]
) -> Callable[[tuple[int, int]], None]:
    """A worker: the extractor loaded once, then blocks."""
    network = extractor().network

    def work(block: tuple[int, int]) -> None:
        images, labels = read(*block)
        features = extract(network, images, EXTRACTOR_BATCH)
        arrays = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
        found = {name: array for name, array in arrays.items() if array is not None}
        data = safetensors.numpy.save(found | {"labels": labels})
        storage.create_bytes(storage.join(target, _block_name(block)), data)

    return work


def _block_name(block: tuple[int, int]) -> str:
    return f"{block[0]:08d}-{block[1]:08d}.safetensors"


def _read_block(uri: str) -> Labelled:
    arrays = safetensors.numpy.load(storage.read_bytes(uri))
    features = Features(arrays["pool"], arrays.get("spatial"), arrays.get("logits"))
    return Labelled(features, arrays["labels"])


def concatenate(blocks: Iterable[Labelled]) -> Labelled:
    """Blocks, given in index order, as one."""
    parts = list(blocks)

    def rows(name: str) -> Any:
        arrays = [getattr(part.features, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    features = Features(rows("pool"), rows("spatial"), rows("logits"))
    return Labelled(features, np.concatenate([part.labels for part in parts]))


def reference_features(
    dataset: str, split: str, extractor: Callable[[], LoadedExtractor], image_size: int, num_workers: int
) -> Labelled:
    """Features of a whole split of a dataset, extracted once and kept beside it."""
    manifest = load_manifest(dataset)
    folder = storage.join(dataset, "features", f"{split}-{image_size}")
    read = partial(read_images, manifest, split, image_size=image_size)
    return extract_all(f"{dataset} {split}", read, manifest.num_samples(split), folder, extractor, num_workers)


# ------------------------------------------------------------------------------------------------ the metrics


def measure(samples: Labelled, reference: Labelled, name: str) -> dict[str, Estimate]:
    """Every metric of `samples` against `reference`, whose features are those of the extractor called `name`.

    Precision is the share of samples near the reference, recall the share of the reference near samples; accuracy
    is the share of samples that the extractor takes for the class that was asked for.
    """
    made, real = samples.features, reference.features
    found = {
        f"fd_{name}": frechet_estimate(made.pool, moments(real.pool)),
        f"kid_{name}": kid(real.pool, made.pool),
    }
    found["precision"], found["recall"] = precision_recall(real.pool, made.pool)
    found["density"], found["coverage"] = density_coverage(real.pool, made.pool)
    if made.logits is not None:
        found[f"inception_score_{name}"] = inception_score(softmax(made.logits))
        found["accuracy"] = proportion_estimate(made.logits.argmax(axis=1) == samples.labels)
    return found


def describe(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON: value, n, interval (null where none is sound) and why."""
    interval = None if estimate.low is None else [estimate.low, estimate.high]
    return {"value": estimate.value, "n": estimate.n, "interval": interval, "note": estimate.note}


# ------------------------------------------------------------------------------------------------ in the driver


def evaluate(config: EvaluationConfig) -> str:
    """Measure the samples; answer the URI of report.json.

    Raises:
        ValueError: samples, reference and output folder do not fit each other.
        FileNotFoundError: samples or reference are not there, or not finished.
    """
    output, samples, reference = (config.path(path) for path in (config.output, config.samples, config.reference))
    count = count_samples(samples)
    claim(output, config, made_by=storage.read_json(storage.join(samples, "config.json")))
    report_uri = storage.join(output, "report.json")
    if storage.exists(report_uri):
        print(f"{output} is complete: {count:,} samples measured")
        return report_uri
    with session(config.num_workers), tracked("evaluate", config, output) as tracker:
        seed, size = config.extractor_seed, config.image_size
        extractor = partial(digits_extractor, reference, config.path("extractors"), seed, size)
        loaded = extractor()
        features_folder = storage.join(samples, "features")
        made = extract_all(samples, partial(read_range, samples), count, features_folder, extractor, config.num_workers)
        real = reference_features(reference, "train", extractor, size, config.num_workers)
        estimates = measure(made, real, config.extractor)
        report = {
            "samples": samples,
            "reference": {"dataset": reference, "split": "train", "n": len(real.labels)},
            "extractor": {
                "name": config.extractor,
                "fingerprint": loaded.fingerprint,
                "held_out_accuracy": loaded.held_out_accuracy,
            },
            "metrics": {name: describe(estimate) for name, estimate in estimates.items()},
            "nearest_training_image": nearest_pixel_distances(config, count),
        }
        tracker.metrics({name: estimate.value for name, estimate in estimates.items()})
        tracker.record("report.json", report)
    storage.create_bytes(report_uri, storage.json_bytes(report))
    for name, estimate in estimates.items():
        interval = estimate.note if estimate.low is None else f"{estimate.low:.4g} to {estimate.high:.4g}"
        print(f"{name:24} {estimate.value:10.4g}   95%: {interval}")
    print(report_uri)
    return report_uri


def plan(config: EvaluationConfig) -> str:
    """What an evaluation would read and write."""
    return "\n".join(
        [
            f"reads   {config.path(config.samples)} and {config.path(config.reference)}",
            f"writes  {config.path(config.output)}: report.json; features beside samples and dataset",
        ]
    )


def nearest_pixel_distances(config: EvaluationConfig, count: int) -> dict[str, list[float]]:
    """Distance of each sample, and of each held-out real image, to the nearest training image.

    Root mean square over pixels, in grey levels 0..255. Copies of training images would lie near 0, far below the
    held-out ones.
    """
    manifest = load_manifest(config.path(config.reference))
    real = read_images(manifest, "train", 0, manifest.num_samples("train"), config.image_size)[0]
    held_out = read_images(manifest, "validation", 0, manifest.num_samples("validation"), config.image_size)[0]
    made = read_range(config.path(config.samples), 0, count)[0]

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32)

    def distances(images: np.ndarray) -> list[float]:
        squares = nearest(flat(images), flat(real), k=1).squared[:, 0]
        return [float(distance) for distance in np.sqrt(squares / real[0].size)]

    return {"samples": distances(made), "held_out": distances(held_out)}
