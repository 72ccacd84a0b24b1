"""The report of the quickstart: one self-contained HTML file, and its numbers as JSON."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import storage
from orchestrator.evaluation.metrics import bias_note, metric_named
from orchestrator.evaluation.page import template
from orchestrator.generation.samples import count_samples, read_range
from orchestrator.pictures import distances_figure, grid_png
from orchestrator.redaction import redact
from orchestrator.search.pictures import guidance_figure

PER_CLASS = 10  # samples of each class in the grids
PAGES = ("diffusion", "classifier", "search", "guided-evaluation", "unguided-evaluation")  # folders with a report.html

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
        "num_samples": storage.read_json(storage.join(digits, "guided", "manifest.json"))["num_samples"],
        **{f"accuracy_{name}": evaluation["metrics"]["accuracy"]["value"] for name, evaluation in evaluations.items()},
        **{f"metrics_{name}": evaluation["metrics"] for name, evaluation in evaluations.items()},
        "held_out": evaluations["guided"]["held_out"],
        "extractor": evaluations["guided"]["extractor"],
        "search": {
            "winner": search["winner"]["setting"],
            "objective": search["objective"][0],
            "samples": search["samples"],
            "trials": search["trials"],
        },
    }
    nearest = evaluations["guided"]["nearest_training_image"]
    pictures = {
        **{name: class_grid(storage.join(digits, name)) for name in evaluations},
        "guidance": guidance_figure(search["trials"], search["objective"], "digits"),
        "distances": distances_figure(nearest),
    }
    page = template(Path(__file__).with_suffix(".html")).render(
        numbers=numbers,
        pictures=pictures,
        nearest=nearest,
        stages=stages,
        pages=[storage.join(digits, name, "report.html") for name in PAGES],
        metrics={name: metric_named(name) for name in METRICS},
        bias_note=bias_note,
        tracking_uri=redact(os.environ["MLFLOW_TRACKING_URI"]),
    )
    Path(folder, "report.json").write_bytes(storage.json_bytes(numbers))
    path = Path(folder, "report.html")
    path.write_text(page, encoding="utf-8")
    return str(path)


def class_grid(samples: str) -> bytes:
    """Return a PNG with a row of up to ten samples for each class, the first ones of the folder."""
    images, labels = read_range(samples, 0, min(512, count_samples(samples)))
    classes, counts = np.unique(labels, return_counts=True)
    columns = min(PER_CLASS, counts.min())
    rows = [images[labels == label][:columns] for label in classes]
    return grid_png(np.concatenate(rows), columns=columns, scale=4, gap=2)
