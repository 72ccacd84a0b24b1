"""Previews of a training: pictures of samples, which always have the same noise and labels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.collectives import Group
from models.images import area_downsample, from_uint8, to_uint8
from models.unet import autocast
from orchestrator.data.dataset import Manifest, read_images
from orchestrator.generation.sampling import sample_batch
from orchestrator.pictures import grid_png
from orchestrator.training.config import AdmConfig
from orchestrator.training.state import TrainingState
from orchestrator.weights.network import Network

SAMPLES = 40  # images in a picture
COLUMNS = 10
SMALLEST_SIDE = 32  # pixels; smaller images are enlarged


def previews(config: AdmConfig, state: TrainingState, manifest: Manifest, group: Group) -> Iterator[dict[str, Any]]:
    """Yield a record with a picture for each average of the weights, on rank 0.

    All workers must iterate, because each of them generates a share of the samples.
    """
    device = next(state.model.parameters()).device
    module = config.model.build().to(device).eval()
    network = Network(module, config.model, config.diffusion, manifest.classes, sha256="")
    state.settle()
    for name, average in state.averages.items():
        module.load_state_dict(average)
        with autocast(device, config.dtype):
            share = _generate_share(config, network, manifest, group)
        images = np.concatenate(group.gather(share))
        if group.rank == 0:
            scale = max(1, SMALLEST_SIDE // config.model.image_size)
            picture = grid_png(images, COLUMNS, scale)
            yield {"picture": f"samples/{name}/images-{state.position:012d}.png", "png": picture}


def _generate_share(config: AdmConfig, network: Network, manifest: Manifest, group: Group) -> np.ndarray:
    """Return this worker's share of the samples, uint8 [n, H, W, 3]."""
    size, channels = config.model.image_size, config.model.in_channels
    share = np.array_split(np.arange(SAMPLES), group.world_size)[group.rank]
    parts = [np.zeros((0, size, size, 3), np.uint8)]
    rows = config.microbatch_rows(group.world_size)  # fits into memory, because training does
    for begin in range(0, len(share), rows):
        indices = share[begin : begin + rows]
        labels, low_res = indices % max(1, len(manifest.classes)), None
        if config.model.low_res_size:  # an upsampler gets downsampled real images
            pixels, labels = read_images(manifest, "train", indices[0], indices[-1] + 1, size)
            x = from_uint8(torch.from_numpy(pixels), channels)
            low_res = to_uint8(area_downsample(x, config.model.low_res_size)).numpy()
        parts.append(sample_batch(network, config.preview, indices, labels, config.seed, low_res=low_res))
    return np.concatenate(parts)
