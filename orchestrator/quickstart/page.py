"""The report of the quickstart: one self-contained HTML file, and its numbers as JSON."""

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.evaluation.metrics import bias_note, metric_named
from orchestrator.evaluation.page import template
from orchestrator.generation.samples import count_samples, read_range, read_run
from orchestrator.metrics_log import history
from orchestrator.pictures import COLOURS, distances_figure, figure_png, grid_png, subplots
from orchestrator.redaction import redact
from orchestrator.search.pictures import common_n, guidance_figure

PER_CLASS = 10  # samples of each class in the grids

# The order of the table.
METRICS = (
    "accuracy", "fd_infinity_digits", "fd_digits", "kid_digits", "inception_score_digits", "precision", "recall",
    "clipped_density", "clipped_coverage",
)  # fmt: skip


def write_report(store: str, folder: str, stages: dict[str, dict[str, Any]]) -> str:
    """Write report.html and report.json to `folder` from the output of the jobs in `store`; return the page's path."""
    digits = storage.join(store, "digits")
    evaluations = {
        name: storage.read_json(storage.join(digits, f"{name}-evaluation", "report.json"))
        for name in ("guided", "unguided")
    }
    search = storage.read_json(storage.join(digits, "search", "search.json"))
    numbers = {
        "seconds_by_stage": {name: stage["seconds"] for name, stage in stages.items()},
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in stages.values()),
        "num_samples": storage.read_json(storage.join(digits, "guided", "manifest.json"))["num_samples"],
        "accuracy_guided": evaluations["guided"]["metrics"]["accuracy"]["value"],
        "accuracy_unguided": evaluations["unguided"]["metrics"]["accuracy"]["value"],
        "metrics_guided": evaluations["guided"]["metrics"],
        "metrics_unguided": evaluations["unguided"]["metrics"],
        "held_out": evaluations["guided"]["held_out"],
        "extractor": evaluations["guided"]["extractor"],
        "search": {
            "winner": search["winner"]["setting"],
            "objective": search["objective"][0],
            "samples": search["samples"],
            "trials": search["trials"],
        },
        "trade_off": trade_off(search["trials"], search["winner"]["setting"]["sampler"]["num_steps"]),
        "copies": copies(evaluations["guided"]["nearest_training_image"]),
    }
    pictures = {
        "guided": class_grid(storage.join(digits, "guided")),
        "unguided": class_grid(storage.join(digits, "unguided")),
        "trade_off": guidance_figure(search["trials"], search["objective"], "digits"),
        "losses": loss_figure(digits),
        "copies": distances_figure(evaluations["guided"]["nearest_training_image"]),
    }
    settings = {
        name: storage.read_json(storage.join(digits, name, "config.json"))
        for name in ("diffusion", "classifier", "search")
    } | {"guided": read_run(storage.join(digits, "guided"))}
    page = template(Path(__file__).with_suffix(".html")).render(
        numbers=numbers,
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        stages=stages,
        settings={name: storage.json_bytes(config).decode() for name, config in settings.items()},
        metrics={name: metric_named(name) for name in METRICS},
        bias_note=bias_note,
        tracking_uri=redact(os.environ["MLFLOW_TRACKING_URI"]),
    )
    Path(folder, "report.json").write_bytes(storage.json_bytes(numbers))
    path = Path(folder, "report.html")
    path.write_text(page, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------ numbers


def trade_off(trials: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Return precision and recall by guidance scale, and whether they rise or fall significantly.

    All values are those at the largest n that every trial reached. A change is significant if the intervals at the
    smallest and the largest scale do not overlap.
    """
    n = common_n(trials)
    along = [trial for trial in trials if trial["setting"]["sampler"]["num_steps"] == num_steps]
    along.sort(key=lambda trial: trial["setting"]["guidance"]["scale"])

    def moved(name: str, up: bool) -> bool:
        first, final = (trial["rungs"][n][name]["interval"] for trial in (along[0], along[-1]))
        if first is None or final is None:
            return False
        return final[0] > first[1] if up else final[1] < first[0]

    return {
        "num_steps": num_steps,
        "scales": [trial["setting"]["guidance"]["scale"] for trial in along],
        "precision": [trial["rungs"][n]["precision"]["value"] for trial in along],
        "recall": [trial["rungs"][n]["recall"]["value"] for trial in along],
        "precision_rises": moved("precision", up=True),
        "recall_falls": moved("recall", up=False),
    }


def copies(distances: dict[str, list[float]]) -> dict[str, Any]:
    """Return lower quantiles of the distances of samples and of held-out images to their nearest training images.

    Memorised training images would move the lower quantiles of the samples towards 0.
    """
    quantiles = (0.01, 0.05, 0.25, 0.5)
    made, held_out = (np.quantile(distances[name], quantiles) for name in ("samples", "held_out"))
    return {
        "quantiles": list(quantiles),
        "samples": made.tolist(),
        "held_out": held_out.tolist(),
        "smallest_sample": min(distances["samples"]),
        "smallest_held_out": min(distances["held_out"]),
    }


# ------------------------------------------------------------------------------------------------ pictures


def class_grid(samples: str) -> bytes:
    """Return a PNG with a row of ten samples for each class, the first ones of the folder."""
    images, labels = read_range(samples, 0, min(512, count_samples(samples)))
    rows = [images[labels == label][:PER_CLASS] for label in np.unique(labels)]
    return grid_png(np.concatenate(rows), columns=PER_CLASS, scale=4, gap=2)


def loss_figure(digits: str) -> bytes:
    """Return a PNG of the training losses against the images seen."""
    figure, axes = subplots(1, 2, figsize=(8.6, 2.8))
    curves = (("diffusion", "hybrid loss"), ("classifier", "cross entropy"))
    for axis, (run, label) in zip(axes, curves, strict=True):
        losses = history(storage.join(digits, run), "loss")
        steps, values = [step / 1000 for step, _ in losses], [value for _, value in losses]
        axis.plot(steps, values, color=COLOURS[0], linewidth=1.2)
        axis.set(xlabel="thousand images", title=f"{run}: {label}", yscale="log")
    return figure_png(figure)
