"""The evaluation of a training run: all its snapshots are sampled with the same labels and noise, and compared.

All snapshots use the same indices, so consecutive snapshots are compared by paired differences, in which most of the
sampling error cancels. The evaluation runs during the training on its own workers, or afterwards. The result of each
snapshot is stored, so that the same command continues after an interruption.
"""

import itertools
import logging
import time
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from cluster.session import session
from cluster.workers import pool
from orchestrator import storage
from orchestrator.closing import next_command, print_closing
from orchestrator.config import check_or_write_config, noted_files
from orchestrator.cost import priced
from orchestrator.evaluation.extractors import CPU
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.cost import classifier_outline, costs, outline
from orchestrator.generation.sampling import NUMERICS_VERSION, load_networks
from orchestrator.progress import progress_line
from orchestrator.run_evaluation.config import RunEvaluationConfig
from orchestrator.run_evaluation.page import curve_figure, quality_page, snapshots_figure
from orchestrator.run_evaluation.result import Point, best_files, conclude, summary
from orchestrator.search.evaluator import (
    NetworkFacts,
    class_mismatch,
    evaluate,
    make_worker,
    networks_config,
    read_outcome,
    record_uri,
    reference_of,
)
from orchestrator.search.halving import Evaluation
from orchestrator.search.job import pass_costs
from orchestrator.search.objectives import Objective
from orchestrator.search.space import PassCosts, Setting
from orchestrator.tracking import Tracker, tracked
from orchestrator.training.averages import average, average_uri
from orchestrator.training.config import AverageConfig
from orchestrator.training.lease import Lease
from orchestrator.training.snapshots import Snapshot, power_snapshots, snapshots
from orchestrator.weights.network import BEST, weights_file

POLL_SECONDS = 20.0  # between two checks for new snapshots

log = logging.getLogger(__name__)


def evaluate_run(config: RunEvaluationConfig) -> str:
    """Evaluate the snapshots that have no stored result, and return the URI of quality.json.

    Raises:
        FileNotFoundError: the run has no snapshots, or the reference or the extractor's weights do not exist.
        ValueError: run, guidance, reference and output folder do not fit together.
        RuntimeError: no snapshot could be sampled, or the cluster failed.
    """
    run, output = config.path(config.weights), config.path(config.output)
    files = _files(config)
    existing = _snapshots(config)
    if not existing:
        if averages := sorted({snapshot.average for snapshot in snapshots(run)}):
            raise ValueError(
                f"--ema {' '.join(config.ema)}: {config.weights} has only {', '.join(averages)}; pass some of them"
            )
        raise FileNotFoundError(
            f"--weights {config.weights} has no snapshots yet; train with --snapshot-every, and run this command after "
            "the first snapshot"
        )
    first = next(iter(snapshots(run)), existing[0])  # whatever averages are selected
    facts, classes, passes = _check_or_write_config(config, files, first)
    with (
        session(
            config.num_workers * config.num_threads,
            num_gpus=config.num_workers * config.num_gpus,
            shared=config.shared,
        ),
        tracked("evaluate run", config, output) as tracker,
    ):
        reference, _ = reference_of(config, facts.image_size, config.num_workers)
        mismatch = class_mismatch(classes, reference)
        facts = facts._replace(class_mismatch=mismatch or facts.class_mismatch)
        points = _evaluate_snapshots(config, facts, passes, tracker)
        result = conclude(config, points)
        pictures = {"quality.png": curve_figure(result), "snapshots.png": snapshots_figure(config, result)}
        for name, picture in pictures.items():
            storage.write_bytes(storage.join(output, name), picture)
            tracker.picture(name, picture)
        page = quality_page(result, pictures)
        storage.write_bytes(storage.join(output, "report.html"), page.encode())
        tracker.record("report.html", page)
        tracker.record("quality.json", result)
    uri = storage.join(output, "quality.json")
    storage.write_json(uri, result)
    storage.write_json(storage.join(run, BEST), best_files(result))
    print(summary(result))
    average = result["best"]["average"]
    options = {} if average.startswith("posthoc") else {"ema": average}
    command = next_command("generate_samples", weights=config.weights, **options, at="best")
    print_closing([storage.join(output, "report.html"), uri], [command])
    return uri


