"""The HTML page of quality.json: a single file with the table, the curves and samples of the same seeds."""

from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.evaluation.page import template
from orchestrator.pictures import COLOURS, figure_png, strips_figure, subplots
from orchestrator.run_evaluation.config import RunEvaluationConfig
from orchestrator.search.evaluator import first_images
from orchestrator.search.result import format_estimate
from orchestrator.search.space import Setting

COLUMNS = 20  # samples of a snapshot in the grid
MAX_ROWS = 12  # snapshots in the grid, evenly spaced

Json = dict[str, Any]


def quality_page(result: Json, pictures: dict[str, bytes]) -> str:
    """Return the page for the content of quality.json and its pictures (PNG)."""
    return template(Path(__file__).with_suffix(".html")).render(
        result=result, format_estimate=format_estimate, pictures=pictures
    )


def curve_figure(result: Json) -> bytes:
    """Draw the objectives, precision and recall against training images, one line for each average and guidance scale.

    Bands are 95% intervals of single values. Differences between snapshots are known more precisely, because all
    snapshots use the same noise.
    """
    names = [*dict.fromkeys((*result["objective"], "precision", "recall"))]
    figure, axes = subplots(1, len(names), figsize=(3.6 * len(names), 3.4), squeeze=False)
    curves: dict[str, list[Json]] = {}
    for point in result["points"]:
        curves.setdefault(point["curve"], []).append(point)
    for axis, name in zip(axes.flat, names, strict=True):
        for colour, (label, curve) in zip(COLOURS * 9, curves.items(), strict=False):
            metrics = [point["objective"].get(name, point["metrics"].get(name)) for point in curve]
            x = [point["images"] for point in curve]
            axis.plot(x, [metric["value"] for metric in metrics], "o-", color=colour, markersize=3.5, label=label)
            if all(metric["interval"] for metric in metrics):
                low, high = np.array([metric["interval"] for metric in metrics]).T
                axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        suffix = ", bias-corrected" if name in result["objective"] else ""
        axis.set(xlabel="images", title=name.replace("_", " ") + suffix)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure_png(figure)


def snapshots_figure(config: RunEvaluationConfig, result: Json) -> bytes:
    """Draw samples of the same indices, labels and noise by the snapshots of the best curve."""
    curve = [point for point in result["points"] if point["curve"] == result["best"]["curve"]]
    selected = np.unique(np.linspace(0, len(curve) - 1, MAX_ROWS).round().astype(int))
    rows = [
        (f"{point['images']:,}", first_images(config, Setting(**point["setting"]))[:COLUMNS])
        for point in (curve[index] for index in selected)
    ]
    return strips_figure(rows, f"{result['best']['curve']}: the same seeds by the number of training images")
