"""The HTML page of a table of ablations, with its plot."""

from pathlib import Path
from typing import Any

from orchestrator.evaluation.page import template
from orchestrator.pictures import COLOURS, figure_png, subplots
from orchestrator.search.result import format_estimate

Json = dict[str, Any]
MARKERS = "osD^v"  # one for each time that the colours are used


def ablations_page(result: Json) -> tuple[str, bytes]:
    """Return the page for the content of ablations.json, and its picture (PNG)."""
    picture = quality_figure(result)
    notes: dict[str, list[str]] = {}  # rows by the note of their first estimate
    for row, entry in result["rows"].items():
        notes.setdefault(next(iter(entry["values"].values()))["note"], []).append(row)
    page = template(Path(__file__).with_suffix(".html")).render(
        result=result,
        format_estimate=format_estimate,
        notes=notes,
        names=list(next(iter(result["rows"].values()))["values"]),
        picture=picture,
    )
    return page, picture


def quality_figure(result: Json) -> bytes:
    """Draw the first objective along each training, and the final one against worker-hours and parameters."""
    name = result["objective"][0]
    figure, (images_axis, hours_axis, parameters_axis) = subplots(1, 3, figsize=(10.8, 3.6))
    for index, (row, entry) in enumerate(result["rows"].items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
        images = [point["images"] for point in entry["curve"]]
        values = [point[name] for point in entry["curve"]]
        images_axis.plot(images, values, f"{marker}-", color=colour, markersize=4, label=row)
        estimate = entry["values"][name]
        low, high = estimate["interval"] or [estimate["value"]] * 2
        error = [[estimate["value"] - low], [high - estimate["value"]]]
        for axis, x in ((hours_axis, entry["hours"]), (parameters_axis, entry["parameters"] / 1e6)):
            if x is not None:
                axis.errorbar(x, estimate["value"], yerr=error, fmt=marker, color=colour, markersize=5)
    title = f"{name.replace('_', ' ')}, bias-corrected"
    images_axis.set(xlabel="images, one training seed", ylabel=title)
    hours_axis.set(xlabel="worker-hours of training")
    parameters_axis.set(xlabel="million parameters")
    for axis in (images_axis, hours_axis, parameters_axis):
        axis.locator_params(axis="x", nbins=4)
    figure.legend(*images_axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure_png(figure)
