"""Conversion of weights: the published code's `.pt`, safetensors with their architecture, folders for diffusers."""

from typing import Literal

import safetensors.torch
from pydantic import Field, model_validator

from models.unet import UNetConfig
from orchestrator import storage
from orchestrator.checkpoints import Network, encode_weights, load_network
from orchestrator.config import JobConfig
from orchestrator.diffusers_folder import WEIGHTS_FILE, diffusers_config, diffusers_tensors
from orchestrator.state_dicts import encode_state_dict, released_entry


class ConversionConfig(JobConfig):
    """What to convert, and into what."""

    source: str = Field(min_length=1)  # a training run's folder, a .safetensors file or a .pt file
    output: str = Field(min_length=1)  # a .safetensors or .pt file, or with format=diffusers a folder
    format: Literal["diffusers"] | None = None  # diffusers = a UNet2DModel folder; None = the output's ending says
    like: str | None = None  # the zoo's name for a .pt source whose file is not called as released

    @model_validator(mode="after")
    def _check_names(self) -> "ConversionConfig":
        is_file = self.output.endswith((".safetensors", ".pt"))
        if self.format is None and not is_file:
            raise ValueError(
                f"output={self.output} ends neither in .safetensors nor in .pt; a folder needs format=diffusers"
            )
        if self.format is not None and is_file:
            raise ValueError(f"output={self.output} names a file, and format=diffusers makes a folder")
        if self.source.endswith(".pt"):
            released_entry(self.source, self.like)
        elif self.like is not None:
            raise ValueError(f"like={self.like!r} is for .pt files; source={self.source} carries its architecture")
        return self


def convert(config: ConversionConfig) -> str:
    """Read the source, check it, write it as the output asks; answer the output's URI.

    The same conversion again finds its output and is done.

    Raises:
        FileNotFoundError: no source.
        ValueError: the source is damaged or no such file, the output's format cannot express the network, or there
            is another output already.
    """
    source, output = config.path(config.source), config.path(config.output)
    network = load_network(source, like=config.like)
    for uri, data in _objects(network, output).items():
        if not storage.create_bytes(uri, data) and storage.read_bytes(uri) != data:
            raise ValueError(f"{uri} is there already and holds something else; choose another --output")
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    print(f"{output}: {type(network.module).__name__} of {parameters:,} parameters from {source}")
    return output


def plan(config: ConversionConfig) -> str:
    """What a conversion would read and write."""
    return f"reads   {config.path(config.source)}\nwrites  {config.path(config.output)}"


def _objects(network: Network, output: str) -> dict[str, bytes]:
    """What the output consists of: URI -> bytes."""
    weights = network.module.state_dict()
    if output.endswith(".safetensors"):
        return {output: encode_weights(weights, network.architecture, network.diffusion, network.classes)}
    if output.endswith(".pt"):
        return {output: encode_state_dict(weights, network.architecture)}
    config = diffusers_config(network.architecture)
    assert isinstance(network.architecture, UNetConfig)  # others were refused
    tensors = diffusers_tensors(network.architecture, weights)
    return {
        storage.join(output, WEIGHTS_FILE): safetensors.torch.save(tensors, metadata={"format": "pt"}),
        storage.join(output, "config.json"): storage.json_bytes(config),
    }
