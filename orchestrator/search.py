"""Search: which guidance scale, how many steps; every trial on the same labels and noise, by one warm pool."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from cluster.session import session
from cluster.tuner import Report, run_trials
from cluster.workers import Pool, pool
from models.features import extract
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator import storage
from orchestrator.config import JobConfig, claim
from orchestrator.extraction import EXTRACTOR_BATCH, Labelled, concatenate, reference_features
from orchestrator.extractors import LoadedExtractor, digits_extractor
from orchestrator.measurement import describe, measure
from orchestrator.pictures import grid_png
from orchestrator.progress import progress_line
from orchestrator.sampling import GenerationConfig, evaluations, load_networks, make_batch
from orchestrator.tracking import tracked


class SearchConfig(JobConfig):
    """What is tried, on which networks, and how it is judged."""

    weights: str  # the diffusion model: a training run's folder, or a .safetensors file
    classifier: str  # the noisy classifier that guides, likewise
    reference: str  # a prepared dataset
    output: str  # the search's folder
    sampler: Literal["ddpm", "ddim", "dpm_solver", "heun"] = "ddim"  # how samples are drawn
    scales: tuple[float, ...] = Field((0.0, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=1)  # guidance scales
    steps: tuple[int, ...] = Field((10, 25), min_length=1)  # steps of the chain
    num_samples: int = Field(512, gt=0)  # images of each trial
    objective: str = "fd_digits"  # the metric that the winner has least of
    seed: int = Field(0, ge=0)  # labels and noise of all trials alike
    batch_size: int = Field(64, gt=0)  # canonical batch B
    extractor: Literal["digits"] = "digits"  # feature network
    extractor_seed: int = Field(7, ge=0)  # of the digits network
    num_workers: int = Field(1, ge=1)  # sampling workers, shared by all trials

    def generation(self) -> GenerationConfig:
        """The part of a generation's config that all trials share."""
        return GenerationConfig(
            store=self.store,
            weights=self.weights,
            classifier=self.classifier,
            output=self.output,
            num_samples=self.num_samples,
            seed=self.seed,
            batch_size=self.batch_size,
        )


class Work(NamedTuple):
    """One canonical batch of one trial."""

    sampler: SamplerConfig
    guidance: GuidanceConfig
    number: int


class Sampled(NamedTuple):
    """What a worker answers: the features, and the images of the first batch for the trial's picture."""

    number: int
    labelled: Labelled
    images: np.ndarray | None


# ------------------------------------------------------------------------------------------------ in the driver


def search(config: SearchConfig) -> str:
    """Try every setting that has no record yet; answer the URI of search.json.

    Raises:
        ValueError: networks, reference and output folder do not fit each other.
        RuntimeError: no trial came to an end.
    """
    output = config.path(config.output)
    networks = load_networks(config.generation(), "cpu")
    assert networks.classifier is not None
    claim(output, config, weights=networks.weights.sha256, classifier=networks.classifier.sha256)
    answer_uri = storage.join(output, "search.json")
    if storage.exists(answer_uri):
        print(f"{output} is complete: the winner is {storage.read_json(answer_uri)['winner']['setting']}")
        return answer_uri
    settings = settings_of(config)
    there = set(storage.list_names(storage.join(output, "trials")))
    todo = [setting for setting in settings if _trial_name(setting) not in there]
    with (
        session(config.num_workers + 1),  # one for the trials, which only wait and measure
        tracked("search", config, output) as tracker,
        progress_line(len(settings), "trials") as progress,
    ):
        image_size = networks.weights.architecture.image_size
        extractor = _extractor(config, image_size)
        reference_features(config.path(config.reference), "train", extractor, image_size, config.num_workers)
        progress.update_to(len(settings) - len(todo))

        def on_report(setting: dict[str, Any], metrics: dict[str, Any]) -> None:
            name = f"scale {setting['scale']:g}, {setting['steps']} steps"
            progress.update_to(progress.done + 1)
            tracker.child(name, {metric: value["value"] for metric, value in metrics.items()}, setting)

        with pool(partial(_make_worker, config), config.num_workers) as workers:
            trial = partial(_trial, config, workers, image_size)
            outcomes = run_trials(trial, todo, config.num_workers, on_report)
        failed = {_trial_name(s): o["error"] for s, o in zip(todo, outcomes, strict=True) if "error" in o}
        answer = conclude(config, failed)
        tracker.record("search.json", answer)
        tracker.metrics({f"winner_{name}": float(value) for name, value in answer["winner"]["setting"].items()})
    storage.create_bytes(answer_uri, storage.json_bytes(answer))
    winner, best = answer["winner"]["setting"], answer["winner"]["metrics"][config.objective]
    print(
        f"{answer_uri}: scale {winner['scale']:g} and {winner['steps']} steps, {config.objective} {best['value']:.4g}"
    )
    return answer_uri


