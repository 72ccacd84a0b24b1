"""What a generation will read, write and cost, from the architectures alone."""

from typing import NamedTuple

from models.costs import sampling_evaluations
from models.guidance import GuidanceConfig
from models.unet import Architecture
from orchestrator import storage
from orchestrator.cost import Cost, fits, priced, sampling_cost
from orchestrator.generation.config import GenerationConfig
from orchestrator.weights.network import load_network
from orchestrator.weights.published import released_entry

UNGUIDED = GuidanceConfig()
ASSUMED_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # images, where B is yet to be probed: the first that fits


class Outline(NamedTuple):
    """What the cost of sampling depends on."""

    uri: str
    architecture: Architecture
    num_timesteps: int


def cost_lines(config: GenerationConfig, images: int) -> list[str]:
    """Return the lines of a plan: what `images` images read, write and cost, with the assumptions."""
    base = outline(config, config.weights, config.recipe)
    classifier = outline(config, config.classifier) if config.classifier else None
    upsampler = outline(config, config.upsampler) if config.upsampler else None
    networks = [network for network in (base, classifier, upsampler) if network]
    absent = [network.uri for network in networks if not storage.exists(network.uri)]
    written = images * sum(3 * network.architecture.image_size**2 for network in (base, upsampler) if network)
    half = config.dtype != "float32"
    return [
        f"reads   {', '.join(network.uri for network in networks)}",
        *([f"        not there yet: {', '.join(absent)}"] if absent else []),
        f"writes  {written / 1e9:,.3g} GB at most",
        *(
            priced(cost, config.cost, config.num_workers, half)
            for cost in costs(config, images, base, classifier, upsampler)
        ),
    ]


def outline(config: GenerationConfig, path: str, recipe: str | None = None) -> Outline:
    """Of a released file by its name alone, so that it need not be there yet; of others from their file."""
    uri = config.path(path)
    if uri.endswith(".pt"):
        entry = released_entry(uri, recipe)
        return Outline(uri, entry.network, entry.diffusion.num_timesteps)
    network = load_network(uri)
    return Outline(uri, network.architecture, network.diffusion.num_timesteps)


def costs(
    config: GenerationConfig, images: int, base: Outline, classifier: Outline | None, upsampler: Outline | None
) -> list[Cost]:
    """Of each stage, in batches as large as the card holds, where they are yet to be probed."""
    half = config.dtype != "float32"
    guide = classifier.architecture if classifier and config.guidance.scale else None
    evaluations = sampling_evaluations(config.sampler, config.guidance, base.num_timesteps)
    for batch in [config.batch_size] if config.batch_size else ASSUMED_BATCHES:
        found = [sampling_cost(base.architecture, evaluations, images, batch, half, guide)]
        if upsampler is not None:
            enlarging = sampling_evaluations(config.upsampling, UNGUIDED, upsampler.num_timesteps)
            found.append(sampling_cost(upsampler.architecture, enlarging, images, batch, half))
        if all(fits(cost, config.cost) for cost in found):
            break
    return found
