"""The pictures of a search: metrics against the guidance scale, the Pareto front, and the same seeds by setting."""

from typing import Any

import numpy as np
from matplotlib import ticker

from models.guidance import WHOLE_CHAIN
from orchestrator import storage
from orchestrator.evaluation.metrics import METRICS
from orchestrator.pictures import COLOURS, figure_png, strips_figure, subplots
from orchestrator.search.config import SearchConfig
from orchestrator.search.evaluator import first_images
from orchestrator.search.objectives import EVALUATIONS, sign_of
from orchestrator.search.result import front_names
from orchestrator.search.space import Setting
from orchestrator.tracking import Tracker

MORE_COLOURS = (*COLOURS, "#8c6d1f", "#4a4a4a", "#b0457b", "#2f8f8f")
LEGEND_WIDTH = 110  # characters
COLUMNS = 20  # samples in a row

Json = dict[str, Any]
Point = tuple[Json, Json]  # estimates on the x axis and the y axis


def write_pictures(config: SearchConfig, result: Json, extractor: str, tracker: Tracker) -> dict[str, bytes]:
    """Write the pictures beside search.json and to MLflow; return them as PNGs by file name."""
    winner = Setting(**result["winner"]["setting"])
    pictures = {"front.png": front_figure(front_names(config), result)}
    if len({trial["setting"]["guidance"]["scale"] for trial in result["trials"]}) > 1:
        pictures["guidance.png"] = guidance_figure(result["trials"], result["objective"], extractor)
        pictures["scales.png"] = scales_figure(config, winner, result["trials"])
    if len(config.space.guidance) > 1:
        pictures["kinds.png"] = kinds_figure(config, result["trials"])
    for name, data in pictures.items():
        storage.write_bytes(storage.join(config.path(config.output), name), data)
        tracker.picture(name, data)
    return pictures


