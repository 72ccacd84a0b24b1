"""The result of a table of ablations: the metrics of each row, and its differences from another row."""

from typing import Any, NamedTuple

import numpy as np

from models.metrics import Estimate, student_quantile
from models.paired_tests import differences, interval
from orchestrator.evaluation.metrics import describe
from orchestrator.search.objectives import sign_of
from orchestrator.search.result import number

Json = dict[str, Any]
BITS = "bits_per_dim"
ONE_SEED = "one training seed: the interval does not include the spread between trainings"


class Measured(NamedTuple):
    """The results of one training seed of a row."""

    row: str
    seed: int
    quality: Json  # the content of quality.json
    last: Json  # its point with the most images
    values: dict[str, Json]  # estimates of the objectives at the last point and, if the table includes it, of bits/dim
    scores: dict[str, np.ndarray]  # scores [n] of the last point by objective, less is better
    strata: np.ndarray | None
    hours: float | None  # worker-hours of the training; None = too short to be measured
    parameters: int


def conclude(against: dict[str, str | None], measured: list[Measured], failed: dict[str, str]) -> Json:
    """Return the content of ablations.json.

    Args:
        against: for each row the row with which it is compared; None for the first row.

    Raises:
        RuntimeError: all rows failed.
    """
    if not measured:
        raise RuntimeError(f"all rows failed: {failed}")
    replicates = {row: [one for one in measured if one.row == row] for row in against}
    rows = {
        row: _row(results, other, replicates[other] if other else [])
        for row, other in against.items()
        if (results := replicates[row])
    }
    return {"rows": rows, "failed": failed, "objective": measured[0].quality["objective"]}


def _row(replicates: list[Measured], against: str | None, others: list[Measured]) -> Json:
    objectives, hours = replicates[0].quality["objective"], [one.hours for one in replicates if one.hours is not None]
    metrics = {
        name: [one.last["metrics"][name]["value"] for one in replicates] for name in replicates[0].last["metrics"]
    }
    return {
        "seeds": [one.seed for one in replicates],
        "images": replicates[0].last["images"],
        "average": replicates[0].last["average"],
        "evaluations": replicates[0].last["evaluations"],
        "parameters": replicates[0].parameters,
        "hours": float(np.mean(hours)) if hours else None,
        "values": {name: describe(_mean([one.values[name] for one in replicates])) for name in replicates[0].values},
        "metrics": {name: float(np.mean(values)) for name, values in metrics.items()},
        "against": against,
        "differences": {name: _difference(replicates, others, name) for name in replicates[0].values} if others else {},
        "curve": [
            {"images": point["images"], **{name: point["objective"][name]["value"] for name in objectives}}
            for point in replicates[0].quality["points"]
            if point["curve"] == replicates[0].last["curve"]
        ],
    }


def _mean(estimates: list[Json]) -> Estimate:
    """Return the mean over training seeds with Student's interval, which includes the spread between trainings.

    For one training seed, the interval is that of its estimate.
    """
    count, mean = len(estimates), float(np.mean([estimate["value"] for estimate in estimates]))
    if count == 1:
        low, high = estimates[0]["interval"] or (None, None)
        return Estimate(mean, 1, low, high, ONE_SEED)
    spread = float(np.std([estimate["value"] for estimate in estimates], ddof=1))
    half = student_quantile(0.975, count - 1) * spread / np.sqrt(count)
    return Estimate(mean, count, mean - half, mean + half, note=f"over {count} training seeds")


def _difference(replicates: list[Measured], others: list[Measured], name: str) -> Json | None:
    """Return this row minus another, paired by training seed, labels and noise; None = they share no seed."""
    pairs = [(one, other) for one in replicates for other in others if one.seed == other.seed]
    if not pairs:
        return None
    return describe(_mean([_paired(one, other, name) for one, other in pairs]))


def _paired(one: Measured, other: Measured, name: str) -> Json:
    """Return the difference of two trainings by the same seed; an interval needs scores by sample."""
    if name not in one.scores:
        return {"value": one.values[name]["value"] - other.values[name]["value"], "interval": None}
    scores = sign_of(name) * differences(one.scores[name], other.scores[name])
    return describe(interval(scores, len(scores), one.strata))


def table_lines(result: Json) -> list[str]:
    """Return the table for a terminal: values, and differences from the row with which each row is compared."""
    names = list(next(iter(result["rows"].values()))["values"])
    lines = [f"{'row':28}" + "".join(f"{name:>34}  {'difference':28}" for name in names) + "  parameters   hours"]
    for row, entry in result["rows"].items():
        cells = ""
        for name in names:
            difference = entry["differences"].get(name)
            cells += f"{number(entry['values'][name]):>34}  {number(difference) if difference else '':28}"
        hours = "" if entry["hours"] is None else f"{entry['hours']:6.3g}"
        lines.append(f"{row:28}{cells}  {entry['parameters']:10,}  {hours}")
    lines += [f"failed  {what}: {reason}" for what, reason in result["failed"].items()]
    return lines
