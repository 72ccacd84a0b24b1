"""Plots that pages share, as PNG bytes in one style."""

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

matplotlib.rcParams |= {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
COLOURS = ("#1b6ca8", "#d1603d", "#3f7d4e", "#8a4f9e")


def copies_figure(distances: dict[str, list[float]]) -> bytes:
    """Histograms: how far samples, and held-out real images, are from their nearest training image."""
    figure, axis = plt.subplots(figsize=(8.6, 2.6))
    bins = np.linspace(0, max(map(max, distances.values())), 50).tolist()
    labels = {"samples": "samples", "held_out": "held-out real images"}
    for colour, (name, found) in zip(COLOURS, distances.items(), strict=False):
        axis.hist(found, bins=bins, density=True, alpha=0.55, color=colour, label=labels[name])
    axis.set(xlabel="root mean square distance to the nearest training image, grey levels of 255", yticks=[])
    axis.legend(frameon=False)
    return figure_png(figure)


def figure_png(figure: Any) -> bytes:
    """The figure as PNG bytes; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()
