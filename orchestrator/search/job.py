"""Search: which guidance scale, how many steps, which sampler; trials race on the same labels and noise."""

from collections.abc import Generator
from functools import partial
from typing import Any

from cluster.session import session
from cluster.tuner import run_rounds
from cluster.workers import pool
from orchestrator import storage
from orchestrator.config import check_or_write_config
from orchestrator.cost import GUIDED_SAMPLING, CostConfig
from orchestrator.generation.cost import outline
from orchestrator.generation.sampling import NUMERICS_VERSION, Networks, load_networks
from orchestrator.search.config import Limit, SearchConfig, space_of
from orchestrator.search.cost import Costs, expected_costs
from orchestrator.search.evaluator import make_worker, read_outcome, record_uri, reference_of, run_heat, samples_picture
from orchestrator.search.halving import Heat, Outcome, Race, Rules
from orchestrator.search.objectives import EVALUATIONS, Objective
from orchestrator.search.pictures import write_pictures
from orchestrator.search.result import conclude, summary
from orchestrator.search.space import Proposer, Space
from orchestrator.tracking import Tracker, tracked

# ------------------------------------------------------------------------------------------------ in the driver


def search(config: SearchConfig) -> str:
    """Race the settings that have no record yet, go on with those that have; answer the URI of search.json.

    Raises:
        ValueError: networks, reference, space and output folder do not fit each other.
        RuntimeError: no trial came to an end, or the cluster failed.
    """
    output = config.path(config.output)
    networks = {path: load_networks(config.generation(path, config.seed), "cpu") for path in config.weights}
    space = space_of(config, min(found.weights.diffusion.num_timesteps for found in networks.values()))
    image_size = _check_or_write_config(config, networks)
    answer_uri = storage.join(output, "search.json")
    if storage.exists(answer_uri):
        answer = storage.read_json(answer_uri)
        if not answer["stopped_by_budget"] or answer["budget"] == config.budget:
            print(f"{output} is complete:\n{summary(answer)}")
            return answer_uri
    cpus = config.num_workers and config.num_workers + 1  # one for the trials, which wait and measure
    with session(cpus, shared=config.shared), tracked("search", config, output) as tracker:
        _, extractor = reference_of(config, image_size, config.num_workers)
        race, costs = _start(config, space)
        with pool(partial(make_worker, config), config.num_workers, num_gpus=config.num_gpus) as workers:
            rounds = _recorded(config, race, tracker)
            run_rounds(partial(run_heat, config, workers, image_size), rounds, _together(config))
        answer = conclude(config, race, costs)
        write_pictures(config, answer, extractor, tracker)
        tracker.record("search.json", answer)
        winner = answer["winner"]["setting"]
        tracker.metrics({f"winner_{name}": v for name, v in winner.items() if isinstance(v, int | float)})
    storage.write_bytes(answer_uri, storage.json_bytes(answer))
    print(summary(answer))
    print(answer_uri)
    return answer_uri


def _check_or_write_config(config: SearchConfig, networks: dict[str, Networks]) -> int:
    """Hold the output folder to this search, or claim it; answer the images' size in pixels.

    Raises:
        ValueError: the networks, or the objectives and the extractor, do not fit each other; or it is another search's.
    """
    first = networks[config.weights[0]]
    size = first.weights.architecture.image_size
    for path, found in networks.items():
        if found.weights.architecture.image_size != size:
            raise ValueError(f"weights={path} makes other images than {config.weights[0]}, which has {size} pixels")
    loaded = config.extractor_loader(size)()
    for name in config.objective:
        Objective.parse(name, loaded.network.name)
    facts = {
        "weights": {path: found.weights.sha256 for path, found in networks.items()},
        "classifier": first.classifier.sha256 if first.classifier else None,
        "extractor": loaded.fingerprint,
        "numerics_version": NUMERICS_VERSION,
    }
    # With a larger budget the search goes on where it stopped with a smaller one.
    bound = config.model_copy(update={"budget": None, "cost": CostConfig()})
    check_or_write_config(config.path(config.output), bound, **facts)
    return size


def _start(config: SearchConfig, space: Space) -> tuple[Race, Costs]:
    """A race at its start line, and its books."""
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
    costs = Costs(Limit.parse(config.budget), config.batch_size, config.rungs[-1])
    proposals = Proposer(space, config.seed, len(config.objective), config.round_size)
    return Race(rules, proposals, costs), costs


def _together(config: SearchConfig) -> int:
    """Trials at once: enough that the batches of a first rung keep all workers busy, and one to measure meanwhile."""
    return config.num_workers and -(-config.num_workers * config.batch_size // config.rungs[0]) + 1


def _recorded(config: SearchConfig, race: Race, tracker: Tracker) -> Generator[list[Heat], list[str | None], None]:
    """The race's heats that have no record; all outcomes are read from records, whoever made them and when."""
    run = race.run()
    heats: list[Heat] | None = next(run, None)
    while heats:
        yield [heat for heat in heats if not storage.exists(record_uri(config, heat))]
        outcomes = [read_outcome(config, heat) for heat in heats]
        done, heats = heats, _after(run, outcomes)
        _report(config, race, done, tracker)


def _after(run: Generator[list[Heat], list[Outcome], None], outcomes: list[Outcome]) -> list[Heat] | None:
    """The next heats of a race; None at its end."""
    try:
        return run.send(outcomes)
    except StopIteration:
        return None


def _report(config: SearchConfig, race: Race, heats: list[Heat], tracker: Tracker) -> None:
    """A line on the terminal, and each trial's own MLflow run."""
    drawn = {heat.setting for heat in heats}
    trials = [trial for trial in race.trials if trial.setting in drawn]
    for trial in trials:
        history = {n: _flat(outcome.metrics) for n, outcome in zip(config.rungs, trial.outcomes, strict=False)}
        for n, numbers in history.items():
            numbers["samples"], numbers["evaluations_drawn"] = n, n * trial.setting.evaluations
        picture = None if trial.failed else samples_picture(config, trial.setting)
        tracker.child(trial.setting.name, trial.setting.model_dump(mode="json"), history, picture)
    stopped = sum(trial.stopped is not None for trial in trials)
    failed = sum(trial.failed is not None for trial in trials)
    what = "on fresh seeds" if heats[0].seed == config.fresh_seed else f"{stopped} stopped"
    print(f"n={heats[0].n:<6} {len(heats):3} trials, {what}" + (f", {failed} failed" if failed else ""), flush=True)


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
    between = ", and any scale between" if config.space.continuous else ""
    return "\n".join(
        [
            f"reads   {', '.join(inputs)}",
            f"writes  {config.path(config.output)}: features and records of each trial, search.json, pictures",
            f"tries   up to {config.trials} settings of a grid of {len(space.grid())}{between}",
            f"work    expected  {likely}",
            f"        at worst  {worst}",
            f"assumed {config.cost.utilization or GUIDED_SAMPLING.share:.0%} of an {config.cost.card}'s peak "
            f"({'--cost.mfu' if config.cost.utilization else GUIDED_SAMPLING.source})",
        ]
    )
