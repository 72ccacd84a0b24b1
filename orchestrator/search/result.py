"""The result of a search as JSON and as text: the winner, the Pareto front, and all trials with their intervals."""

from typing import Any

import numpy as np

from models.metrics import Estimate
from models.paired_tests import differences, front, interval
from orchestrator.evaluation.metrics import describe
from orchestrator.search.config import SearchConfig, TrialsConfig
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Outcome, SuccessiveHalving, Trial
from orchestrator.search.objectives import EVALUATIONS, sign_of
from orchestrator.search.space import Setting

SUMMARY_TRIALS = 8  # trials that the summary lists besides the winner
FAILED = "failed"  # status of a trial that failed at a later rung or on the fresh seeds

Json = dict[str, Any]


def conclude(config: SearchConfig, halving: SuccessiveHalving, budget: SampleBudget) -> Json:
    """Return the content of search.json.

    Raises:
        RuntimeError: no trial was evaluated on fresh seeds.
    """
    failed = {label(trial.setting, len(config.weights) > 1): trial.failed for trial in halving.trials if trial.failed}
    finalists = [trial for trial in halving.finalists if not trial.failed]
    if not finalists:
        reason = failed or (
            "no trial satisfies the constraints, or the budget is too small; relax --constraints or raise --budget"
        )
        raise RuntimeError(f"the search has no winner, since no trial was evaluated on fresh seeds: {reason}")
    winner = finalists[0]
    trials = [_describe_trial(config, halving, trial, winner, budget) for trial in halving.trials if trial.outcomes]
    return {
        "objective": list(config.objective),
        "constraints": list(config.constraints),
        "classifier": config.classifier,
        "winner": _describe_finalist(config, winner, winner) | {"chosen_at_n": config.rungs[winner.level]},
        "finalists": [_describe_finalist(config, trial, winner) for trial in finalists],
        "front": pareto(front_names(config), [t for t in trials if t["keeps_constraints"] and t["status"] != FAILED]),
        "trials": trials,
        "failed": failed,
        "samples": budget.samples,
        "evaluations": budget.evaluations(),
        "final_evaluations": budget.evaluations(config.fresh_seed),
        "seeds": {"search": config.seed, "final": config.fresh_seed},
        "alpha": config.alpha,
        "budget": config.budget,
        "stopped_by_budget": halving.stopped_by_budget,
    }


def _describe_finalist(config: SearchConfig, trial: Trial, winner: Trial) -> Json:
    """Return a finalist as search.json shows it, with the metrics of its fresh samples only."""
    assert trial.final is not None and winner.final is not None
    n = config.rungs[-1]
    return {
        "number": trial.number,
        "setting": trial.setting.model_dump(mode="json"),
        "n": n,
        "seed": config.fresh_seed,
        "objective": objectives_of(config, trial.final, n),
        "behind_winner": worse_by(config, trial.final, winner.final, n, pairs=1),
        "metrics": trial.final.metrics,
    }


def _describe_trial(
    config: SearchConfig, halving: SuccessiveHalving, trial: Trial, winner: Trial, budget: SampleBudget
) -> Json:
    """Return a trial as search.json shows it, compared with the winner at the largest n that both reached."""
    level, n = min(trial.level, winner.level), config.rungs[trial.level]
    num_trials = sum(other.level >= level for other in halving.trials)
    num_pairs = num_trials * (num_trials - 1) // 2
    by_rung = list(zip(config.rungs, trial.outcomes, strict=False))
    status = FAILED if trial.failed else trial.eliminated or trial.not_promoted or "not eliminated"
    return {
        "number": trial.number,
        "setting": trial.setting.model_dump(mode="json"),
        "status": "winner" if trial is winner else status,
        "n": n,
        "samples": budget.samples_of(trial.setting),
        "evaluations": budget.samples_of(trial.setting) * trial.setting.evaluations,
        "keeps_constraints": halving.violation(trial) <= 0,
        "objective": objectives_of(config, trial.outcomes[-1], n),
        "behind_winner": worse_by(
            config, trial.outcomes[level], winner.outcomes[level], config.rungs[level], num_pairs
        ),
        "objective_by_rung": {str(n): objectives_of(config, outcome, n) for n, outcome in by_rung},
        "rungs": {str(n): outcome.metrics for n, outcome in by_rung},
        "metrics": trial.outcomes[-1].metrics,
    }


def objectives_of(config: TrialsConfig, outcome: Outcome, n: int) -> Json:
    """Return each bias-corrected objective, with a 95% interval if n is large enough for an unbiased value."""
    estimates = {EVALUATIONS: outcome.metrics[EVALUATIONS]} if EVALUATIONS in config.objective else {}
    for name in config.objective:
        if name != EVALUATIONS and len(scores := sign_of(name) * outcome.scores[name]):
            estimate = interval(scores, n, outcome.strata)
            if name not in outcome.unbiased:
                estimate = Estimate(estimate.value, n, note="no interval: n is too small for an unbiased value")
            estimates[name] = describe(estimate)
    return estimates


