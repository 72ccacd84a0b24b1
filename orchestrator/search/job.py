"""Search: which guidance scale, how many steps, which sampler; all trials draw the same labels and noise."""

from collections.abc import Generator
from functools import partial
from typing import Any

from cluster.session import session
from cluster.tuner import run_rounds
from cluster.workers import pool
from orchestrator import storage
from orchestrator.config import check_or_write_config, noted_files
from orchestrator.cost import GUIDED_SAMPLING, assumed_mfu
from orchestrator.evaluation.extractors import CPU
from orchestrator.generation.cost import outline
from orchestrator.generation.sampling import NUMERICS_VERSION, Networks, load_networks
from orchestrator.search.config import Limit, SearchConfig, space_of
from orchestrator.search.cost import SampleBudget, expected_costs
from orchestrator.search.evaluator import (
    evaluate,
    make_worker,
    read_outcome,
    record_uri,
    reference_of,
    sampled_by,
    samples_picture,
)
from orchestrator.search.halving import Evaluation, Outcome, Rules, SuccessiveHalving
from orchestrator.search.objectives import EVALUATIONS, Objective
from orchestrator.search.pictures import write_pictures
from orchestrator.search.result import conclude, summary
from orchestrator.search.space import Proposer, Space
from orchestrator.tracking import Tracker, catch_up, tracked
from orchestrator.weights.network import weights_file

# ------------------------------------------------------------------------------------------------ in the driver


def search(config: SearchConfig) -> str:
    """Evaluate the settings that have no record yet, go on with those that have, and return the URI of search.json.

    Raises:
        ValueError: networks, reference, space and output folder do not fit each other.
        RuntimeError: no trial came to an end, or the cluster failed.
    """
    output = config.path(config.output)
    files = _files(config)
    networks = {path: load_networks(sampled_by(config, files, path), "cpu") for path in config.weights}
    space = space_of(config, min(found.weights.diffusion.num_timesteps for found in networks.values()))
    image_size = _check_or_write_config(config, files, networks)
    result_uri = storage.join(output, "search.json")
    if storage.exists(result_uri):
        result = storage.read_json(result_uri)
        if not result["stopped_by_budget"] or result["budget"] == config.budget:
            print(f"{output} is complete:\n{summary(result)}")
            catch_up("search", config, output)
            return result_uri
    cpus = (
        config.num_workers and config.num_workers * config.num_threads + 1
    )  # one for the trials, which wait and measure
    with session(cpus, shared=config.shared), tracked("search", config, output) as tracker:
        _, extractor = reference_of(config, image_size, config.num_workers)
        halving, budget = _start(config, space)
        with pool(partial(make_worker, config), config.num_workers, config.num_threads, config.num_gpus) as workers:
            rounds = _recorded(config, halving, tracker)
            run_rounds(partial(evaluate, config, workers, image_size), rounds, _together(config))
        result = conclude(config, halving, budget)
        write_pictures(config, result, extractor, tracker)
        tracker.record("search.json", result)
        winner = result["winner"]["setting"]
        tracker.metrics({f"winner_{name}": v for name, v in winner.items() if isinstance(v, int | float)})
    storage.write_bytes(result_uri, storage.json_bytes(result))
    print(summary(result))
    print(result_uri)
    return result_uri


def _files(config: SearchConfig) -> dict[str, str]:
    """Return the file of weights for each path: that of the first attempt, which config.json notes, or the newest."""
    noted = noted_files(config.path(config.output))
    paths = [*config.weights, *([config.classifier] if config.classifier else [])]
    return {path: weights_file(path, config.path, noted.get(path)) for path in paths}


def _check_or_write_config(config: SearchConfig, files: dict[str, str], networks: dict[str, Networks]) -> int:
    """Check or write the config of the output folder; return the images' size in pixels.

    Raises:
        ValueError: the networks, or the objectives and the extractor, do not fit each other; or it is another search's.
    """
    first = networks[config.weights[0]]
    size = first.weights.architecture.image_size
    for path, found in networks.items():
        if found.weights.architecture.image_size != size:
            raise ValueError(f"weights={path} makes other images than {config.weights[0]}, which has {size} pixels")
    loaded = config.extractor_loader(size)(CPU)
    for name in config.objective:
        Objective.parse(name, loaded.network.name)
    facts = {
        "weights": {path: found.weights.sha256 for path, found in networks.items()},
        "classifier": first.classifier.sha256 if first.classifier else None,
        "extractor": loaded.fingerprint,
        "numerics_version": NUMERICS_VERSION,
    }
    check_or_write_config(config.path(config.output), config, files, **facts)
    return size


