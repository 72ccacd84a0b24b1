"""The evaluation of a setting at a rung: the shared pool draws its first n samples, and the trial measures them.

The folder trials/<setting>/seed-<seed>/ holds a block of features for each canonical batch, which all rungs share.
For each rung it holds the record n-<n>.json, and in n-<n>.safetensors the scores by which trials are compared.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import torch

from cluster.relay import Report, no_report
from cluster.workers import Pool
from models.features import Extractor, Features, extract
from models.guidance import GuidanceConfig
from models.manifolds import manifolds
from models.metrics import Gaussian, Moments
from orchestrator import storage
from orchestrator.config import noted_files
from orchestrator.evaluation.compatibility import Classes, match_classes
from orchestrator.evaluation.extraction import EXTRACTOR_BATCH, ArrayName, Labelled, choose_rows, concatenate
from orchestrator.evaluation.extractors import CPU
from orchestrator.evaluation.measurement import NEIGHBOURS, Limits
from orchestrator.evaluation.metrics import Comparison, Rows, describe, measure
from orchestrator.evaluation.references import Reference, extract_reference, find_reference
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import SamplingWorker, make_batch
from orchestrator.pictures import grid_png
from orchestrator.search.config import TrialsConfig
from orchestrator.search.halving import Evaluation, Outcome
from orchestrator.search.objectives import EVALUATIONS, Objective
from orchestrator.search.space import Setting

PICTURE_SAMPLES = 40  # samples in the picture of a trial


# ------------------------------------------------------------------------------------------------ records


def _folder_of(config: TrialsConfig, setting: Setting, seed: int) -> str:
    return storage.join(config.path(config.output), "trials", setting.name, f"seed-{seed}")


def record_uri(config: TrialsConfig, task: Evaluation) -> str:
    """Return the URI of an evaluation's record, which holds its metrics or the reason why it failed."""
    return storage.join(_folder_of(config, task.setting, task.seed), f"n-{task.n:06d}.json")


def read_outcome(config: TrialsConfig, task: Evaluation) -> Outcome:
    """Read the outcome of an evaluation from its record."""
    uri = record_uri(config, task)
    record = storage.read_json(uri)
    if record["failed"]:
        return Outcome(failed=record["failed"])
    scores = _read_arrays(uri.replace(".json", ".safetensors"))
    return Outcome(scores, scores.pop("strata", None), record["metrics"], tuple(record["unbiased"]))


def _read_arrays(uri: str) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(storage.read_bytes(uri))
    except safetensors.SafetensorError as error:
        raise RuntimeError(f"{uri} is damaged ({error}); delete it and run the same command again") from error


def _block_name(number: int) -> str:
    return f"block-{number:06d}.safetensors"


# ------------------------------------------------------------------------------------------------ in a trial


class LoadedReference(NamedTuple):
    """The reference in memory: statistics of all its images, and the features of some of them."""

    extractor: str
    statistics: dict[ArrayName, Moments | Gaussian]
    rows: np.ndarray  # float32 [M, D], pooled features
    num_classes: int


class NetworkFacts(NamedTuple):
    """What trials need to know about the networks."""

    image_size: int
    labels_given: bool  # the labels of the samples are not drawn at random
    class_mismatch: str  # why labels do not match the classes of the reference or the extractor; "" if they do


