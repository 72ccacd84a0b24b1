"""What a generation will read, write and cost, from the architectures alone."""

from typing import NamedTuple

from models.guidance import GuidanceConfig
from models.unet import ClassifierConfig, UNetConfig
from orchestrator import storage
from orchestrator.checkpoints import load_network
from orchestrator.estimate import Cost, fits, priced, sampling_cost, sampling_flops
from orchestrator.generation.sampling import GenerationConfig, evaluations
from orchestrator.state_dicts import released_entry

UNGUIDED = GuidanceConfig()
ASSUMED_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # images, where B is yet to be probed: the first that fits


class Outline(NamedTuple):
    """What the price needs of a network."""

    uri: str
    architecture: UNetConfig | ClassifierConfig
    num_timesteps: int


def price(config: GenerationConfig, images: int) -> list[str]:
    """Lines for people: what `images` images read, write and cost, with the assumptions."""
    base = outline(config, config.weights, config.like)
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
            priced(cost, config.price, config.num_workers, half)
            for cost in costs(config, images, base, classifier, upsampler)
        ),
    ]


def outline(config: GenerationConfig, path: str, like: str | None = None) -> Outline:
    """Of a released file by its name alone, so that it need not be there yet; of others from their file."""
    uri = config.path(path)
    if uri.endswith(".pt"):
        entry = released_entry(uri, like)
        return Outline(uri, entry.network, entry.diffusion.num_timesteps)
    network = load_network(uri)
    return Outline(uri, network.architecture, network.diffusion.num_timesteps)


def costs(
    config: GenerationConfig, images: int, base: Outline, classifier: Outline | None, upsampler: Outline | None
) -> list[Cost]:
    """Of each stage, in batches as large as the card holds, where they are yet to be probed."""
    for batch in [config.batch_size] if config.batch_size else ASSUMED_BATCHES:
        found = _costs_in_batches(config, images, batch, base, classifier, upsampler)
        if all(fits(cost, config.price) for cost in found):
            break
    return found


def _costs_in_batches(
    config: GenerationConfig,
    images: int,
    batch: int,
    base: Outline,
    classifier: Outline | None,
    upsampler: Outline | None,
) -> list[Cost]:
    """Outside the interval of guidance the classifier is not evaluated."""
    half = config.dtype != "float32"
    guide = classifier.architecture if classifier and config.guidance.scale else None
    steps = evaluations(config.sampler, UNGUIDED)
    cost = sampling_cost(base.architecture, steps, images, batch, half, guide)
    if guide and config.guidance.interval is not None:
        first, last = config.guidance.interval
        share = min(1.0, (last - first + 1) / base.num_timesteps)
        unguided = sampling_flops(base.architecture, steps)
        flops = unguided + share * (cost.flops_per_image - unguided)
        cost = cost._replace(flops_per_image=flops, note=f"{cost.note} in {share:.0%} of them")
    if upsampler is None:
        return [cost]
    steps = evaluations(config.upsampling, UNGUIDED)
    return [cost, sampling_cost(upsampler.architecture, steps, images, batch, half)]
