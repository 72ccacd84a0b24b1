"""The HTML page of a table of ablations, with its plot."""

from pathlib import Path
from typing import Any

from orchestrator.evaluation.page import template
from orchestrator.pictures import COLOURS, figure_png, subplots
from orchestrator.search.result import number

Json = dict[str, Any]
MARKERS = "osD^v"  # one for each time that the colours are used


def ablations_page(result: Json) -> tuple[str, bytes]:
    """Return the page for the content of ablations.json, and its picture (PNG)."""
    picture = quality_figure(result)
    notes: dict[str, list[str]] = {}
    for row, entry in result["rows"].items():
        notes.setdefault(next(iter(entry["values"].values()))["note"], []).append(row)
    page = template(Path(__file__).with_suffix(".html")).render(
        result=result,
        number=number,
        notes=notes,
        names=list(next(iter(result["rows"].values()))["values"]),
        picture=picture,
    )
    return page, picture


def quality_figure(result: Json) -> bytes:
    """Draw the first objective along each training, and the final one against worker-hours and parameters."""
    name = result["objective"][0]
    figure, (along, hours, parameters) = subplots(1, 3, figsize=(10.8, 3.6))
    for index, (row, entry) in enumerate(result["rows"].items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index // len(COLOURS) % len(MARKERS)]
        images = [point["images"] for point in entry["curve"]]
        values = [point[name] for point in entry["curve"]]
        along.plot(images, values, f"{marker}-", color=colour, markersize=4, label=row)
        value = entry["values"][name]
        ends = value["interval"] or [value["value"]] * 2
        error = [[value["value"] - ends[0]], [ends[1] - value["value"]]]
        for axis, x in ((hours, entry["hours"]), (parameters, entry["parameters"] / 1e6)):
            if x is not None:
                axis.errorbar(x, value["value"], yerr=error, fmt=marker, color=colour, markersize=5)
    title = f"{name.replace('_', ' ')}, bias-corrected"
    along.set(xlabel="images, one training seed", ylabel=title)
    hours.set(xlabel="worker-hours of training")
    parameters.set(xlabel="million parameters")
    for axis in (along, hours, parameters):
        axis.locator_params(axis="x", nbins=4)
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure_png(figure)
