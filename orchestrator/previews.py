"""Pictures of samples while a model is being trained, on noise and labels that are the same every time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from models.images import from_uint8, shrink, to_uint8
from orchestrator import checkpoints
from orchestrator.dataset import Manifest, read_images
from orchestrator.pictures import grid_png
from orchestrator.sampling import sample_batch
from orchestrator.training_config import AdmConfig
from orchestrator.training_state import TrainingState

SAMPLES = 40  # images in a picture
COLUMNS = 10
SMALLEST_SIDE = 32  # pixels that an image is at least shown with


def previews(config: AdmConfig, state: TrainingState, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """One picture for each average of the weights, as records for the driver."""
    device = next(state.model.parameters()).device
    module = checkpoints.build(config.model).to(device).eval()
    network = checkpoints.Network(module, config.model, config.diffusion, manifest.classes, sha256="")
    indices = np.arange(SAMPLES)
    labels, small = indices % max(1, len(manifest.classes)), None
    if config.model.low_res_size:  # an upsampler is shown on real images, made small
        pixels, labels = read_images(manifest, "train", 0, SAMPLES, config.model.image_size)
        small = to_uint8(shrink(from_uint8(torch.from_numpy(pixels)), config.model.low_res_size)).numpy()
    at_once = config.microbatch_size or SAMPLES  # what fits in training fits here
    for name, average in state.averages.items():
        module.load_state_dict(average)
        parts = [
            sample_batch(
                network,
                config.preview,
                indices[begin : begin + at_once],
                labels[begin : begin + at_once],
                config.order.seed,
                low_res=None if small is None else small[begin : begin + at_once],
            )
            for begin in range(0, SAMPLES, at_once)
        ]
        scale = max(1, SMALLEST_SIDE // config.model.image_size)
        picture = grid_png(np.concatenate(parts), COLUMNS, scale)
        yield {"picture": f"samples/{name}/images-{state.position:012d}.png", "png": picture}
