"""The result of an evaluation of a run: the quality of each snapshot, its change, and the best snapshot."""

from typing import Any, NamedTuple

from orchestrator.run_evaluation.config import RunEvaluationConfig
from orchestrator.search.halving import Outcome
from orchestrator.search.result import format_estimate, objectives_of, worse_by
from orchestrator.search.space import Setting
from orchestrator.training.snapshots import Snapshot
from orchestrator.weights.network import ANY

Json = dict[str, Any]


class Point(NamedTuple):
    """A snapshot at one guidance scale, with its metrics."""

    snapshot: Snapshot
    setting: Setting
    outcome: Outcome

    @property
    def curve(self) -> str:
        """Return the name of the curve that this point belongs to: average and guidance scale."""
        return f"{self.snapshot.average} scale {self.setting.guidance.scale:g}"


def conclude(config: RunEvaluationConfig, points: list[Point]) -> Json:
    """Return the content of quality.json.

    Raises:
        RuntimeError: no snapshot could be sampled, or `num_samples` is too small for the objective.
    """
    name = config.objective[0]
    measured = [point for point in points if not point.outcome.failed and len(point.outcome.scores[name])]
    failed = {f"{p.snapshot.name}, {p.setting}": p.outcome.failed for p in points if p.outcome.failed}
    if not measured:
        reason = failed or f"--num-samples {config.num_samples} is too small for {name}; raise it"
        raise RuntimeError(f"no snapshot could be measured: {reason}")
    best = min(measured, key=lambda point: float(point.outcome.scores[name].mean()))
    curves: dict[str, list[Point]] = {}
    for point in sorted(measured, key=lambda point: point.snapshot.images):
        curves.setdefault(point.curve, []).append(point)
    num_changes = max(sum(len(curve) - 1 for curve in curves.values()), 1)
    described = [
        _describe(config, point, previous, best, num_changes, len(measured))
        for curve in curves.values()
        for previous, point in zip([None, *curve], curve, strict=False)
    ]
    best_curve = [point for point in described if point["curve"] == best.curve]
    as_good = [point for point in best_curve if point["behind_best"][name]["interval"][0] <= 0]
    return {
        "run": config.weights,
        "objective": list(config.objective),
        "num_samples": config.num_samples,
        "seed": config.seed,
        "points": described,
        "best": next(point for point in described if point["best"]),
        "as_good_from": as_good[0]["images"],
        "failed": failed,
    }


def _describe(
    config: RunEvaluationConfig, point: Point, previous: Point | None, best: Point, num_changes: int, num_points: int
) -> Json:
    """Return a point as JSON; intervals are simultaneous over all changes, and over all differences from the best."""
    n, outcome = config.num_samples, point.outcome
    change = worse_by(config, outcome, previous.outcome, n, num_changes) if previous else None
    return {
        "images": point.snapshot.images,
        "average": point.snapshot.average,
        "curve": point.curve,
        "weights": point.setting.weights,
        "setting": point.setting.model_dump(mode="json"),
        "evaluations": point.setting.evaluations,
        "objective": objectives_of(config, outcome, n),
        "metrics": outcome.metrics,
        "change": change,
        "verdict": _verdict(change[config.objective[0]]) if change else "first",
        "behind_best": worse_by(config, outcome, best.outcome, n, num_points * (num_points - 1) // 2),
        "best": point is best,
    }


def _verdict(change: Json) -> str:
    """Return the assessment of a change from the previous snapshot, by its interval; positive is worse."""
    low, high = change["interval"]
    if high < 0:
        return "still improving"
    return "getting worse: overfitting" if low > 0 else "no significant change"


def best_files(result: Json) -> dict[str, str]:
    """Return the best weights of each average and of all averages, as file names in the run's weights/."""
    name = result["objective"][0]
    best = {ANY: result["best"]}
    for point in sorted(result["points"], key=lambda point: point["behind_best"][name]["value"]):
        best.setdefault(point["average"], point)
    return {average: point["weights"].rpartition("/weights/")[2] for average, point in best.items()}


def summary(result: Json) -> str:
    """Return the table of a run's quality."""
    name, best = result["objective"][0], result["best"]
    lines = [
        f"{'images':>14}  {'average, guidance':28} {name + ', bias-corrected':34} change from the previous snapshot"
    ]
    for point in result["points"]:
        change = f"{format_estimate(point['change'][name])}: {point['verdict']}" if point["change"] else ""
        mark = " <- best" if point["best"] else ""
        value = format_estimate(point["objective"][name])
        lines.append(f"{point['images']:>14,}  {point['curve']:28} {value:34} {change}{mark}")
    lines += [f"failed: {snapshot}: {reason}" for snapshot, reason in result["failed"].items()]
    lines.append(
        f"best    {best['curve']} at {best['images']:,} images; no significant difference from "
        f"{result['as_good_from']:,} images on, with {result['num_samples']:,} samples (simultaneous 95% intervals)"
    )
    return "\n".join(lines)
