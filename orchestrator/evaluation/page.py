"""An evaluation's page: one self-contained HTML file with the table, grids of samples and their nearest neighbours."""

import base64
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from models.images import area_downsample
from orchestrator import storage
from orchestrator.evaluation.extraction import chosen
from orchestrator.evaluation.inputs import ImageSet
from orchestrator.evaluation.measurement import Measurement
from orchestrator.evaluation.metrics import metric_named
from orchestrator.evaluation.references import Reference
from orchestrator.pictures import distances_figure, grid_png

COLUMNS = 10
NUM_RANDOM = 100
NUM_EXTREME = 40  # best, and worst
NUM_CLASSES = 10  # rows of the grid by class
SHOWN_PIXELS = 64  # about the size of an image on the page: smaller ones are enlarged, larger ones shrunk
READ_ROWS = 512  # images are looked up in such ranges


def template(path: Path) -> jinja2.Template:
    """Load the template of a page, which extends frame.html of this folder."""
    loader = jinja2.FileSystemLoader([path.parent, Path(__file__).parent])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(path.name)


def evaluation_page(
    report: dict[str, Any], images: ImageSet, reference: Reference, measured: Measurement, labels: np.ndarray
) -> tuple[str, dict[str, bytes]]:
    """The page of report.json's content, and its pictures (PNG) by name."""
    pictures = _pictures(images, reference, measured, labels)
    if distances := report["nearest_training_image"]:
        pictures["copies"] = distances_figure(distances)
    page = template(Path(__file__).with_suffix(".html")).render(
        report=report,
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        metrics={name: metric_named(name) for name in report["metrics"]},
        num_training=reference.files.count if reference.files else 0,
        config=storage.json_bytes(report["reproduce"]["config"]).decode(),
    )
    return page, pictures


def _pictures(images: ImageSet, reference: Reference, measured: Measurement, labels: np.ndarray) -> dict[str, bytes]:
    pictures = {"random": _grid(_pick(images, chosen(images.count, NUM_RANDOM)))}
    if len(measured.rows):
        order = measured.rows[np.argsort(-measured.realism, kind="stable")]
        pictures["best"] = _grid(_pick(images, order[:NUM_EXTREME]))
        pictures["worst"] = _grid(_pick(images, order[::-1][:NUM_EXTREME]))
    classes = np.unique(labels[labels >= 0])
    rows = [np.flatnonzero(labels == c)[:COLUMNS] for c in classes[chosen(len(classes), NUM_CLASSES)]]
    if full := [row for row in rows if len(row) == COLUMNS]:
        pictures["by_class"] = _grid(_pick(images, np.concatenate(full)))
    if measured.closest is not None and reference.images is not None:
        pairs = measured.closest.first(COLUMNS)
        above = _pick(images, np.array([pair["sample"] for pair in pairs]))
        below = _pick(reference.images, np.array([pair["training_image"] for pair in pairs]))
        pictures["closest"] = _grid(np.concatenate([_small(above), _small(below)]), columns=len(pairs))
    return pictures


def _pick(images: ImageSet, indices: np.ndarray) -> np.ndarray:
    """The images of these indices, in their order; each range of 512 is read once."""
    found: dict[int, np.ndarray] = {}
    for block in np.unique(indices // READ_ROWS):
        here = indices[indices // READ_ROWS == block]
        begin = int(here.min())
        pixels, _ = images.read(begin, int(here.max()) + 1)
        found |= {int(i): pixels[i - begin] for i in here}
    return np.stack([found[int(i)] for i in indices])


def _small(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3], large ones shrunk by means over areas."""
    if min(images.shape[1:3]) <= SHOWN_PIXELS:
        return images
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return area_downsample(x, SHOWN_PIXELS).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _grid(images: np.ndarray, columns: int = COLUMNS) -> bytes:
    small = _small(images)
    return grid_png(small, columns=columns, scale=max(1, SHOWN_PIXELS // small.shape[1] // 2), gap=2)