def _evaluate_snapshots(
    config: RunEvaluationConfig, facts: NetworkFacts, passes: PassCosts, tracker: Tracker
) -> list[Point]:
    """Evaluate the snapshots that have no stored result; log the metrics of all snapshots by images and return them."""
    points: list[Point] = []
    with pool(partial(make_worker, config), config.num_workers, config.num_threads, config.num_gpus) as workers:
        for evaluations in _rounds(config, passes):
            with progress_line(len(evaluations) * config.num_samples, "samples") as progress:
                for snapshot, task in evaluations:
                    if not storage.exists(record_uri(config, task)):
                        evaluate(config, workers, facts, task, progress.update_item)
                    progress.finish_item(task, config.num_samples)
                    point = Point(snapshot, task.setting, read_outcome(config, task))
                    points.append(point)
                    values = {f"{name}/{point.curve}": m["value"] for name, m in point.outcome.metrics.items()}
                    tracker.metrics(values, step=snapshot.images)
    return points


def _rounds(config: RunEvaluationConfig, passes: PassCosts) -> Iterator[list[tuple[Snapshot, Evaluation]]]:
    """Yield the evaluations of existing snapshots and, with `follow`, of new ones until the training ends."""
    run, done = config.path(config.weights), set[Snapshot]()
    while True:
        is_training = config.follow and Lease(run).is_held()  # checked before listing, so that no snapshot is missed
        new = [snapshot for snapshot in _snapshots(config) if snapshot not in done]
        if new:
            yield [(snapshot, task) for snapshot in new for task in _tasks(config, passes, snapshot)]
            done |= set(new)
        elif not is_training:
            return
        else:
            time.sleep(POLL_SECONDS)


def _snapshots(config: RunEvaluationConfig) -> list[Snapshot]:
    """Return the snapshots to evaluate, oldest first; compute the post-hoc averages that do not exist yet."""
    run = config.path(config.weights)
    selected = [snapshot for snapshot in snapshots(run) if not config.ema or snapshot.average in config.ema]
    positions = sorted({images for images, _, _ in power_snapshots(run)}) if config.sigma_rel else []
    fields: dict[str, Any] = {"store": config.store, "weights": config.weights, "dry_run": config.dry_run}
    averages = [
        _post_hoc(AverageConfig(sigma_rel=sigma_rel, images=images, **fields))
        for images, sigma_rel in itertools.product(positions, config.sigma_rel)
    ]
    return sorted([*selected, *filter(None, averages)])


@cache  # so that an average that cannot be computed is named once, and not in every check for new snapshots
def _post_hoc(requested: AverageConfig) -> Snapshot | None:
    """Return a post-hoc average, which is computed if it does not exist; None if that is impossible.

    A dry run computes no average.
    """
    uri, sigma_rel = average_uri(requested), requested.sigma_rel
    try:
        if not requested.dry_run and not storage.exists(uri):
            average(requested)
    except ValueError as error:
        message = "post-hoc average %g at %d images is skipped, the others continue: %s"
        log.warning(message, sigma_rel, requested.images, error)
        return None
    return Snapshot(requested.images or 0, f"posthoc-{sigma_rel:g}", f"posthoc/{uri.rpartition('/')[2]}")


def _tasks(config: RunEvaluationConfig, passes: PassCosts, snapshot: Snapshot) -> Iterator[Evaluation]:
    """Yield the evaluation of a snapshot at each guidance scale."""
    weights = storage.join(config.weights, "weights", snapshot.name)
    for guidance in config.guidances:
        setting = Setting(weights=weights, sampler=config.sampler, guidance=guidance)
        setting = setting.model_copy(update={"evaluations": passes.evaluations(setting)})
        yield Evaluation(setting, config.num_samples, config.seed)