def guidance_figure(trials: list[Json], objectives: list[str], extractor: str) -> bytes:
    """Plot the objectives and the metrics of ADM's figure 4 against the guidance scale.

    The figure has four axes: the objectives, then Inception Score, precision and recall, then FD. Those that were not
    measured are left out, such as the Inception Score with an extractor without classes.
    A line joins the trials of one sampler and number of steps. All values are those at the largest n that all trials
    reached, since these metrics depend on n. Bands are 95% intervals, and objectives are bias-corrected.
    """
    figure, axes = subplots(2, 2, figsize=(8.6, 5.6))
    n = common_n(trials)
    inception_score, fd = (METRICS[name].report_name(extractor) for name in ("inception_score", "fd"))
    candidates = dict.fromkeys((*objectives, inception_score, "precision", "recall", fd))
    measured = set.intersection(*(set(trial["rungs"][n]) for trial in trials)) - {EVALUATIONS}
    names = [name for name in candidates if name in measured][:4]
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        for colour, (label, curve) in zip(MORE_COLOURS * 9, curves(trials).items(), strict=False):
            metrics = [trial["objective_by_rung"][n].get(name, trial["rungs"][n][name]) for trial in curve]
            x = [trial["setting"]["guidance"]["scale"] for trial in curve]
            y = [metric["value"] for metric in metrics]
            axis.plot(x, y, "o-", color=colour, markersize=3.5, linewidth=1.2, label=label)
            if all(metric["interval"] for metric in metrics):
                low, high = np.array([metric["interval"] for metric in metrics]).T
                axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        corrected = ", bias-corrected" if name in trials[0]["objective_by_rung"][n] else ""
        axis.set(xlabel="guidance scale", title=name.replace("_", " ") + corrected)
        _scale_axis(axis, sorted({trial["setting"]["guidance"]["scale"] for trial in trials}))
    if axes.flat[0].dataLim.y0 > 0 and sign_of(names[0]) > 0:  # distances span several orders of magnitude
        axes.flat[0].set_yscale("log")
        axes.flat[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.flat[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.flat[0].yaxis.set_minor_formatter(ticker.NullFormatter())
    handles, labels = axes.flat[0].get_legend_handles_labels()
    columns = max(1, LEGEND_WIDTH // max(map(len, labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{n} samples of each setting, with the same labels and noise", fontsize=9)
    return figure_png(figure)


def curves(trials: list[Json]) -> dict[str, list[Json]]:
    """Return the trials of each curve by its label, in the order of the guidance scale.

    The trials of a curve differ only in the scale. Unguided trials are part of the curve of each guide.
    """
    by_sampler: dict[str, dict[str | None, list[Json]]] = {}
    several_weights = len({trial["setting"]["weights"] for trial in trials}) > 1
    several_kinds = len({trial["setting"]["guidance"]["kind"] for trial in trials} - {"none"}) > 1
    several_weak = len({trial["setting"]["guidance"]["weak_weights"] for trial in trials} - {None}) > 1
    pairs = [(Setting(**trial["setting"]), trial) for trial in trials]
    pairs.sort(key=lambda pair: (pair[0].sampler.name, pair[0].sampler.num_steps, pair[0].guidance.scale))
    for setting, trial in pairs:
        guide = _guide_label(setting, several_kinds, several_weak) if setting.guidance.scale else None
        sampler = f"{setting.sampler_label}, {setting.weights}" if several_weights else setting.sampler_label
        by_sampler.setdefault(sampler, {}).setdefault(guide, []).append(trial)
    groups = {}
    for sampler, by_guide in by_sampler.items():
        unguided = by_guide.pop(None, [])
        for guide, guided in (by_guide or {None: []}).items():
            groups[f"{sampler}, {guide}" if guide else sampler] = [*unguided, *guided]
    return groups


def _guide_label(setting: Setting, several_kinds: bool, several_weak: bool) -> str:
    """Return the kind of guidance and the weaker model, each if there are several, and the interval."""
    guidance = setting.guidance
    parts = [guidance.kind.replace("_", "-")] if several_kinds and guidance.kind != "none" else []
    if several_weak and guidance.weak_weights:
        parts.append(guidance.weak_weights.rpartition("/")[2].removesuffix(".safetensors"))
    parts += [f"{guidance.interval[0]:g} to {guidance.interval[1]:g}"] if guidance.interval != WHOLE_CHAIN else []
    return ", ".join(parts)


def common_n(trials: list[Json]) -> str:
    """Return the largest n that all trials reached, as a key of their rungs."""
    return max(set.intersection(*(set(trial["rungs"]) for trial in trials)), key=int)


def _scale_axis(axis: Any, scales: list[float]) -> None:
    """Make the axis of guidance scales linear up to the least positive scale, and logarithmic above."""
    smallest = min((scale for scale in scales if scale > 0), default=1.0)
    axis.set_xscale("symlog", linthresh=max(smallest, 0.1))
    ticks = [0.0, *(2.0**power for power in range(-3, 8) if smallest <= 2.0**power <= scales[-1] * 1.01)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def front_figure(names: tuple[str, str], result: Json) -> bytes:
    """Plot all trials with 95% intervals, the Pareto front as a line, and the winner by its fresh samples.

    names: of the y axis and the x axis.

    A hollow mark has too few samples for an interval.
    """
    figure, axis = subplots(figsize=(7.2, 4.6))
    y_name, x_name = names
    rungs = sorted({trial["n"] for trial in result["trials"]})
    for colour, n in zip(MORE_COLOURS * 9, rungs, strict=False):
        pairs = [(_estimate(trial, x_name), _estimate(trial, y_name)) for trial in result["trials"] if trial["n"] == n]
        points = [(x, y) for x, y in pairs if x and y]
        if points:
            _plot_points(axis, points, colour, f"n = {n:,}")
    line = [(point[x_name]["value"], point[y_name]["value"]) for point in result["front"]]
    if line:
        axis.plot(*np.array(line).T, color="#1c2733", linewidth=1, zorder=1, label="front")
    winner = result["winner"]
    y, x = (winner["objective"].get(name, winner["metrics"][name]) for name in names)
    _plot_points(axis, [(x, y)], "#c0182b", f"winner, {winner['n']:,} fresh samples", marker="*", size=11)
    axis.set(xlabel=_title(x_name), ylabel=f"{_title(y_name)}, bias-corrected")
    axis.legend(frameon=False)
    return figure_png(figure)


def _estimate(trial: Json, name: str) -> Json | None:
    return trial["metrics"][name] if name == EVALUATIONS else trial["objective"].get(name)


def _title(name: str) -> str:
    return "network evaluations per image" if name == EVALUATIONS else name.replace("_", " ")


def _plot_points(axis: Any, points: list[Point], colour: str, label: str, marker: str = "o", size: int = 5) -> None:
    """Plot points (x, y) with their intervals; a point is hollow if one of its intervals is missing."""
    for x, y in points:
        x_error, y_error = (np.abs(np.array(e["interval"] or [e["value"]] * 2) - e["value"])[:, None] for e in (x, y))
        fill = colour if x["interval"] and y["interval"] else "none"
        axis.errorbar(
            x["value"], y["value"], xerr=x_error, yerr=y_error, fmt=marker, color=colour, markerfacecolor=fill,
            markersize=size, elinewidth=0.8, label=label,
        )  # fmt: skip
        label = "_nolegend_"  # one entry in the legend for all points


def scales_figure(config: SearchConfig, winner: Setting, trials: list[Json]) -> bytes:
    """Draw the same indices, labels and noise at every scale that was tried with the winner's other values."""
    guide = winner.guidance.kind, winner.guidance.weak_weights
    settings = []
    for setting in (Setting(**trial["setting"]) for trial in trials):
        has_guide = not setting.guidance.scale or (setting.guidance.kind, setting.guidance.weak_weights) == guide
        if has_guide and (setting.weights, setting.sampler) == (winner.weights, winner.sampler):
            settings.append(setting)
    settings.sort(key=lambda setting: setting.guidance.scale)
    rows = [(f"{setting.guidance.scale:.3g}", first_images(config, setting)[:COLUMNS]) for setting in settings]
    return strips_figure(rows, f"{winner.sampler_label}: the same seeds at each guidance scale")


def kinds_figure(config: SearchConfig, trials: list[Json]) -> bytes:
    """Draw the same indices, labels and noise with the best trial of each kind of guidance."""
    name = config.objective[0]
    rows = []
    for kind, trial in best_by_kind(trials, name).items():
        setting = Setting(**trial["setting"])
        label = f"{kind.replace('_', '-')} {setting.guidance.scale:.3g}" if setting.guidance.scale else kind
        rows.append((label, first_images(config, setting)[:COLUMNS]))
    return strips_figure(rows, f"the same seeds by each kind of guidance, at its best {name.replace('_', ' ')}")


def best_by_kind(trials: list[Json], name: str) -> dict[str, Json]:
    """Return the best trial of each kind of guidance, among those that reached the highest rung."""
    best: dict[str, Json] = {}
    for trial in sorted(trials, key=lambda t: (-t["n"], t["behind_winner"].get(name, {"value": 0})["value"])):
        best.setdefault(trial["setting"]["guidance"]["kind"], trial)
    return best
