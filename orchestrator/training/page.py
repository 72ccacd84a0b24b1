"""The report of a training, a self-contained HTML page, and the last lines of a training in the terminal."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from orchestrator import storage
from orchestrator.closing import next_command
from orchestrator.evaluation.page import template
from orchestrator.metrics_log import Record, read_records
from orchestrator.pictures import COLOURS, figure_png, subplots
from orchestrator.redaction import redact_tree
from orchestrator.training.config import Config

REPORT = "report.html"
STARTED = "attempt_started"  # metric that marks the start of an attempt, at its position in images
CURVES = ("loss", "accuracy", "grad_norm")  # metrics to plot, if a run has them, each with its validation metric
NOISE_LEVELS = ("little noise", "some noise", "much noise", "almost pure noise")  # the quartiles of the timesteps
OVERFITTING_GAP = 0.2  # accuracy on training images minus that on validation images, above which a classifier overfits
USEFUL_ACCURACY = 0.5  # minimum at little noise for guidance, on a scale from chance (0) to certainty (1)

PREVIEW = re.compile(r"(?P<average>[^/]+)/images-(?P<images>\d+)\.png")  # the user may generate into samples/, too

Curve = list[tuple[int, float]]


def write_run_page(run: str, config: Config) -> str:
    """Write report.html for the current state of the run, and return the page."""
    records = list(read_records(run))
    curves = _curves(records)
    attempts = [record for record in records if STARTED in record.metrics]
    names = storage.list_names(storage.join(run, "samples"), recursive=True)
    pictures = filter(None, map(PREVIEW.fullmatch, names))
    newest = {match["average"]: match for match in pictures}  # names sort by images
    page = template(Path(__file__).with_suffix(".html")).render(
        run=run,
        images=max((record.step for record in records), default=0),
        total_images=config.total_images,
        rate=_images_per_second(records),
        verdict=classifier_lines(run, config),
        command=command_for_next_job(config),
        curves=_plot_curves(curves, [record.step for record in attempts[1:]]),
        last={name: values[-1] for name, values in sorted(curves.items())},
        previews={
            f"{average} after {int(match['images']):,} images": storage.read_bytes(
                storage.join(run, "samples", match[0])
            )
            for average, match in newest.items()
        },
        attempts=[(f"{datetime.fromtimestamp(r.time / 1000, UTC):%Y-%m-%d %H:%M:%S}", r.step) for r in attempts],
        checkpoints=[name.removesuffix("/") for name in storage.list_names(storage.join(run, "checkpoints"))],
        weights=[name for name in storage.list_names(storage.join(run, "weights")) if name.endswith(".safetensors")],
        config=storage.json_bytes(redact_tree(config.model_dump(mode="json"))).decode(),
    )
    storage.write_bytes(storage.join(run, REPORT), page.encode())
    return page


def classifier_lines(run: str, config: Config) -> list[str]:
    """Return the accuracy of a classifier by quartile of timesteps and a verdict; no lines without metrics."""
    last = {name: curve[-1][1] for name, curve in _curves(read_records(run)).items()}
    metric, images = ("val_accuracy", "validation") if "val_accuracy" in last else ("accuracy", "training")
    if config.model.kind != "classifier" or metric not in last:
        return []
    accuracy, chance = last[metric], 1 / (config.model.num_classes or 1)
    quartiles = [(level, f"{metric}_q{q}") for q, level in enumerate(NOISE_LEVELS)]
    parts = ", ".join(f"{last[name]:.1%} at {level}" for level, name in quartiles if name in last)
    lines = [f"accuracy on {images} images {accuracy:.1%}: {parts} (chance: {chance:.1%})"]
    gap = last.get("accuracy", accuracy) - accuracy
    minimum = USEFUL_ACCURACY + (1 - USEFUL_ACCURACY) * chance
    if gap > OVERFITTING_GAP:
        lines.append(f"verdict: overfitting, {gap:.1%} better on training images; train shorter, or use more data")
    elif last.get(f"{metric}_q0", accuracy) < minimum:
        lines.append(f"verdict: too weak to guide, below {minimum:.1%} at little noise; train longer")
    else:
        lines.append("verdict: it can guide")
    return lines


def command_for_next_job(config: Config) -> str:
    """Return the command for the next job, which uses the weights of this training."""
    if config.model.kind == "classifier":
        return next_command("tune_guidance", classifier=config.output)
    if config.model.low_res_size:
        return next_command("generate_samples", upsampler=config.output)
    return next_command("generate_samples", weights=config.output)


def _curves(records: Iterable[Record]) -> dict[str, Curve]:
    """Return the points (images, value) of each metric; a step that was repeated has its latest value."""
    values: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.metrics.items():
            values.setdefault(name, {})[record.step] = value
    return {name: sorted(points.items()) for name, points in values.items() if name != STARTED}


def _images_per_second(records: list[Record]) -> float:
    """Return the mean rate from the first to the last record, including pauses; 0 if unknown."""
    if len(records) < 2 or records[-1].time <= records[0].time:
        return 0.0
    return 1000 * (records[-1].step - records[0].step) / (records[-1].time - records[0].time)  # time is in ms


def _plot_curves(curves: dict[str, Curve], restarts: list[int]) -> bytes:
    """Return a PNG of the curves, or no bytes if there are none."""
    names = [name for name in CURVES if name in curves]
    if not names:
        return b""
    figure, axes = subplots(1, len(names), figsize=(4.3 * len(names), 2.9), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        for metric, style in ((name, "-"), (f"val_{name}", "--")):
            if metric in curves:
                steps, values = zip(*curves[metric], strict=True)
                axis.plot([step / 1000 for step in steps], values, style, color=COLOURS[style == "--"], linewidth=1.2)
        for step in restarts:
            axis.axvline(step / 1000, color="#9aa7b4", linewidth=0.8)
        axis.set(xlabel="thousand images", title=name.replace("_", " "))
        if name == "loss" and min(value for _, value in curves[name]) > 0:
            axis.set_yscale("log")
    return figure_png(figure)
