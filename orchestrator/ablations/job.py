"""Ablations: the rows of a table are trained as trials of Ray Tune and evaluated with the same seeds.

Every training is an ordinary run in its own folder, and every evaluation is that of `jobs/evaluate_run.py`. Therefore
the same command continues after an interruption. If a row fails, this is reported, and the other rows continue.
"""

import logging
from functools import partial

import numpy as np

from cluster.session import session
from cluster.tuner import Round, run_rounds
from models.costs import count_parameters
from orchestrator import storage
from orchestrator.ablations.config import AblationsConfig, Replicate, Table
from orchestrator.ablations.page import ablations_page
from orchestrator.ablations.result import BITS, Measured, conclude, table_lines
from orchestrator.closing import print_closing
from orchestrator.config import check_or_write_config
from orchestrator.cost import TRAINING, assumed_mfu, gpu_seconds, money, training_cost
from orchestrator.evaluation.likelihood import estimate
from orchestrator.metrics_log import history
from orchestrator.progress import counted
from orchestrator.run_evaluation.job import evaluate_run
from orchestrator.search.evaluator import read_outcome
from orchestrator.search.halving import Evaluation
from orchestrator.search.space import Setting
from orchestrator.tracking import Tracker, tracked
from orchestrator.training.config import AdmConfig
from orchestrator.training.gradients import memory_of
from orchestrator.training.job import DATA_CPUS, train

FAILURES = (ValueError, RuntimeError, OSError, ArithmeticError)  # errors of a row that do not end the job

log = logging.getLogger(__name__)


def run_ablations(config: AblationsConfig) -> str:
    """Train and evaluate all unfinished rows; return the URI of ablations.json, with ablations.html in the same folder.

    Raises:
        ValueError: the table is not valid, or its fields do not fit the presets.
        RuntimeError: all rows failed.
    """
    table, output = config.read_table(), config.path(config.output)
    replicates = config.replicates(table)
    trainings = _trainings(config, table, replicates)
    for replicate in replicates:  # raises errors in the table before the first training
        config.evaluation(table, *replicate)
        config.likelihood(table, *replicate)
    check_or_write_config(output, config, finished=bool(storage.list_names(storage.join(output, "runs"))))
    cpus = config.num_workers * (config.num_threads + DATA_CPUS)
    with (
        session(cpus and cpus + 1, num_gpus=config.num_workers * config.num_gpus, shared=config.shared),
        tracked("ablations", config, output) as tracker,
    ):
        _train_all(config, trainings)
        failed, measured = dict[str, str](), list[Measured]()
        for number, replicate in enumerate(replicates, 1):
            print(f"{replicate}: evaluation {number} of {len(replicates)}", flush=True)
            reason = _failure(config, config.training(table, *replicate))
            try:
                if not reason:
                    measured.append(_measure(config, table, replicate))
                    _track(measured[-1], tracker)
            except FAILURES as error:
                reason = f"{type(error).__name__}: {error}"
            if reason:
                failed[str(replicate)] = reason
                log.warning("%s failed, the other rows continue: %s", replicate, reason)
        result = {"table": table.model_dump(mode="json"), **conclude(table.compared_with(), measured, failed)}
        page, picture = ablations_page(result)
        storage.write_bytes(storage.join(output, "ablations.png"), picture)
        tracker.picture("ablations.png", picture)
        storage.write_bytes(storage.join(output, "ablations.html"), page.encode())
        tracker.record("ablations.html", page)
        tracker.record("ablations.json", result)
    uri = storage.join(output, "ablations.json")
    storage.write_json(uri, result)
    print("\n".join(table_lines(result)))
    print_closing([storage.join(output, "ablations.html"), uri], [])
    return uri


# ------------------------------------------------------------------------------------------------ trainings


def _trainings(config: AblationsConfig, table: Table, replicates: list[Replicate]) -> dict[str, AdmConfig]:
    """Return the trainings of the table by the name of their folder; rows may share one."""
    trainings = (config.training(table, *replicate) for replicate in replicates)
    return {training.output.rpartition("/")[2]: training for training in trainings}


def _train_all(config: AblationsConfig, trainings: dict[str, AdmConfig]) -> None:
    """Run all trainings, `together` at a time; print the result of each."""

    def on_done(training: AdmConfig) -> None:
        reason = _failure(config, training)
        print(f"{training.output}: {f'failed: {reason}' if reason else 'trained'}", flush=True)

    print(f"{counted(len(trainings), 'training')}, up to {config.together} at once", flush=True)
    rounds = iter([Round(list(trainings.items()), [])])
    run_rounds(partial(_train, config), rounds, config.together if config.num_workers else 0, on_done)


