"""The result of a search: the winner, the front, and how sure each decision is; as JSON and as a few lines of text."""

from typing import Any

import numpy as np

from models.metrics import Estimate, mean_estimate, paired_difference
from models.paired_tests import front
from orchestrator.evaluation.metrics import describe
from orchestrator.search.config import SearchConfig
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Outcome, SuccessiveHalving, Trial
from orchestrator.search.objectives import EVALUATIONS, sign_of
from orchestrator.search.space import Setting

Json = dict[str, Any]


def conclude(config: SearchConfig, halving: SuccessiveHalving, budget: SampleBudget) -> Json:
    """What is written to search.json.

    Raises:
        RuntimeError: no trial came to an end.
    """
    failed = {_label(trial.setting, len(config.weights) > 1): trial.failed for trial in halving.trials if trial.failed}
    finalists = [trial for trial in halving.finalists if trial.fresh and not trial.fresh.failed]
    if not finalists:
        reason = failed or "none keeps the constraints, or the budget is too small"
        raise RuntimeError(f"no trial came to an end: {reason}")
    winner = finalists[0]
    trials = [_trial(config, trial, winner, budget) for trial in halving.trials if trial.outcomes]
    return {
        "objective": list(config.objective),
        "constraints": list(config.constraints),
        "classifier": config.classifier,
        "winner": _final(config, winner) | {"chosen_at_n": config.rungs[winner.level]},
        "finalists": [_final(config, trial) for trial in finalists],
        "front": pareto(front_names(config), [trial for trial in trials if trial["keeps_constraints"]]),
        "trials": trials,
        "failed": failed,
        "samples": budget.samples,
        "evaluations": budget.evaluations,
        "seeds": {"search": config.seed, "final": config.fresh_seed},
        "alpha": config.alpha,
        "budget": config.budget,
        "stopped_by_budget": halving.stopped_by_budget,
    }


def _final(config: SearchConfig, trial: Trial) -> Json:
    """A finalist by its fresh samples alone."""
    assert trial.fresh is not None
    return {
        "number": trial.number,
        "setting": trial.setting.model_dump(mode="json"),
        "n": config.rungs[-1],
        "seed": config.fresh_seed,
        "objective": _objectives(config, trial.fresh),
        "metrics": trial.fresh.metrics,
    }


def _trial(config: SearchConfig, trial: Trial, winner: Trial, budget: SampleBudget) -> Json:
    """A trial as far as it went, and its paired difference from the winner at the largest n that both reached."""
    level = min(trial.level, winner.level)
    running = "drawn to the end" if trial.level == len(config.rungs) - 1 else "undecided"
    mine, its = trial.outcomes[level], winner.outcomes[level]
    return {
        "number": trial.number,
        "setting": trial.setting.model_dump(mode="json"),
        "status": "winner" if trial is winner else trial.stopped or running,
        "n": config.rungs[trial.level],
        "samples": budget.of(trial.setting),
        "evaluations": budget.of(trial.setting) * trial.setting.evaluations,
        "keeps_constraints": all(bound.violation(trial.outcomes[-1].metrics, False) <= 0 for bound in config.bounds),
        "objective": _objectives(config, trial.outcomes[-1]),
        "behind_winner": {  # positive: worse than the winner, in the objective's own unit
            name: _described(paired_difference(a[0], b[0]), a)
            for name, a, b in zip(config.objective, mine.scores, its.scores, strict=True)
            if name != EVALUATIONS and name not in mine.stand_ins and len(a)
        },
        "rungs": {str(n): outcome.metrics for n, outcome in zip(config.rungs, trial.outcomes, strict=False)},
        "metrics": trial.outcomes[-1].metrics,
    }


def _objectives(config: SearchConfig, outcome: Outcome) -> Json:
    """Each objective freed of its bias, with its interval; none where another score stood in for it."""
    found = {}
    for name, scores in zip(config.objective, outcome.scores, strict=True):
        if name == EVALUATIONS:
            found[name] = outcome.metrics[name]
        elif len(scores) and name not in outcome.stand_ins:
            found[name] = _described(mean_estimate(sign_of(name) * scores[0]), scores)
    return found


def _described(estimate: Estimate, scores: np.ndarray) -> Json:
    """As JSON; without an interval where a second criterion was needed, since bias is left in the first."""
    if len(scores) > 1:
        estimate = Estimate(estimate.value, estimate.n, note="no interval: n is below 16 D")
    return describe(estimate)


def front_names(config: SearchConfig) -> tuple[str, str]:
    """The two sides of the front: both objectives; or the only one, and evaluations."""
    first, second = [*config.objective, EVALUATIONS][:2]
    return first, second


def pareto(names: tuple[str, str], trials: list[Json]) -> list[Json]:
    """The trials that no other beats on both sides, by the second; of those whose sides have intervals, if any."""
    points = []
    for trial in trials:
        sides = trial["objective"] | {EVALUATIONS: trial["metrics"][EVALUATIONS]}
        if all(name in sides for name in names):
            points.append({key: trial[key] for key in ("number", "setting", "n")} | {n: sides[n] for n in names})
    points = [point for point in points if all(point[name]["interval"] for name in names)] or points
    if not points:
        return []
    on_front = front(np.array([[sign_of(name) * point[name]["value"] for name in names] for point in points]))
    return sorted(
        (point for point, on in zip(points, on_front, strict=True) if on), key=lambda point: point[names[1]]["value"]
    )


def summary(result: Json, most: int = 8) -> str:
    """A few lines for the terminal: the winner on fresh seeds, and how far behind the others are."""
    objective, winner = result["objective"][0], result["winner"]
    several = len({trial["setting"]["weights"] for trial in result["trials"]}) > 1
    lines = [
        f"winner  {_label(Setting(**winner['setting']), several)}",
        f"        {objective} {_number(winner['metrics'][objective])} by {winner['n']:,} fresh samples "
        f"(seed {winner['seed']})",
        f"cost    {result['samples']:,} samples, {result['evaluations']:,} network evaluations, "
        f"{len(result['trials'])} trials" + (", stopped by the budget" if result["stopped_by_budget"] else ""),
    ]
    behind = [t for t in result["trials"] if objective in t["behind_winner"] and t["status"] != "winner"]
    behind.sort(key=lambda t: (-t["n"], t["behind_winner"][objective]["value"]))
    if behind:
        lines.append(f"behind  in {objective}, by paired differences on the search's own samples")
    lines += [
        f"        {_number(t['behind_winner'][objective]):30} n={t['behind_winner'][objective]['n']:<7,}"
        f"{_label(Setting(**t['setting']), several)} ({t['status']})"
        for t in behind[:most]
    ]
    lines += [f"failed  {setting}: {reason}" for setting, reason in result["failed"].items()]
    return "\n".join(lines)


def _label(setting: Setting, several: bool) -> str:
    """A setting in words; with its weights where there are several."""
    return f"{setting}, {setting.weights.removesuffix('.safetensors')}" if several else str(setting)


def _number(estimate: Json) -> str:
    interval = estimate["interval"]
    return f"{estimate['value']:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")