def evaluate(
    config: TrialsConfig, workers: Pool, facts: NetworkFacts, task: Evaluation, report: Report = no_report
) -> dict[str, float]:
    """Draw those of a setting's first n samples that are missing, measure all n, and write a record.

    Return the mean scores, which Ray Tune receives.

    If the samples are not finite, do not fit into memory or cannot be measured, the record holds the reason. After the
    first such batch the pool receives no more work of this setting. Any other error is caused by the machine. It leaves
    no record, so that the same command repeats the evaluation.

    Raises:
        ItemsFailed: no worker of the pool could draw a batch.
        OSError: storage failed.
    """
    reference = _load_reference(config, facts.image_size)
    folder, seconds = _folder_of(config, task.setting, task.seed), 0.0
    names = [_block_name(number) for number in range(-(-task.n // config.batch_size))]
    existing = set(storage.list_names(folder))
    missing = [Block(task.setting, task.seed, number) for number, name in enumerate(names) if name not in existing]
    for done, (_, result) in enumerate(workers.map(missing), 1):
        if result.failed:
            return _write_record(config, task, failed=result.failed)
        report(task, min(done * config.batch_size, task.n))
        seconds += result.seconds
    samples = concatenate(_read_block(storage.join(folder, name)) for name in names)
    try:
        outcome = _measure(config, task, samples, reference, facts)
    except (ValueError, ArithmeticError) as error:  # caused by the samples, since measuring reads no storage
        return _write_record(config, task, failed=_one_line(error))
    return _write_record(config, task, outcome, worker_seconds=seconds)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _measure(
    config: TrialsConfig, task: Evaluation, samples: Labelled, reference: LoadedReference, facts: NetworkFacts
) -> Outcome:
    """Return the metrics and scores of the first n samples; raise ValueError if they cannot be computed."""
    features = {name: array[: task.n] for name, array in vars(samples.features).items() if array is not None}
    pool, labels = features["pool"], samples.labels[: task.n]
    rows = Rows(reference.rows, pool, manifolds(reference.rows, pool, k=NEIGHBOURS), kernel=(reference.rows, pool))
    strata = labels if facts.labels_given else None
    missing = {"classes": facts.class_mismatch} if facts.class_mismatch else {}
    comparison = Comparison(
        reference.extractor, features.get, labels, reference.statistics, reference.num_classes, rows, missing, strata
    )
    metrics = {name: describe(estimate) for name, estimate in measure(comparison)[0].items()}
    evaluations, is_last_rung = task.setting.evaluations, task.n == config.max_samples
    metrics[EVALUATIONS] = {"value": evaluations, "n": task.n, "interval": [evaluations] * 2, "note": "exact"}
    names = dict.fromkeys((*config.objective, *(bound.metric for bound in config.bounds)))
    objectives = [Objective.parse(name, reference.extractor) for name in names]
    scores = {objective.name: objective.scores(comparison, evaluations) for objective in objectives}
    if not all(np.isfinite(values).all() for values in scores.values()):
        raise ValueError("the samples have scores that are not finite")
    unbiased = tuple(objective.name for objective in objectives if objective.is_unbiased(comparison, is_last_rung))
    return Outcome(scores, strata, metrics, unbiased)


def _write_record(
    config: TrialsConfig,
    task: Evaluation,
    outcome: Outcome | None = None,
    failed: str | None = None,
    worker_seconds: float = 0,
) -> dict[str, float]:
    """Write the scores, then the record, so that a record implies its scores; return the mean scores."""
    uri = record_uri(config, task)
    record = {"setting": task.setting.model_dump(mode="json"), "n": task.n, "seed": task.seed, "failed": failed}
    if outcome is not None:
        arrays = outcome.scores | ({} if outcome.strata is None else {"strata": outcome.strata})
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        storage.put_if_absent(uri.replace(".json", ".safetensors"), safetensors.numpy.save(arrays))
        record |= {"metrics": outcome.metrics, "unbiased": outcome.unbiased, "worker_seconds": worker_seconds}
    storage.put_if_absent(uri, storage.json_bytes(record))
    means = {name: float(scores.mean()) for name, scores in (outcome.scores if outcome else {}).items() if len(scores)}
    return {"n": task.n, "failed": failed is not None} | means


def reference_of(config: TrialsConfig, image_size: int, num_workers: int) -> tuple[Reference, str]:
    """Return the reference and the extractor's name; extract the features of the reference if they are not stored yet.

    Raises:
        ValueError: the reference holds statistics only, no images.
    """
    loader = config.extractor_loader(image_size)
    loaded, folder = loader(CPU), storage.join(config.path(config.output), "reference")
    reference_input = find_reference(config.path(config.reference), image_size)
    reference = extract_reference(reference_input, loader, loaded, folder, num_workers, config.num_gpus)
    if reference.files is None:
        raise ValueError(
            f"--reference {config.reference} holds statistics only; pass a prepared dataset or a batch with images"
        )
    return reference, loaded.network.name


def class_mismatch(classes: tuple[str, ...], reference: Reference) -> str:
    """Return why these classes cannot be matched with the reference's classes, or ""; see `match_classes`."""
    return match_classes(
        Classes("--weights", classes, len(classes)),
        Classes(f"--reference {reference.uri}", reference.classes, len(reference.classes)),
    )


@lru_cache(maxsize=1)
def _load_reference(config: TrialsConfig, image_size: int) -> LoadedReference:
    """Load the reference, which the process keeps for its next trials."""
    reference, extractor = reference_of(config, image_size, num_workers=0)
    assert reference.files is not None, "reference_of raises an error"
    rows = reference.files.pool(choose_rows(reference.files.count, Limits.references))
    return LoadedReference(extractor, reference.statistics, rows, len(reference.classes))


def _read_block(uri: str) -> Labelled:
    arrays = _read_arrays(uri)
    return Labelled(Features(arrays["pool"], arrays.get("spatial"), arrays.get("logits")), arrays["labels"])


# ------------------------------------------------------------------------------------------------ in the pool


class Block(NamedTuple):
    """A canonical batch of a setting, whose features are an object in storage."""

    setting: Setting
    seed: int
    number: int


class BlockResult(NamedTuple):
    """The result of a worker: the block is written, or the setting cannot be sampled."""

    seconds: float = 0.0  # 0 if the block existed
    failed: str | None = None  # why the setting cannot be sampled


def networks_config(
    config: TrialsConfig, files: dict[str, str], weights: str, weak: str | None = None
) -> GenerationConfig:
    """Return the config of a generation that loads a diffusion model with the networks that guide it.

    files: the weights file that the job uses for each path.
    weak: the weaker model of autoguidance; None = without one.
    """
    generation = config.generation(files.get(weights, weights), config.seed)
    guidance = GuidanceConfig(kind="auto", weak_weights=files.get(weak, weak)) if weak else generation.guidance
    classifier = files.get(config.classifier or "", config.classifier)
    return generation.model_copy(update={"classifier": classifier, "guidance": guidance})


def make_worker(config: TrialsConfig) -> Callable[[Block], BlockResult]:
    """Return a function that draws batches of any trial, with the networks and the extractor loaded once."""
    files = noted_files(config.path(config.output))

    @lru_cache(config.max_networks)
    def load_networks(path: str, weak: str | None) -> SamplingWorker:
        worker = SamplingWorker(networks_config(config, files, path, weak))
        if config.compile:
            worker.compile()
        return worker

    @lru_cache(1)
    def load_extractor(image_size: int, device: torch.device) -> Extractor:
        return config.extractor_loader(image_size)(device).network

    def work(block: Block) -> BlockResult:
        try:
            worker = load_networks(block.setting.weights, block.setting.guidance.weak_weights)
            image_size = worker.networks.weights.architecture.image_size
            return make_block(config, worker, load_extractor(image_size, worker.device), block)
        except (FloatingPointError, torch.OutOfMemoryError) as error:  # caused by the setting; other errors are retried
            return BlockResult(failed=_one_line(error))

    return work


def make_block(config: TrialsConfig, worker: SamplingWorker, extractor: Extractor, block: Block) -> BlockResult:
    """Draw a canonical batch and write its features; write the images of the first batch too."""
    folder = _folder_of(config, block.setting, block.seed)
    uri = storage.join(folder, _block_name(block.number))
    if storage.exists(uri):
        return BlockResult()
    begin = time.perf_counter()
    generation = config.generation(block.setting.weights, block.seed, block.setting)
    (batch,) = make_batch(worker.networks, generation, block.number)
    features = extract(extractor, batch.images, EXTRACTOR_BATCH)
    arrays = {name: array for name, array in vars(features).items() if array is not None} | {"labels": batch.labels}
    if block.number == 0:
        arrays["images"] = batch.images
        storage.write_bytes(storage.join(folder, "samples.png"), grid_png(batch.images[:PICTURE_SAMPLES], 10, scale=4))
    storage.put_if_absent(uri, safetensors.numpy.save(arrays))
    return BlockResult(seconds=time.perf_counter() - begin)


def first_images(config: TrialsConfig, setting: Setting) -> np.ndarray:
    """Return the images uint8 [B, H, W, 3] of the first batch of a setting that was evaluated."""
    return _read_arrays(storage.join(_folder_of(config, setting, config.seed), _block_name(0)))["images"]


def samples_picture(config: TrialsConfig, setting: Setting) -> bytes:
    """Return a PNG of the first samples of a setting that was evaluated."""
    return storage.read_bytes(storage.join(_folder_of(config, setting, config.seed), "samples.png"))