def _train(config: AblationsConfig, training: AdmConfig) -> dict[str, float]:
    """Run a training; if it fails, write a file with the reason, which the next attempt removes."""
    uri = _failure_uri(config, training)
    if storage.exists(uri):
        storage.delete(uri)
    try:
        train(training)
    except FAILURES as error:
        storage.write_json(uri, {"failed": f"{type(error).__name__}: {error}"})
    return {"images": float(training.length)}


def _failure_uri(config: AblationsConfig, training: AdmConfig) -> str:
    return storage.join(config.path(config.output), "failures", f"{training.output.rpartition('/')[2]}.json")


def _failure(config: AblationsConfig, training: AdmConfig) -> str:
    """Return why a training failed, or ""."""
    uri = _failure_uri(config, training)
    return storage.read_json(uri)["failed"] if storage.exists(uri) else ""


# ------------------------------------------------------------------------------------------------ evaluations


def _measure(config: AblationsConfig, table: Table, replicate: Replicate) -> Measured:
    """Evaluate the run of a replicate, and return the results of its last snapshot."""
    training, evaluation = config.training(table, *replicate), config.evaluation(table, *replicate)
    quality = storage.read_json(evaluate_run(evaluation))
    last = max(quality["points"], key=lambda point: (point["images"], point["average"]))
    task = Evaluation(Setting(**last["setting"]), evaluation.num_samples, evaluation.seed)
    outcome = read_outcome(evaluation, task)
    values = dict(last["objective"])
    if likelihood := config.likelihood(table, *replicate):
        values[BITS] = storage.read_json(estimate(likelihood))["bits_per_dim"]
    rates = [rate for _, rate in history(config.path(training.output), "images_per_second")]
    seconds = training.length / float(np.median(rates)) if rates else None
    return Measured(
        replicate.row, replicate.seed, quality, last, values, outcome.scores, outcome.strata,
        hours=seconds and seconds * max(config.num_workers, 1) / 3600,
        parameters=count_parameters(training.model),
    )  # fmt: skip


def _track(measured: Measured, tracker: Tracker) -> None:
    """Log a replicate as a child run: its objectives along the training, and bits/dim."""
    points = [point for point in measured.quality["points"] if point["curve"] == measured.last["curve"]]
    history = {p["images"]: {name: metric["value"] for name, metric in p["objective"].items()} for p in points}
    history[measured.last["images"]] = {name: metric["value"] for name, metric in measured.values.items()}
    tracker.child(f"{measured.row}, seed {measured.seed}", {"row": measured.row, "seed": measured.seed}, history)


def plan(config: AblationsConfig) -> tuple[AblationsConfig, str]:
    """Return the config and the text of a dry run: what the table would train, write and cost."""
    table, workers, hours = config.read_table(), max(config.num_workers, 1), 0.0
    replicates = config.replicates(table)
    trainings = _trainings(config, table, replicates)
    lines = [f"writes  {config.path(config.output)}: {len(trainings)} trainings, {len(replicates)} evaluations"]
    for name, training in trainings.items():
        cost = training_cost(training.model, training.length, memory_of(training, training.model, workers))
        gpu_hours = gpu_seconds(cost, config.cost, training.dtype != "float32") / 3600
        time = f"{gpu_hours:,.3g} {config.cost.gpu}-hours" if config.num_gpus else f"{cost.flops:.3g} FLOPs"
        size = f"{count_parameters(training.model):,} parameters, {training.length:,} images"
        lines.append(f"trains  {name}: {size}, {time}")
        hours += gpu_hours
    samples = sum(config.evaluation(table, *replicate).num_samples for replicate in replicates)
    lines.append(f"samples {samples:,} for each snapshot, over all runs")
    if config.num_gpus:
        mfu = assumed_mfu(config.cost, TRAINING)
        lines += [f"time    {hours:,.3g} {config.cost.gpu}-hours for all trainings", *money(hours, config.cost)]
        lines.append(f"assumed {mfu.share:.0%} of the peak FLOPS ({mfu.source})")
    else:
        lines.append("time    not estimated for CPUs; --num-gpus 1 estimates it for GPUs")
    return config, "\n".join(lines)
