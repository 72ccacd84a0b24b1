"""What a generation will read, write and cost, from the architectures alone."""

from collections.abc import Mapping
from typing import NamedTuple

from models.costs import sampling_evaluations
from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.unet import Architecture
from orchestrator import storage
from orchestrator.cost import Cost, fits, priced, sampling_cost
from orchestrator.generation.config import GenerationConfig
from orchestrator.weights.imported import is_imported
from orchestrator.weights.network import load_network
from orchestrator.weights.published import released_entry

UNGUIDED = GuidanceConfig()
ASSUMED_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # images, where B is yet to be probed: the first that fits


class Outline(NamedTuple):
    """What the cost of sampling depends on."""

    uri: str
    architecture: Architecture
    diffusion: DiffusionConfig


def cost_lines(config: GenerationConfig, images: int) -> list[str]:
    """Return the lines of a plan: what `images` images read, write and cost, with the assumptions."""
    base = outline(config, config.weights, config.recipe)
    classifier = classifier_outline(config)
    upsampler = outline(config, config.upsampler) if config.upsampler else None
    weak = outline(config, config.guidance.weak_weights) if config.guidance.weak_weights else None
    networks = [network for network in (base, classifier, upsampler, weak) if network]
    absent = [network.uri for network in networks if not storage.exists(network.uri)]
    written = images * sum(3 * network.architecture.image_size**2 for network in (base, upsampler) if network)
    guides = {"classifier": classifier, "classifier_free": base, "auto": weak}
    half = config.dtype != "float32"
    return [
        f"reads   {', '.join(network.uri for network in networks)}",
        *([f"        not there yet: {', '.join(absent)}"] if absent else []),
        f"writes  {written / 1e9:,.3g} GB at most",
        *([f"        not counted: --classifier {config.classifier}"] if config.classifier and not classifier else []),
        *(
            priced(cost, config.cost, config.num_workers, half)
            for cost in costs(config, images, base, guides, upsampler)
        ),
    ]


def outline(config: GenerationConfig, path: str, recipe: str | None = None) -> Outline:
    """Of a released file by its name alone, so that it need not be there yet; of others from their file."""
    uri = config.path(path)
    if uri.endswith(".pt"):
        entry = released_entry(uri, recipe)
        return Outline(uri, entry.network, entry.diffusion)
    network = load_network(uri)
    return Outline(uri, network.architecture, network.diffusion)


def classifier_outline(config: GenerationConfig) -> Outline | None:
    """Return the outline of the classifier; None where there is none, or one that is imported."""
    return outline(config, config.classifier) if config.classifier and not is_imported(config.classifier) else None


def costs(
    config: GenerationConfig,
    images: int,
    base: Outline,
    guides: Mapping[str, Outline | None],
    upsampler: Outline | None,
) -> list[Cost]:
    """Return the cost of each stage, in batches as large as the card holds where B is left open.

    guides: by kind of guidance, the network that it evaluates beside the model.
    """
    half, guidance = config.dtype != "float32", config.guidance
    guided_by = guides.get(guidance.kind) if guidance.scale else None
    guide = guided_by.architecture if guided_by else None
    evaluations = sampling_evaluations(config.sampler, guidance, base.diffusion)
    for batch in [config.batch_size] if config.batch_size else ASSUMED_BATCHES:
        found = [sampling_cost(base.architecture, evaluations, images, batch, half, guide)]
        if upsampler is not None:
            enlarging = sampling_evaluations(config.upsampling, UNGUIDED, upsampler.diffusion)
            found.append(sampling_cost(upsampler.architecture, enlarging, images, batch, half))
        if all(fits(cost, config.cost) for cost in found):
            break
    return found