def worse_by(config: TrialsConfig, outcome: Outcome, best: Outcome, n: int, pairs: int) -> Json:
    """Return by how much an outcome is worse than the best: paired differences of each objective, positive if worse.

    pairs: the number of pairs compared at this n. The 95% intervals are simultaneous for all pairs (Bonferroni), so
    that they hold whichever trial was selected as the best.
    """
    estimates = {}
    for name in config.objective:
        if name != EVALUATIONS and len(outcome.scores[name]):
            worse = differences(outcome.scores[name], best.scores[name])
            estimates[name] = describe(interval(worse, n, outcome.strata, level=0.025 / max(pairs, 1)))
    return estimates


def front_names(config: SearchConfig) -> tuple[str, str]:
    """Return the axes of the Pareto front: both objectives, or the only objective and the network evaluations."""
    first, second = [*config.objective, EVALUATIONS][:2]
    return first, second


def pareto(names: tuple[str, str], trials: list[Json]) -> list[Json]:
    """Return the Pareto front ordered by its second axis; trials without intervals count only if none has them."""
    points = []
    for trial in trials:
        estimates = trial["objective"] | {EVALUATIONS: trial["metrics"][EVALUATIONS]}
        if all(name in estimates for name in names):
            point = {key: trial[key] for key in ("number", "setting", "n")}
            points.append(point | {name: estimates[name] for name in names})
    points = [point for point in points if all(point[name]["interval"] for name in names)] or points
    if not points:
        return []
    on_front = front(np.array([[sign_of(name) * point[name]["value"] for name in names] for point in points]))
    best = [point for point, is_on_front in zip(points, on_front, strict=True) if is_on_front]
    return sorted(best, key=lambda point: point[names[1]]["value"])


def summary(result: Json) -> str:
    """Return lines for the terminal: the winner on fresh seeds, and by how much the other trials are worse."""
    objective, winner = result["objective"][0], result["winner"]
    several_weights = has_several_weights(result)
    value = winner["objective"].get(objective, winner["metrics"][objective])
    lines = [
        f"winner  {label(Setting(**winner['setting']), several_weights)}",
        f"        {objective} {format_estimate(value)}, bias-corrected, on {winner['n']:,} fresh samples "
        f"(seed {winner['seed']})",
    ]
    for final in result["finalists"][1:]:
        if objective in final["behind_winner"]:
            setting = label(Setting(**final["setting"]), several_weights)
            difference = describe_difference(final["behind_winner"][objective])
            lines.append(f"next    {difference} on the same samples: {setting}")
    lines += [f"warning {text}" for text in contradictions(result)]
    lines.append(
        f"cost    {result['samples']:,} samples, {result['evaluations']:,.0f} network evaluations, "
        f"{len(result['trials'])} trials" + (", limited by the budget" if result["stopped_by_budget"] else "")
    )
    behind = [t for t in result["trials"] if objective in t["behind_winner"] and t["status"] != "winner"]
    behind.sort(key=lambda t: (-t["behind_winner"][objective]["n"], t["behind_winner"][objective]["value"]))
    if behind:
        lines.append(
            f"behind  the winner by bias-corrected {objective}, on the search's own samples; simultaneous 95% intervals"
        )
    lines += [
        f"        {format_estimate(t['behind_winner'][objective]):30} n={t['behind_winner'][objective]['n']:<7,}"
        f"{label(Setting(**t['setting']), several_weights)} ({t['status']})"
        for t in behind[:SUMMARY_TRIALS]
    ]
    lines += [f"failed  {setting}: {reason}" for setting, reason in result["failed"].items()]
    return "\n".join(lines)


def contradictions(result: Json) -> list[str]:
    """Return a warning for each finalist that is significantly better than the winner on the fresh samples."""
    objective, several_weights = result["objective"][0], has_several_weights(result)
    texts = []
    for final in result["finalists"]:
        worse = final["behind_winner"].get(objective)
        if worse and worse["interval"] and worse["interval"][1] < 0:
            texts.append(
                f"on the fresh samples {label(Setting(**final['setting']), several_weights)} is significantly better "
                "than the winner, which the samples of the search chose; use that setting, or continue the search with "
                "a larger budget"
            )
    return texts


def has_several_weights(result: Json) -> bool:
    """Return whether the trials of a search sampled with several diffusion models."""
    return len({trial["setting"]["weights"] for trial in result["trials"]}) > 1


def describe_difference(worse: Json) -> str:
    """Return by how much something is worse, or better if the difference is negative, with its interval."""
    if worse["value"] >= 0:
        return f"worse by {format_estimate(worse)}"
    interval = worse["interval"] and [-end for end in reversed(worse["interval"])]
    return f"better by {format_estimate({'value': -worse['value'], 'interval': interval})}"


def label(setting: Setting, several_weights: bool) -> str:
    """Return a description of a setting, with its weights if the search has several."""
    return f"{setting}, {setting.weights.removesuffix('.safetensors')}" if several_weights else str(setting)


def format_estimate(estimate: Json) -> str:
    """Return the text of a value, with its interval if it has one."""
    interval = estimate["interval"]
    return f"{estimate['value']:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")
