"""The page of a training: one self-contained HTML file with losses, samples, attempts, checkpoints and weights."""

import base64
from datetime import UTC, datetime
from pathlib import Path

from orchestrator import storage
from orchestrator.evaluation.page import template
from orchestrator.metrics_log import Record, read_records
from orchestrator.pictures import COLOURS, figure_png, subplots
from orchestrator.redaction import redact_tree
from orchestrator.training.config import Config
from orchestrator.training.verdict import classifier_lines, following

NAME = "report.html"
STARTED = "attempt_started"  # metric that marks the start of an attempt, at its position in images
CURVES = ("loss", "accuracy", "grad_norm")  # those that a run has; validation metrics share their axes

Curve = list[tuple[int, float]]


def write_run_page(run: str, config: Config) -> str:
    """Write report.html of the run as it stands now, and return the page."""
    records = [record for record in read_records(run) if not record.child]
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.metrics.items():
            curves.setdefault(name, {})[record.step] = value  # the latest one of a step that was repeated
    found = {name: sorted(values.items()) for name, values in curves.items()}
    attempts = [record for record in records if STARTED in record.metrics]
    found.pop(STARTED, None)
    pictures = storage.list_names(storage.join(run, "samples"), recursive=True)
    newest = {name.split("/")[0]: name for name in pictures}  # of each average; names sort by images
    page = template(Path(__file__).with_suffix(".html")).render(
        run=run,
        images=max((record.step for record in records), default=0),
        total_images=config.total_images,
        rate=_rate(records),
        verdict=classifier_lines(run, config.model.num_classes or 1) if config.model.kind == "classifier" else [],
        command=following(config),
        curves=_png(found, [record.step for record in attempts[1:]]),
        last={name: values[-1] for name, values in sorted(found.items())},
        previews={
            f"{name}: {path.rpartition('/')[2].removesuffix('.png')}": _base64(
                storage.read_bytes(storage.join(run, "samples", path))
            )
            for name, path in newest.items()
        },
        attempts=[(f"{datetime.fromtimestamp(r.time / 1000, UTC):%Y-%m-%d %H:%M:%S}", r.step) for r in attempts],
        checkpoints=_folders(storage.join(run, "checkpoints")),
        weights=[name for name in storage.list_names(storage.join(run, "weights")) if name.endswith(".safetensors")],
        config=storage.json_bytes(redact_tree(config.model_dump(mode="json"))).decode(),
    )
    storage.write_bytes(storage.join(run, NAME), page.encode())
    return page


def _rate(records: list[Record]) -> float:
    """Return the mean images per second from the first to the last record, including pauses; 0 if unknown."""
    if len(records) < 2 or records[-1].time <= records[0].time:
        return 0.0
    return 1000 * (records[-1].step - records[0].step) / (records[-1].time - records[0].time)


def _folders(uri: str) -> list[str]:
    """Return the sorted names of the folders in a folder."""
    return sorted({name.split("/")[0] for name in storage.list_names(uri, recursive=True) if "/" in name})


def _png(curves: dict[str, Curve], restarts: list[int]) -> str:
    """Return the curves as a base64-encoded PNG, or "" if there are none."""
    names = [name for name in CURVES if name in curves]
    if not names:
        return ""
    figure, axes = subplots(1, len(names), figsize=(4.3 * len(names), 2.9), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        for shown, style in ((name, "-"), (f"val_{name}", "--")):
            if shown in curves:
                steps, values = zip(*curves[shown], strict=True)
                axis.plot([step / 1000 for step in steps], values, style, color=COLOURS[style == "--"], linewidth=1.2)
        for step in restarts:
            axis.axvline(step / 1000, color="#9aa7b4", linewidth=0.8)
        axis.set(xlabel="thousand images", title=name.replace("_", " "))
        if name == "loss" and min(value for _, value in curves[name]) > 0:
            axis.set_yscale("log")
    return _base64(figure_png(figure))


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