def plan(config: SearchConfig) -> str:
    """What a search would read, write and cost."""
    settings = settings_of(config)
    each = [
        evaluations(SamplerConfig(name=config.sampler, num_steps=s["steps"]), GuidanceConfig(scale=s["scale"]))
        for s in settings
    ]
    images = len(settings) * config.num_samples
    return "\n".join(
        [
            f"reads   {config.path(config.weights)}, {config.path(config.classifier)}, {config.path(config.reference)}",
            f"writes  {config.path(config.output)}: a record for each of {len(settings)} trials, search.json",
            f"work    {images:,} images, {sum(each) * config.num_samples:,} network evaluations",
        ]
    )


def settings_of(config: SearchConfig) -> list[dict[str, Any]]:
    """Every pair of scale and steps."""
    return [{"scale": scale, "steps": steps} for steps in config.steps for scale in config.scales]


def conclude(config: SearchConfig, failed: dict[str, str]) -> dict[str, Any]:
    """The answer out of the trials' records: all of them, and the one with the least of the objective."""
    trials_folder = storage.join(config.path(config.output), "trials")
    names = [name for name in storage.list_names(trials_folder) if name.endswith(".json")]
    trials = [storage.read_json(storage.join(trials_folder, name)) for name in names]
    if not trials:
        raise RuntimeError(f"no trial came to an end: {failed}")
    if config.objective not in trials[0]["metrics"]:
        raise ValueError(f"objective={config.objective!r} is none of {sorted(trials[0]['metrics'])}")
    trials.sort(key=lambda trial: (trial["setting"]["steps"], trial["setting"]["scale"]))
    winner = min(trials, key=lambda trial: trial["metrics"][config.objective]["value"])
    return {"objective": config.objective, "winner": winner, "trials": trials, "failed": failed}


def _extractor(config: SearchConfig, image_size: int) -> Callable[[], LoadedExtractor]:
    reference, folder = config.path(config.reference), config.path("extractors")
    return partial(digits_extractor, reference, folder, config.extractor_seed, image_size)


def _trial_name(setting: dict[str, Any]) -> str:
    text = json.dumps(setting, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


# ------------------------------------------------------------------------------------------------ in a trial


def _trial(config: SearchConfig, workers: Pool, image_size: int, setting: dict[str, Any], report: Report) -> None:
    """One setting: ask the shared pool for its batches, measure them, leave a record."""
    sampler = SamplerConfig(name=config.sampler, num_steps=setting["steps"])
    guidance = GuidanceConfig(scale=setting["scale"])
    numbers = range(-(-config.num_samples // config.batch_size))
    parts = [sampled for _, sampled in workers.map([Work(sampler, guidance, number) for number in numbers])]
    parts.sort(key=lambda sampled: sampled.number)
    made = concatenate([sampled.labelled for sampled in parts])
    reference = config.path(config.reference)
    real = reference_features(reference, "train", _extractor(config, image_size), image_size, num_workers=0)
    metrics = {name: describe(estimate) for name, estimate in measure(made, real, config.extractor).items()}
    record = {"setting": setting, "num_samples": config.num_samples, "seed": config.seed, "metrics": metrics}
    folder = storage.join(config.path(config.output), "trials")
    if parts[0].images is not None:
        picture = grid_png(parts[0].images[:40], columns=10)
        storage.write_bytes(storage.join(folder, _trial_name(setting).replace(".json", ".png")), picture)
    storage.create_bytes(storage.join(folder, _trial_name(setting)), storage.json_bytes(record))
    report(metrics)


# ------------------------------------------------------------------------------------------------ in the pool


def _make_worker(config: SearchConfig) -> Callable[[Work], Sampled]:
    """A sampling worker: networks and extractor loaded once, then batches of any trial."""
    generation = config.generation()
    networks = load_networks(generation, "cpu")
    extractor = _extractor(config, networks.weights.architecture.image_size)().network

    def work(item: Work) -> Sampled:
        batch = make_batch(networks, generation, item.number, item.sampler, item.guidance)
        features = extract(extractor, batch.images, EXTRACTOR_BATCH)
        images = batch.images if item.number == 0 else None
        return Sampled(item.number, Labelled(features, batch.labels), images)

    return work
