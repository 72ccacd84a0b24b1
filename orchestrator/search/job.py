"""The search for the best guidance, number of steps and sampler; all trials use the same labels and noise."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from cluster import tuner
from cluster.relay import item_progress
from cluster.session import session
from cluster.tuner import run_rounds
from cluster.workers import pool
from models.costs import forward_multiply_adds, guidance_multiply_adds
from orchestrator import storage
from orchestrator.closing import next_command, print_closing
from orchestrator.config import check_config, check_or_write_config, noted_files, read_config
from orchestrator.cost import GUIDED_SAMPLING, assumed_mfu, money, not_there_yet
from orchestrator.evaluation.extractors import CPU, extractor_name
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.cost import Trained, absent_weights, outline
from orchestrator.generation.sampling import NUMERICS_VERSION, Networks, load_networks
from orchestrator.progress import Progress, progress_line
from orchestrator.search.config import Limit, SearchConfig, space_of
from orchestrator.search.cost import Clock, SampleBudget, full_evaluations, max_work
from orchestrator.search.evaluator import (
    NetworkFacts,
    class_mismatch,
    evaluate,
    make_worker,
    networks_config,
    read_outcome,
    record_uri,
    reference_of,
    samples_picture,
)
from orchestrator.search.halving import Evaluation, Proposals, SuccessiveHalving
from orchestrator.search.objectives import Objective
from orchestrator.search.page import search_page
from orchestrator.search.pictures import write_pictures
from orchestrator.search.result import conclude, summary
from orchestrator.search.space import GridProposals, Guide, OptunaProposals, PassCosts, Space
from orchestrator.tracking import Tracker, catch_up, tracked
from orchestrator.weights.imported import import_classifier, is_imported
from orchestrator.weights.network import weights_file

# ------------------------------------------------------------------------------------------------ in the driver


def search(config: SearchConfig) -> str:
    """Run a search, or resume it from its records, and return the URI of search.json.

    Raises:
        ValueError: networks, reference, space and output folder do not fit each other.
        RuntimeError: no trial was evaluated to the end, or the cluster failed.
    """
    output = config.path(config.output)
    files = _files(config)
    networks = _load_networks(config, files)
    generation = networks_config(config, files, config.weights[0])
    space = space_of(config, pass_costs(config.space.guides, generation, files))
    facts = _check_or_write_config(config, files, networks)
    result_uri = storage.join(output, "search.json")
    if storage.exists(result_uri):
        result = storage.read_json(result_uri)
        if not result["stopped_by_budget"] or result["budget"] == config.budget:
            print(f"{output} is complete:\n{summary(result)}")
            catch_up("search", config, output)
            return result_uri
    cpus = config.num_workers and config.num_workers * config.num_threads + 1  # one CPU measures the trials
    gpus = config.num_workers * config.num_gpus
    with session(cpus, num_gpus=gpus, shared=config.shared), tracked("search", config, output) as tracker:
        reference, extractor = reference_of(config, facts.image_size, config.num_workers)
        mismatch = class_mismatch(networks[config.weights[0]].classes, reference)
        facts = facts._replace(class_mismatch=mismatch or facts.class_mismatch)
        halving, budget, clock = _new_search(config, space)
        with pool(partial(make_worker, config), config.num_workers, config.num_threads, config.num_gpus) as workers:
            rounds = _Rounds(config, halving, budget, clock, tracker)
            with item_progress(rounds.on_drawn, config.num_workers) as report:
                evaluate_task = partial(evaluate, config, workers, facts, report=report)
                run_rounds(evaluate_task, rounds.run(), _max_concurrent(config), rounds.on_done)
        result = conclude(config, halving, budget)
        command = next_command("generate_samples", from_search=config.output)
        page = search_page(result, write_pictures(config, result, extractor, tracker), command)
        storage.write_bytes(storage.join(output, "report.html"), page.encode())
        tracker.record("report.html", page)
        tracker.record("search.json", result)
        winner = result["winner"]["setting"]
        tracker.metrics({f"winner_{name}": v for name, v in winner.items() if isinstance(v, int | float)})
    storage.write_bytes(result_uri, storage.json_bytes(result))
    print(summary(result))
    print_closing([storage.join(output, "report.html"), result_uri], [command])
    return result_uri


def _load_networks(config: SearchConfig, files: dict[str, str]) -> dict[str, Networks]:
    """Load each diffusion model with its classifier, and check that each weaker model fits them."""
    for weak in config.space.weak_weights:
        for path in config.weights:
            load_networks(networks_config(config, files, path, weak), "cpu")
    return {path: load_networks(networks_config(config, files, path), "cpu") for path in config.weights}


def pass_costs(
    guides: Iterable[Guide],
    generation: GenerationConfig,
    files: dict[str, str] | None = None,
    trained: Trained | None = None,
) -> PassCosts:
    """Return the cost of a pass of each guide, in passes of the generation's model.

    files: weights files by path.
    trained: see `plan`.
    """
    model = outline(generation, generation.weights, None, trained)
    model_cost = forward_multiply_adds(model.architecture)
    paths = {"classifier": generation.classifier, "classifier_free": generation.weights}
    ratios = {}
    for kind, weak in guides:
        path = (files or {}).get(weak, weak) if weak else paths.get(kind)
        if path is None:
            continue
        if is_imported(path):
            size = model.architecture.image_size
            guide_cost = import_classifier(path, model.architecture.in_channels, size, "cpu").multiply_adds
        else:
            guide_cost = guidance_multiply_adds(outline(generation, path, None, trained).architecture)
        ratios[kind, weak] = guide_cost / model_cost
    return PassCosts(model.diffusion, ratios)


def _files(config: SearchConfig) -> dict[str, str]:
    """Return the weights file for each path: the one that config.json records, or the newest one."""
    recorded = noted_files(config.path(config.output))
    return {path: weights_file(path, config.path, recorded.get(path)) for path in _paths(config)}


def _paths(config: SearchConfig) -> list[str]:
    return [*config.weights, *config.space.weak_weights, *([config.classifier] if config.classifier else [])]


def _check_or_write_config(config: SearchConfig, files: dict[str, str], networks: dict[str, Networks]) -> NetworkFacts:
    """Check or write the config of the output folder; return what trials need to know about the networks.

    Raises:
        ValueError: the networks, or the objectives and the extractor, do not fit each other, or the folder belongs to
            another search.
    """
    size, first = _image_size(config, networks), networks[config.weights[0]]
    loaded = config.extractor_loader(size)(CPU)
    _check_objectives(config, loaded.network.name)
    output = config.path(config.output)
    fingerprint = _fingerprint(networks) | {"extractor": loaded.fingerprint}
    check_or_write_config(output, config, _has_trials(output), {"files": files}, **fingerprint)
    return NetworkFacts(size, first.labels.given, loaded.class_mismatch(first.classes))


def _has_trials(output: str) -> bool:
    return bool(storage.list_names(storage.join(output, "trials")))


def _fingerprint(networks: dict[str, Networks]) -> dict[str, Any]:
    """Return the fingerprint of the networks, which must be the same in all attempts in a folder."""
    first = next(iter(networks.values()))
    return {
        "weights": {path: loaded.weights.sha256 for path, loaded in networks.items()},
        "classifier": first.classifier.sha256 if first.classifier else None,
        "numerics_version": NUMERICS_VERSION,
    }


def _image_size(config: SearchConfig, networks: dict[str, Networks]) -> int:
    """Return the image size in pixels; raise ValueError if the diffusion models generate images of different sizes."""
    size = networks[config.weights[0]].weights.architecture.image_size
    for path, loaded in networks.items():
        if loaded.weights.architecture.image_size != size:
            raise ValueError(
                f"--weights {path} generates images of {loaded.weights.architecture.image_size} pixels, and "
                f"{config.weights[0]} of {size}; pass models of one image size"
            )
    return size


def _check_objectives(config: SearchConfig, extractor: str) -> None:
    """Raise ValueError if a search cannot compare trials by an objective or a constraint."""
    for name in (*config.objective, *(bound.metric for bound in config.bounds)):
        Objective.parse(name, extractor)


def _new_search(config: SearchConfig, space: Space) -> tuple[SuccessiveHalving, SampleBudget, Clock]:
    """Return a new search, its budget, and the clock of the budget."""
    grid = space.grid()
    proposals: Proposals
    if config.proposes_grid(grid):
        proposals = GridProposals(grid, config.proxy)
    else:
        proposals = OptunaProposals(space, config.seed, len(config.objective), config.round_size)
    clock = Clock(storage.join(config.path(config.output), "clock.json"))
    budget = SampleBudget(Limit.parse(config.budget), config.batch_size, full_evaluations(config, grid), clock)
    outcome_of = partial(read_outcome, config)
    return SuccessiveHalving(config, config.num_trials(grid), proposals, budget, outcome_of), budget, clock


def _max_concurrent(config: SearchConfig) -> int:
    """Return how many trials run at once: enough to keep all workers busy at the first rung while one is measured."""
    return config.num_workers and -(-config.num_workers * config.batch_size // config.rungs[0]) + 1


class _Rounds:
    """The rounds of a search for Ray Tune, without evaluations that have a record; shows and logs their progress."""

    def __init__(
        self, config: SearchConfig, halving: SuccessiveHalving, budget: SampleBudget, clock: Clock, tracker: Tracker
    ) -> None:
        self._config, self._halving, self._budget, self._clock, self._tracker = config, halving, budget, clock, tracker
        self._progress: Progress | None = None

    def run(self) -> Iterator[tuner.Round[Evaluation]]:
        """Yield the evaluations that have no record; the search reads all outcomes from records."""
        previous: list[Evaluation] = []  # its outcomes are known when the next round is requested
        for current in self._halving.run():
            self._track(previous)
            previous = current.tasks
            print(current.description, flush=True)
            missing = [task for task in current.tasks if not storage.exists(record_uri(self._config, task))]
            settings = {task.setting for task in current.tasks}
            stopped = [t.setting.name for t in self._halving.trials if not t.is_running and t.setting not in settings]
            with progress_line(sum(map(self._budget.new_samples, missing)), "samples") as self._progress:
                yield tuner.Round([(task.setting.name, task) for task in missing], stopped)
        self._track(previous)

    def on_drawn(self, task: Evaluation, count: int) -> None:
        """Show that `count` samples of an evaluation are drawn."""
        if self._progress is not None:
            self._progress.update_item(task, count)

    def on_done(self, task: Evaluation) -> None:
        """Show the progress and save the clock after an evaluation."""
        self._clock.save()
        if self._progress is not None:
            self._progress.finish_item(task, self._budget.new_samples(task))

    def _track(self, tasks: list[Evaluation]) -> None:
        """Log the trials of a round, each to its own MLflow run."""
        settings = {task.setting for task in tasks}
        for trial in self._halving.trials:
            if trial.setting not in settings:
                continue
            history = {}
            for n, outcome in zip(self._config.rungs, trial.outcomes, strict=False):
                drawn: dict[str, float] = {"samples": n, "evaluations_drawn": n * trial.setting.evaluations}
                history[n] = _flatten_metrics(outcome.metrics) | drawn
            picture = None if trial.failed else samples_picture(self._config, trial.setting)
            self._tracker.child(trial.setting.name, trial.setting.model_dump(mode="json"), history, picture)


def _flatten_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the values as NAME, and the ends of the intervals as NAME_low and NAME_high."""
    values = {name: metric["value"] for name, metric in metrics.items()}
    for name, metric in metrics.items():
        if metric["interval"]:
            values[f"{name}_low"], values[f"{name}_high"] = metric["interval"]
    return values


