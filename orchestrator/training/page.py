"""The page of a training, a self-contained HTML file, and the last lines of a training in the terminal."""

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

NAME = "report.html"
STARTED = "attempt_started"  # metric that marks the start of an attempt, at its position in images
CURVES = ("loss", "accuracy", "grad_norm")  # those that a run has; validation metrics share their axes
LEVELS = ("little noise", "some noise", "much noise", "almost pure noise")  # the quartiles of the timesteps
GAP = 0.2  # difference of accuracy between training and validation images from which a classifier overfits
USEFUL = 0.5  # least accuracy at little noise, from chance (0) to certainty (1), of a classifier that can guide

Curve = list[tuple[int, float]]


def write_run_page(run: str, config: Config) -> str:
    """Write report.html of the run as it stands now, and return the page."""
    records = list(read_records(run))
    curves = _curves(records)
    attempts = [record for record in records if STARTED in record.metrics]
    pictures = storage.list_names(storage.join(run, "samples"), recursive=True)
    newest = {name.split("/")[0]: name for name in pictures}  # of each average; names sort by images
    page = template(Path(__file__).with_suffix(".html")).render(
        run=run,
        images=max((record.step for record in records), default=0),
        total_images=config.total_images,
        rate=_rate(records),
        verdict=classifier_lines(run, config),
        command=following(config),
        curves=_png(curves, [record.step for record in attempts[1:]]),
        last={name: values[-1] for name, values in sorted(curves.items())},
        previews={
            f"{name} after {int(Path(path).stem.removeprefix('images-')):,} images": storage.read_bytes(
                storage.join(run, "samples", path)
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


def classifier_lines(run: str, config: Config) -> list[str]:
    """Return the accuracy of a classifier by quartile of timesteps and a verdict; none without metrics."""
    last = {name: curve[-1][1] for name, curve in _curves(read_records(run)).items()}
    shown, images = ("val_accuracy", "validation") if "val_accuracy" in last else ("accuracy", "training")
    if config.model.kind != "classifier" or shown not in last:
        return []
    accuracy, chance = last[shown], 1 / (config.model.num_classes or 1)
    quartiles = [(level, f"{shown}_q{q}") for q, level in enumerate(LEVELS)]
    parts = ", ".join(f"{last[name]:.1%} at {level}" for level, name in quartiles if name in last)
    lines = [f"accuracy on {images} images {accuracy:.1%}: {parts} (chance: {chance:.1%})"]
    if (gap := last.get("accuracy", accuracy) - accuracy) > GAP:
        lines.append(f"verdict: overfitting, {gap:.1%} better on training images; train shorter, or use more data")
    elif last.get(f"{shown}_q0", accuracy) < (least := USEFUL + (1 - USEFUL) * chance):
        lines.append(f"verdict: too weak to guide, below {least:.1%} at little noise; train longer")
    else:
        lines.append("verdict: it can guide")
    return lines


def following(config: Config) -> str:
    """Return the command for the next job, which uses the weights of this training."""
    if config.model.kind == "classifier":
        return next_command("tune_guidance", classifier=config.output)
    if config.model.low_res_size:
        return next_command("generate_samples", upsampler=config.output)
    return next_command("generate_samples", weights=config.output)


def _curves(records: Iterable[Record]) -> dict[str, Curve]:
    """Return each metric by images seen; a step that was repeated has its latest value."""
    values: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.metrics.items():
            values.setdefault(name, {})[record.step] = value
    return {name: sorted(points.items()) for name, points in values.items() if name != STARTED}


def _rate(records: list[Record]) -> float:
    """Return the mean images per second from the first to the last record, including pauses; 0 if unknown."""
    if len(records) < 2 or records[-1].time <= records[0].time:
        return 0.0
    return 1000 * (records[-1].step - records[0].step) / (records[-1].time - records[0].time)


def _folders(uri: str) -> list[str]:
    """Return the sorted names of the folders in a folder."""
    return sorted({name.split("/")[0] for name in storage.list_names(uri, recursive=True) if "/" in name})


def _png(curves: dict[str, Curve], restarts: list[int]) -> bytes:
    """Return the curves as a PNG, or no bytes if there are none."""
    names = [name for name in CURVES if name in curves]
    if not names:
        return b""
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
    return figure_png(figure)
