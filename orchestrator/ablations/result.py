"""The result of a table of ablations: the metrics of each row, and its differences from another row."""

from typing import Any, NamedTuple

import numpy as np

from models.metrics import Estimate, student_quantile
from models.paired_tests import differences, interval
from orchestrator.evaluation.metrics import describe
from orchestrator.search.objectives import sign_of
from orchestrator.search.result import format_estimate

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
    replicates = {row: [m for m in measured if m.row == row] for row in against}
    rows = {
        row: _describe_row(replicates[row], other, replicates[other] if other else [])
        for row, other in against.items()
        if replicates[row]
    }
    return {"rows": rows, "failed": failed, "objective": measured[0].quality["objective"]}


def _describe_row(replicates: list[Measured], against: str | None, others: list[Measured]) -> Json:
    """Return a row as ablations.json shows it: means over its replicates, and differences from those of another row."""
    first = replicates[0]
    objectives = first.quality["objective"]
    hours = [m.hours for m in replicates if m.hours is not None]
    metrics = {name: [m.last["metrics"][name]["value"] for m in replicates] for name in first.last["metrics"]}
    return {
        "seeds": [m.seed for m in replicates],
        "images": first.last["images"],
        "average": first.last["average"],
        "evaluations": first.last["evaluations"],
        "parameters": first.parameters,
        "hours": float(np.mean(hours)) if hours else None,
        "values": {name: describe(_mean([m.values[name] for m in replicates])) for name in first.values},
        "metrics": {name: float(np.mean(values)) for name, values in metrics.items()},
        "against": against,
        "differences": {name: _difference(replicates, others, name) for name in first.values} if others else {},
        "curve": [
            {"images": point["images"], **{name: point["objective"][name]["value"] for name in objectives}}
            for point in first.quality["points"]
            if point["curve"] == first.last["curve"]
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
    pairs = [(replicate, other) for replicate in replicates for other in others if replicate.seed == other.seed]
    if not pairs:
        return None
    return describe(_mean([_paired_difference(replicate, other, name) for replicate, other in pairs]))


def _paired_difference(replicate: Measured, other: Measured, name: str) -> Json:
    """Return the difference of two trainings with one seed; without scores of the samples, it has no interval."""
    if name not in replicate.scores:
        return {"value": replicate.values[name]["value"] - other.values[name]["value"], "interval": None}
    scores = sign_of(name) * differences(replicate.scores[name], other.scores[name])
    return describe(interval(scores, len(scores), replicate.strata))


def table_lines(result: Json) -> list[str]:
    """Return the table for a terminal: values, and differences from the row with which each row is compared."""
    names = list(next(iter(result["rows"].values()))["values"])
    lines = [f"{'row':28}" + "".join(f"{name:>34}  {'difference':28}" for name in names) + "  parameters   hours"]
    for row, entry in result["rows"].items():
        cells = ""
        for name in names:
            difference = entry["differences"].get(name)
            text = format_estimate(difference) if difference else ""
            cells += f"{format_estimate(entry['values'][name]):>34}  {text:28}"
        hours = "" if entry["hours"] is None else f"{entry['hours']:6.3g}"
        lines.append(f"{row:28}{cells}  {entry['parameters']:10,}  {hours}")
    lines += [f"failed  {replicate}: {reason}" for replicate, reason in result["failed"].items()]
    return lines
