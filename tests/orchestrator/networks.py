"""Small networks with random non-zero weights, for tests of sampling."""

import torch

from models.diffusion import DiffusionConfig
from models.unet import ClassifierConfig, UNetConfig
from orchestrator import storage
from orchestrator.weights.network import save_weights

UNET = UNetConfig(
    image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=10
)
CLASSIFIER = ClassifierConfig(
    image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=10,
    num_head_channels=16,
)  # fmt: skip
CLASSES = tuple("0123456789")


def save_network(folder: str, name: str, architecture: UNetConfig | ClassifierConfig, seed: int = 1) -> str:
    """Write a network with random weights to `folder`/`name`, and return its URI."""
    torch.manual_seed(seed)
    state = architecture.build().state_dict()
    weights = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in state.items()}
    uri = storage.join(folder, name)
    save_weights(uri, weights, architecture, DiffusionConfig(), CLASSES)
    return uri
