"""Conversion of weights: the published code's `.pt`, safetensors with their architecture, folders for diffusers."""

import safetensors.torch

from orchestrator import storage
from orchestrator.weights.config import ConversionConfig
from orchestrator.weights.diffusers_folder import WEIGHTS_FILE, diffusers_config, diffusers_tensors
from orchestrator.weights.network import Network, encode_weights, load_network
from orchestrator.weights.published import encode_state_dict


def convert(config: ConversionConfig) -> str:
    """Read the source, check it, write it as the output asks; return the output's URI.

    The same conversion again finds its output and is done.

    Raises:
        FileNotFoundError: no source.
        ValueError: the source is damaged or no such file, the output's format cannot express the network, or there
            is another output already.
    """
    source, output = config.path(config.weights), config.path(config.output)
    network = load_network(source, recipe=config.recipe)
    for uri, data in _objects(network, output).items():
        if not storage.put_if_absent(uri, data) and storage.read_bytes(uri) != data:
            raise ValueError(f"{uri} is there already and holds something else; choose another --output")
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    print(f"{output}: {type(network.module).__name__} of {parameters:,} parameters from {source}")
    return output


def plan(config: ConversionConfig) -> str:
    """What a conversion would read and write."""
    return f"reads   {config.path(config.weights)}\nwrites  {config.path(config.output)}"


def _objects(network: Network, output: str) -> dict[str, bytes]:
    """What the output consists of: URI -> bytes."""
    weights = network.module.state_dict()
    if output.endswith(".safetensors"):
        return {output: encode_weights(weights, network.architecture, network.diffusion, network.classes)}
    if output.endswith(".pt"):
        return {output: encode_state_dict(weights, network.architecture)}
    config = diffusers_config(network.architecture)
    tensors = diffusers_tensors(network.architecture, weights)
    return {
        storage.join(output, WEIGHTS_FILE): safetensors.torch.save(tensors, metadata={"format": "pt"}),
        storage.join(output, "config.json"): storage.json_bytes(config),
    }