def _start(config: SearchConfig, space: Space) -> tuple[SuccessiveHalving, SampleBudget]:
    """Return the search at its start, and its budget."""
    bounds, exact = config.bounds, tuple(name == EVALUATIONS for name in config.objective)
    rules = Rules(
        rungs=config.rungs,
        trials=config.trials,
        round_size=config.round_size,
        finalists=config.finalists,
        alpha=config.alpha,
        tolerance=config.tolerance,
        seed=config.seed,
        fresh_seed=config.fresh_seed,
        exact=exact,
        violation=lambda metrics, surely: max((c.violation(metrics, surely) for c in bounds), default=0.0),
    )
    budget = SampleBudget(Limit.parse(config.budget), config.batch_size, config.rungs[-1])
    proposals = Proposer(space, config.seed, len(config.objective), config.round_size)
    return SuccessiveHalving(rules, proposals, budget), budget


def _together(config: SearchConfig) -> int:
    """Trials at once: enough that the batches of a first rung keep all workers busy, and one to measure meanwhile."""
    return config.num_workers and -(-config.num_workers * config.batch_size // config.rungs[0]) + 1


def _recorded(
    config: SearchConfig, halving: SuccessiveHalving, tracker: Tracker
) -> Generator[list[Evaluation], list[str | None], None]:
    """Yield the evaluations that have no record; all outcomes are read from records, whoever made them and when."""
    run = halving.run()
    tasks: list[Evaluation] | None = next(run, None)
    while tasks:
        yield [task for task in tasks if not storage.exists(record_uri(config, task))]
        outcomes = [read_outcome(config, task) for task in tasks]
        done, tasks = tasks, _after(run, outcomes)
        _report(config, halving, done, tracker)


def _after(run: Generator[list[Evaluation], list[Outcome], None], outcomes: list[Outcome]) -> list[Evaluation] | None:
    """Return the next evaluations; None at the end."""
    try:
        return run.send(outcomes)
    except StopIteration:
        return None


def _report(config: SearchConfig, halving: SuccessiveHalving, tasks: list[Evaluation], tracker: Tracker) -> None:
    """A line on the terminal, and each trial's own MLflow run."""
    drawn = {task.setting for task in tasks}
    trials = [trial for trial in halving.trials if trial.setting in drawn]
    for trial in trials:
        history = {n: _flat(outcome.metrics) for n, outcome in zip(config.rungs, trial.outcomes, strict=False)}
        for n, numbers in history.items():
            numbers["samples"], numbers["evaluations_drawn"] = n, n * trial.setting.evaluations
        picture = None if trial.failed else samples_picture(config, trial.setting)
        tracker.child(trial.setting.name, trial.setting.model_dump(mode="json"), history, picture)
    stopped = sum(trial.stopped is not None for trial in trials)
    failed = sum(trial.failed is not None for trial in trials)
    what = "on fresh seeds" if tasks[0].seed == config.fresh_seed else f"{stopped} stopped"
    print(f"n={tasks[0].n:<6} {len(tasks):3} trials, {what}" + (f", {failed} failed" if failed else ""), flush=True)


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    """Values and, where there is one, both ends of the interval."""
    found = {name: metric["value"] for name, metric in metrics.items()}
    for end, name_of_end in enumerate(("low", "high")):
        found |= {f"{n}_{name_of_end}": m["interval"][end] for n, m in metrics.items() if m["interval"]}
    return found


def plan(config: SearchConfig) -> str:
    """What a search would read, write and cost."""
    networks = [outline(config.generation(path, config.seed), path) for path in config.weights]
    guide = outline(config.generation(config.weights[0], config.seed), config.classifier) if config.classifier else None
    num_timesteps = min(network.num_timesteps for network in networks)
    space = space_of(config, num_timesteps)
    classifier = guide.architecture if guide else None
    worst, likely = expected_costs(config, space.grid(), num_timesteps, networks[0].architecture, classifier)
    inputs = [network.uri for network in networks] + ([guide.uri] if guide else []) + [config.path(config.reference)]
    mfu = assumed_mfu(config.cost, GUIDED_SAMPLING)
    between = ", and any scale between" if config.space.continuous else ""
    return "\n".join(
        [
            f"reads   {', '.join(inputs)}",
            f"writes  {config.path(config.output)}: features and records of each trial, search.json, pictures",
            f"tries   up to {config.trials} settings of a grid of {len(space.grid())}{between}",
            f"work    expected  {likely}",
            f"        at worst  {worst}",
            f"assumed {mfu.share:.0%} of an {config.cost.gpu}'s peak ({mfu.source})",
        ]
    )
