"""The HTML page of a table of ablations, with its plot."""

import base64
from pathlib import Path
from typing import Any

from orchestrator.evaluation.page import template
from orchestrator.pictures import COLOURS, figure_png, subplots
from orchestrator.search.result import number

Json = dict[str, Any]


def ablations_page(result: Json) -> tuple[str, dict[str, bytes]]:
    """Return the page for the content of ablations.json, and its pictures (PNG) by name."""
    pictures = {"ablations.png": quality_figure(result)}
    page = template(Path(__file__).with_suffix(".html")).render(
        result=result,
        number=number,
        names=list(next(iter(result["rows"].values()))["values"]),
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
    )
    return page, pictures


def quality_figure(result: Json) -> bytes:
    """Draw the first objective along each training, and the final one against worker-hours and parameters."""
    name = result["objective"][0]
    figure, (along, hours, parameters) = subplots(1, 3, figsize=(10.8, 3.6))
    for colour, (row, found) in zip(COLOURS * 9, result["rows"].items(), strict=False):
        images = [point["images"] for point in found["curve"]]
        along.plot(images, [point[name] for point in found["curve"]], "o-", color=colour, markersize=3, label=row)
        value = found["values"][name]
        ends = value["interval"] or [value["value"]] * 2
        error = [[value["value"] - ends[0]], [ends[1] - value["value"]]]
        for axis, x in ((hours, found["hours"]), (parameters, found["parameters"])):
            if x is not None:
                axis.errorbar(x, value["value"], yerr=error, fmt="o", color=colour, markersize=4)
    title = f"{name.replace('_', ' ')}, bias-corrected"
    along.set(xlabel="images, one training seed", ylabel=title)
    hours.set(xlabel="worker-hours of training")
    parameters.set(xlabel="parameters")
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure_png(figure)
