"""Conversion of weights between `.pt` files of the published code, safetensors and diffusers folders."""

from functools import partial

import safetensors.torch

from models.diffusion import DiffusionConfig
from models.unet import Architecture
from orchestrator import storage
from orchestrator.weights.config import ConversionConfig
from orchestrator.weights.diffusers_folder import WEIGHTS_FILE, diffusers_config, diffusers_tensors
from orchestrator.weights.flags import parse_flags
from orchestrator.weights.network import (
    Network,
    describe_entry,
    load_network,
    load_published,
    weights_file,
    weights_header,
)
from orchestrator.weights.published import encode_state_dict, entry_by_file_name, released_entry
from orchestrator.weights.shapes import Shapes, invisible_settings


def convert(config: ConversionConfig) -> str:
    """Convert weights and return the URI of the output. If the output exists and is equal, write nothing.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: the weights are damaged or do not fit the architecture, the format of the output cannot express the
            network, or another output exists.
    """
    source, output = config.path(config.weights), config.path(config.output)
    is_published = source.endswith(".pt")
    weights_uri = config.path(weights_file(config.weights, config.path))
    network = load_published(source, partial(_describe_network, config)) if is_published else load_network(weights_uri)
    for uri, data in _encode_output(network, output).items():
        if not storage.put_if_absent(uri, data) and storage.read_bytes(uri) != data:
            raise ValueError(f"{uri} exists and has other content; pass another --output, or delete it")
    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    print(f"{output}: {type(network.module).__name__} of {parameters:,} parameters from {weights_uri}")
    if is_published:
        print(_assumptions(config, network))
    return output


def plan(config: ConversionConfig) -> tuple[ConversionConfig, str]:
    """Return the config, and the text of a dry run: what a conversion would read and write."""
    source = config.path(config.weights)
    lines = [f"reads   {source}", f"writes  {config.path(config.output)}", *_ignored_flags(config)]
    return config, "\n".join(lines if storage.exists(source) else [*lines, f"not there yet: {source}"])


def _describe_network(config: ConversionConfig, shapes: Shapes) -> tuple[Architecture, DiffusionConfig]:
    """Return the architecture and diffusion of a `.pt` file with these tensors, by the options of the config.

    Raises:
        ValueError: the options define no valid network, or another one was released under the file's name.
    """
    if config.flags is not None:
        described = parse_flags(config.flags, config.flags_from).describe(shapes)
    elif config.uses_model:
        described = config.model.architecture(shapes), config.diffusion
    else:
        described = describe_entry(released_entry(config.weights, config.recipe), shapes)
    released = entry_by_file_name(config.weights)
    if released and described != describe_entry(released, shapes):
        raise ValueError(
            f"{config.described_by} contradicts the name of --weights {config.weights}, which was released as another "
            "model; rename the file if it is not the released one, or omit the options"
        )
    return described


def _assumptions(config: ConversionConfig, network: Network) -> str:
    """Return lines that list the settings which the weights do not determine, and their origin."""
    settings = _format_settings(invisible_settings(network.architecture))
    diffusion = _format_settings(network.diffusion.model_dump())
    lines = [
        f"classes: {network.architecture.num_classes or 'none'} (from the file)",
        f"not in the file: {settings} (from {config.described_by})",
        f"not in the file: diffusion {diffusion} (from {config.described_by})",
        *_ignored_flags(config),
        "If one of these settings is wrong, only samples show it: look at some before you use the weights.",
    ]
    return "\n".join(lines)


def _ignored_flags(config: ConversionConfig) -> list[str]:
    """Return the line that says which of the user's flags are ignored; none without --flags."""
    if config.flags is None:
        return []
    parsed = parse_flags(config.flags, config.flags_from)
    ignored = ", ".join(f"--{flag}" for flag in parsed.ignored) or "none"
    return [f"flags: of {' or '.join(parsed.codes)}; ignored, since they do not change the network: {ignored}"]


def _format_settings(settings: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _encode_output(network: Network, output: str) -> dict[str, bytes]:
    """Return the content of the output's objects, by URI."""
    weights = network.module.state_dict()
    if output.endswith(".safetensors"):
        header = weights_header(network.architecture, network.diffusion, network.classes)
        return {output: safetensors.torch.save(weights, header)}
    if output.endswith(".pt"):
        return {output: encode_state_dict(weights, network.architecture)}
    config = diffusers_config(network.architecture)
    tensors = diffusers_tensors(network.architecture, weights)
    return {
        storage.join(output, WEIGHTS_FILE): safetensors.torch.save(tensors, metadata={"format": "pt"}),
        storage.join(output, "config.json"): storage.json_bytes(config),
    }