def _files(config: RunEvaluationConfig) -> dict[str, str]:
    """Return the weights files of classifier and weaker model: those that config.json records, or the newest ones."""
    recorded = noted_files(config.path(config.output))
    paths = [path for path in (config.classifier, config.guidance.weak_weights) if path]
    return {path: weights_file(path, config.path, recorded.get(path)) for path in paths}


def _generation(
    config: RunEvaluationConfig, files: dict[str, str], snapshot: Snapshot
) -> tuple[GenerationConfig, PassCosts]:
    """Return the config that loads a snapshot and its guides, and the cost of a pass of each guide."""
    weights = storage.join(config.weights, "weights", snapshot.name)
    generation = networks_config(config, files, weights, config.guidance.weak_weights)
    guides = {(guidance.kind, guidance.weak_weights) for guidance in config.guidances}
    return generation, pass_costs(guides, generation, files)


def _check_or_write_config(
    config: RunEvaluationConfig, files: dict[str, str], first: Snapshot
) -> tuple[NetworkFacts, tuple[str, ...], PassCosts]:
    """Check or write the config of the output folder; return facts and classes of the networks, and costs of passes.

    Raises:
        ValueError: the networks, the objectives and the extractor do not fit together, or the folder belongs to another
            evaluation or to an earlier training in the same run folder.
    """
    generation, passes = _generation(config, files, first)
    networks = load_networks(generation, "cpu")
    size = networks.weights.architecture.image_size
    loaded = config.extractor_loader(size)(CPU)
    for name in config.objective:
        Objective.parse(name, loaded.network.name)
    fingerprint = {
        "first_snapshot": networks.weights.sha256,
        "classifier": networks.classifier.sha256 if networks.classifier else None,
        "extractor": loaded.fingerprint,
        "numerics_version": NUMERICS_VERSION,
    }
    output = config.path(config.output)
    finished = bool(storage.list_names(storage.join(output, "trials")))
    check_or_write_config(output, config, finished, {"files": files}, **fingerprint)
    facts = NetworkFacts(size, networks.labels.given, loaded.class_mismatch(networks.classes))
    return facts, networks.classes, passes


def plan(config: RunEvaluationConfig) -> tuple[RunEvaluationConfig, str]:
    """Return the config and the text of a dry run: what an evaluation of the existing snapshots would read and cost."""
    existing = _snapshots(config)
    reads = f"reads   {config.path(config.weights)} and {config.path(config.reference)}"
    if not existing:
        return config, f"{reads}\nnot there yet: snapshots of the requested averages"
    files = _files(config)
    generation, passes = _generation(config, files, existing[0])
    model = outline(generation, generation.weights)
    classifier = classifier_outline(generation)
    weak = config.guidance.weak_weights and outline(generation, files[config.guidance.weak_weights])
    guides = {"classifier": classifier, "classifier_free": model, "auto": weak or None}
    lines: list[str] = []
    half = config.dtype != "float32"
    tasks = [task for snapshot in existing for task in _tasks(config, passes, snapshot)]
    for guidance in config.guidances:
        missing = [t for t in tasks if t.setting.guidance == guidance and not storage.exists(record_uri(config, t))]
        guided = generation.model_copy(update={"sampler": config.sampler, "guidance": guidance})
        for cost in costs(guided, config.num_samples * len(missing), model, guides, None):
            lines.append(priced(cost, config.cost, config.num_workers, config.num_gpus, half))
    return config, "\n".join(
        [
            f"{reads}: {len(existing)} snapshots from {existing[0].images:,} to {existing[-1].images:,} images",
            f"writes  {config.path(config.output)}: records, quality.json and pictures; {BEST} in the run's folder",
            *lines,
        ]
    )
