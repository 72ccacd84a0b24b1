"""The evaluation of a setting at a rung: the shared pool draws its first n samples, which are measured and recorded.

The folder trials/<setting>/seed-<seed>/ holds a block of features for each canonical batch, which every rung reuses.
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

PICTURED = 40  # samples in the picture of a trial


# ------------------------------------------------------------------------------------------------ records


def folder_of(config: TrialsConfig, task: Evaluation) -> str:
    return storage.join(config.path(config.output), "trials", task.setting.name, f"seed-{task.seed}")


def record_uri(config: TrialsConfig, task: Evaluation) -> str:
    """Return the URI of an evaluation's record, which holds its metrics or the reason why it failed."""
    return storage.join(folder_of(config, task), f"n-{task.n:06d}.json")


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


class Held(NamedTuple):
    """The reference in memory: statistics of all its images, and the features of some of them."""

    extractor: str
    statistics: dict[ArrayName, Moments | Gaussian]
    rows: np.ndarray  # float32 [M, D], pooled features
    num_classes: int


class Facts(NamedTuple):
    """What trials need to know about the networks."""

    image_size: int
    labels_given: bool  # the labels of the samples are not drawn at random
    unmatched: str  # why labels cannot be matched with the classes of the reference or the extractor; "" if they can


def evaluate(
    config: TrialsConfig, workers: Pool, facts: Facts, task: Evaluation, report: Report = no_report
) -> dict[str, float]:
    """Draw the missing ones of a setting's first n samples in the shared pool, measure them, and write a record.

    Return the mean scores, for Ray Tune's table.

    If the samples are not finite, do not fit into memory or cannot be measured, the record holds the reason. After the
    first such batch the pool receives no more work of this setting. Any other error is caused by the machine. It leaves
    no record, so that the same command repeats the evaluation.

    Raises:
        ItemsFailed: no worker of the pool could draw a batch.
        OSError: storage failed.
    """
    held = _held(config, facts.image_size)
    folder, seconds = folder_of(config, task), 0.0
    names = [_block_name(number) for number in range(-(-task.n // config.batch_size))]
    existing = set(storage.list_names(folder))
    todo = [Block(task.setting, task.seed, number) for number, name in enumerate(names) if name not in existing]
    for done, (_, result) in enumerate(workers.map(todo), 1):
        if result.failed:
            return _record(config, task, failed=result.failed)
        report(task, min(done * config.batch_size, task.n))
        seconds += result.seconds
    drawn = concatenate(_read_block(storage.join(folder, name)) for name in names)
    try:
        outcome = _measured(config, task, drawn, held, facts)
    except (ValueError, ArithmeticError) as error:  # caused by the samples, since measuring reads no storage
        return _record(config, task, failed=_one_line(error))
    return _record(config, task, outcome, worker_seconds=seconds)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _measured(config: TrialsConfig, task: Evaluation, drawn: Labelled, held: Held, facts: Facts) -> Outcome:
    """Return the metrics and scores of the first n samples; raise ValueError if they cannot be computed."""
    features = {name: array[: task.n] for name, array in vars(drawn.features).items() if array is not None}
    pool, labels = features["pool"], drawn.labels[: task.n]
    rows = Rows(held.rows, pool, manifolds(held.rows, pool, k=NEIGHBOURS), kernel=(held.rows, pool))
    strata = labels if facts.labels_given else None
    missing = {"classes": facts.unmatched} if facts.unmatched else {}
    comparison = Comparison(
        held.extractor, features.get, labels, held.statistics, held.num_classes, rows, missing, strata
    )
    metrics = {name: describe(estimate) for name, estimate in measure(comparison)[0].items()}
    evaluations, full = task.setting.evaluations, task.n == config.most_samples
    metrics[EVALUATIONS] = {"value": evaluations, "n": task.n, "interval": [evaluations] * 2, "note": "exact"}
    names = dict.fromkeys((*config.objective, *(bound.metric for bound in config.bounds)))
    objectives = [Objective.parse(name, held.extractor) for name in names]
    scores = {objective.name: objective.scores(comparison, evaluations) for objective in objectives}
    if not all(np.isfinite(each).all() for each in scores.values()):
        raise ValueError("the samples have scores that are not finite")
    unbiased = tuple(objective.name for objective in objectives if objective.is_unbiased(comparison, full))
    return Outcome(scores, strata, metrics, unbiased)


def _record(
    config: TrialsConfig,
    task: Evaluation,
    outcome: Outcome | None = None,
    failed: str | None = None,
    worker_seconds: float = 0,
) -> dict[str, float]:
    # the record is written last: if it exists, the scores exist too
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


def unmatched(classes: tuple[str, ...], reference: Reference) -> str:
    """Return why labels of these classes cannot be matched with the reference's classes; see `match_classes`."""
    return match_classes(
        Classes("--weights", classes, len(classes)),
        Classes(f"--reference {reference.uri}", reference.classes, len(reference.classes)),
    )


@lru_cache(maxsize=1)
def _held(config: TrialsConfig, image_size: int) -> Held:
    """Load the reference, which a process keeps for its next trials."""
    reference, name = reference_of(config, image_size, num_workers=0)
    assert reference.files is not None
    return Held(
        name,
        reference.statistics,
        reference.files.pool(choose_rows(reference.files.count, Limits.references)),
        len(reference.classes),
    )


def _read_block(uri: str) -> Labelled:
    arrays = _read_arrays(uri)
    return Labelled(Features(arrays["pool"], arrays.get("spatial"), arrays.get("logits")), arrays["labels"])


# ------------------------------------------------------------------------------------------------ in the pool


class Block(NamedTuple):
    """A canonical batch of a setting."""

    setting: Setting
    seed: int
    number: int


class Made(NamedTuple):
    """The result of a worker: the block is written, or the setting cannot be sampled."""

    seconds: float = 0.0
    failed: str | None = None


def sampled_by(config: TrialsConfig, files: dict[str, str], weights: str, weak: str | None = None) -> GenerationConfig:
    """Return the config that loads a diffusion model with the networks that guide it.

    files: the weights file that the job uses for each path.
    weak: the weaker model; None = without one.
    """
    generation = config.generation(files.get(weights, weights), config.seed)
    guidance = GuidanceConfig(kind="auto", weak_weights=files.get(weak, weak)) if weak else generation.guidance
    classifier = files.get(config.classifier or "", config.classifier)
    return generation.model_copy(update={"classifier": classifier, "guidance": guidance})


def make_worker(config: TrialsConfig) -> Callable[[Block], Made]:
    """Return a function that draws batches of any trial, with the networks and the extractor loaded once."""
    files = noted_files(config.path(config.output))

    @lru_cache(config.most_networks)
    def loaded(path: str, weak: str | None) -> SamplingWorker:
        worker = SamplingWorker(sampled_by(config, files, path, weak))
        if config.compile:
            worker.compile()
        return worker

    @lru_cache(1)
    def extractor(image_size: int, device: torch.device) -> Extractor:
        return config.extractor_loader(image_size)(device).network

    def work(block: Block) -> Made:
        try:
            worker = loaded(block.setting.weights, block.setting.guidance.weak_weights)
            image_size = worker.networks.weights.architecture.image_size
            return make_block(config, worker, extractor(image_size, worker.device), block)
        except (
            FloatingPointError,
            torch.OutOfMemoryError,
        ) as error:  # any other error is retried
            return Made(failed=_one_line(error))

    return work


def make_block(config: TrialsConfig, worker: SamplingWorker, extractor: Extractor, block: Block) -> Made:
    """Draw a canonical batch and write its features; write the images of the first batch too."""
    folder = folder_of(config, Evaluation(block.setting, 0, block.seed))
    uri = storage.join(folder, _block_name(block.number))
    if storage.exists(uri):
        return Made()
    begin = time.perf_counter()
    generation = config.generation(block.setting.weights, block.seed, block.setting)
    (batch,) = make_batch(worker.networks, generation, block.number)
    features = extract(extractor, batch.images, EXTRACTOR_BATCH)
    arrays = {name: array for name, array in vars(features).items() if array is not None} | {"labels": batch.labels}
    if block.number == 0:
        arrays["images"] = batch.images
        storage.write_bytes(storage.join(folder, "samples.png"), grid_png(batch.images[:PICTURED], 10, scale=4))
    storage.put_if_absent(uri, safetensors.numpy.save(arrays))
    return Made(seconds=time.perf_counter() - begin)


def first_images(config: TrialsConfig, setting: Setting) -> np.ndarray:
    """Return the images uint8 [B, H, W, 3] of the first batch of a setting that was evaluated."""
    uri = storage.join(folder_of(config, Evaluation(setting, 0, config.seed)), _block_name(0))
    return _read_arrays(uri)["images"]


def samples_picture(config: TrialsConfig, setting: Setting) -> bytes:
    """Return a PNG of the first samples of a setting that was evaluated."""
    return storage.read_bytes(storage.join(folder_of(config, Evaluation(setting, 0, config.seed)), "samples.png"))