def plan(config: SearchConfig, trained: Trained | None = None) -> tuple[SearchConfig, str]:
    """Return the config and the text of a dry run: what a search would read, write and cost.

    trained: the networks that trainings will write, for weights that do not exist yet.

    Raises:
        ValueError: `search` would refuse the config before it starts.
    """
    _check_objectives(config, extractor_name(config.extractor))
    paths, reference = _paths(config), config.path(config.reference)
    absent = absent_weights(config, paths)
    if not absent:
        networks, output = _load_networks(config, _files(config)), config.path(config.output)
        _image_size(config, networks)
        extractor = read_config(output).get("extractor")  # not loaded here, because it may have to be trained first
        check_config(output, config, _has_trials(output), **_fingerprint(networks), extractor=extractor)
    if not storage.exists(reference):
        absent.append(reference)
    lines = [
        f"reads   {', '.join([*map(config.path, paths), reference])}",
        f"writes  {config.path(config.output)}: records of each trial, search.json, report.html, pictures",
    ]
    try:
        lines += _cost_lines(config, trained)
    except FileNotFoundError:
        lines.append("cost    unknown until the weights exist")
    return config, "\n".join([*lines, *not_there_yet(absent)])


def _cost_lines(config: SearchConfig, trained: Trained | None) -> list[str]:
    """Return the lines of a dry run about how many settings are tried, and what they cost."""
    generation = config.generation(config.weights[0], config.seed)
    space = space_of(config, pass_costs(config.space.guides, generation, trained=trained))
    model = outline(generation, config.weights[0], None, trained).architecture
    samples, evaluations, gpu_hours = max_work(config, space.grid(), model)
    work = f"{samples:,.0f} samples, {evaluations:,.0f} network evaluations"
    between = ", and any scale between" if config.space.has_scales_between else ""
    limit = f", or {config.budget}" if Limit.parse(config.budget).unit == "h" else ""
    lines = [f"tries   up to {config.num_trials(space.grid())} settings of a grid of {len(space.grid())}{between}"]
    if not config.num_gpus:
        return [*lines, f"work    at most {work}{limit}; not estimated for CPUs, --num-gpus 1 prices it on GPUs"]
    mfu = assumed_mfu(config.cost, GUIDED_SAMPLING)
    return [
        *lines,
        f"work    at most {work}, {gpu_hours:,.3g} GPU-hours{limit}",
        *money(gpu_hours, config.cost),
        f"assumed {mfu.share:.0%} of an {config.cost.gpu}'s peak ({mfu.source})",
    ]
