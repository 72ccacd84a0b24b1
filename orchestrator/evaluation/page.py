"""The HTML page of an evaluation: a single file with tables, grids of samples, and their nearest training images."""

import base64
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from models.images import area_downsample
from orchestrator import storage
from orchestrator.evaluation.extraction import choose_rows
from orchestrator.evaluation.inputs import ImageSet
from orchestrator.evaluation.measurement import Measurement
from orchestrator.evaluation.metrics import bias_note, metric_named
from orchestrator.evaluation.references import Reference
from orchestrator.pictures import distances_figure, grid_png
from orchestrator.redaction import redact

COLUMNS = 10  # images in a row of a grid
NUM_RANDOM = 100  # random samples
NUM_EXTREME = 40  # samples with the highest, and with the lowest realism
NUM_CLASSES = 10  # rows of the grid by class
SHOWN_PIXELS = 64  # approximate size of images on the page


def template(path: Path) -> jinja2.Template:
    """Return the template of a page, which extends frame.html in this folder; it redacts text, and embeds PNG bytes."""
    loader = jinja2.FileSystemLoader([path.parent, Path(__file__).parent])

    def finalize(value: Any) -> Any:
        if isinstance(value, bytes):
            return f"data:image/png;base64,{base64.b64encode(value).decode()}"
        return redact(value) if type(value) is str else value  # macros return a subclass of str, which stays HTML

    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=finalize
    ).get_template(path.name)


def evaluation_page(
    report: dict[str, Any], images: ImageSet, reference: Reference, measured: Measurement, labels: np.ndarray
) -> tuple[str, dict[str, bytes]]:
    """Return the page for the content of report.json, and its pictures (PNG) by name."""
    pictures = _pictures(images, reference, measured, labels)
    if distances := report["nearest_training_image"]:
        pictures["copies"] = distances_figure(distances)
    page = template(Path(__file__).with_suffix(".html")).render(
        report=report,
        pictures=pictures,
        metrics={name: metric_named(name) for name in report["metrics"]},
        bias_note=bias_note,
        generation_settings=_generation_settings(report["samples"]["made_by"]),
        num_training=reference.files.count if reference.files else 0,
        config=storage.json_bytes(report["reproduce"]["config"]).decode(),
    )
    return page, pictures


def _generation_settings(made_by: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings with which samples were generated, as (name, value), if their folder records them."""
    config, record = made_by.get("config", {}), made_by.get("record", {})
    settings = []
    for network in ("weights", "classifier", "upsampler"):
        if config.get(network):
            settings.append((network, f"{record.get(network) or 'unnamed'}, SHA-256 {config[network]}"))
    for part in ("sampler", "upsampling", "guidance"):
        fields = [f"{name} {value}" for name, value in config.get(part, {}).items() if value is not None]
        if fields:
            settings.append((part, ", ".join(fields)))
    names = ("labels", "seed", "dtype", "rounding", "clip")
    return settings + [(name, str(config[name])) for name in names if name in config]


def _pictures(images: ImageSet, reference: Reference, measured: Measurement, labels: np.ndarray) -> dict[str, bytes]:
    pictures = {"random": _grid(images.pick(choose_rows(images.count, NUM_RANDOM))[0])}
    if len(measured.rows):
        order = measured.rows[np.argsort(-measured.realism, kind="stable")]
        pictures["best"] = _grid(images.pick(order[:NUM_EXTREME])[0])
        pictures["worst"] = _grid(images.pick(order[::-1][:NUM_EXTREME])[0])
    classes = np.unique(labels[labels >= 0])
    rows = [np.flatnonzero(labels == c)[:COLUMNS] for c in classes[choose_rows(len(classes), NUM_CLASSES)]]
    full_rows = [row for row in rows if len(row) == COLUMNS]
    if full_rows:
        pictures["by_class"] = _grid(images.pick(np.concatenate(full_rows))[0])
    if measured.closest is not None and reference.images is not None:
        pairs = measured.closest.first(COLUMNS)
        samples = images.pick(np.array([pair["sample"] for pair in pairs]))[0]
        training = reference.images.pick(np.array([pair["training_image"] for pair in pairs]))[0]
        pictures["closest"] = _grid(np.concatenate([_downsample(samples), _downsample(training)]), columns=len(pairs))
    return pictures


def _downsample(images: np.ndarray) -> np.ndarray:
    """Downsample large images uint8 [n, H, W, 3] by means over areas."""
    if min(images.shape[1:3]) <= SHOWN_PIXELS:
        return images
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return area_downsample(x, SHOWN_PIXELS).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _grid(images: np.ndarray, columns: int = COLUMNS) -> bytes:
    small = _downsample(images)
    return grid_png(small, columns=columns, scale=max(1, SHOWN_PIXELS // small.shape[1] // 2), gap=2)
