"""What a generation will cost, from the architectures alone: operations, memory, bytes, GPU-hours."""

from typing import NamedTuple

from models.guidance import GuidanceConfig
from models.unet import ClassifierConfig, UNetConfig
from models.zoo import count_parameters, forward_multiply_adds
from orchestrator import storage
from orchestrator.checkpoints import load_network
from orchestrator.sampling import GenerationConfig, evaluations
from orchestrator.state_dicts import released_entry

PEAK_FLOPS = {"V100": 125e12, "A100": 312e12, "H100": 989e12}  # dense 16 bit, by the maker's data sheets
UTILIZATION = 0.4  # of the peak, which good code reaches; the published code reached 0.14 (guided ADM-256, A100)
UNGUIDED = GuidanceConfig()


class Outline(NamedTuple):
    """What the price needs of a network."""

    uri: str
    architecture: UNetConfig | ClassifierConfig
    num_timesteps: int


def outline(config: GenerationConfig, path: str, like: str | None = None) -> Outline:
    """Of a released file by its name alone, so that it need not be there yet; of others from their file."""
    uri = config.path(path)
    if uri.endswith(".pt"):
        entry = released_entry(uri, like)
        return Outline(uri, entry.network, entry.diffusion.num_timesteps)
    network = load_network(uri)
    return Outline(uri, network.architecture, network.diffusion.num_timesteps)


def price(config: GenerationConfig, images: int) -> list[str]:
    """Lines for people: what `images` images read, weigh and cost, with the assumptions."""
    base = outline(config, config.weights, config.like)
    classifier = outline(config, config.classifier) if config.classifier else None
    upsampler = outline(config, config.upsampler) if config.upsampler else None
    networks = [network for network in (base, classifier, upsampler) if network]
    parameters = sum(count_parameters(network.architecture) for network in networks)
    absent = [network.uri for network in networks if not storage.exists(network.uri)]
    pixels = sum(3 * network.architecture.image_size**2 for network in (base, upsampler) if network)
    work = images * flops(config, base, classifier, upsampler)
    hours = ", ".join(f"{gpu} {work / (peak * UTILIZATION) / 3600:,.3g}" for gpu, peak in PEAK_FLOPS.items())
    per_image = evaluations(config.sampler, config.guidance)
    per_image += evaluations(config.upsampling, UNGUIDED) if upsampler else 0
    return [
        f"reads   {', '.join(network.uri for network in networks)}: {parameters / 1e6:,.1f} M parameters",
        *([f"        not there yet: {', '.join(absent)}"] if absent else []),
        f"memory  {4 * parameters / 2**30:,.2f} GiB of weights on each worker, and the activations of a batch",
        f"writes  {images * pixels / 1e9:,.3g} GB at most",
        f"work    {images:,} images x {per_image} network evaluations = {work / 1e15:,.4g} PFLOP",
        f"        GPU-hours at {UTILIZATION:.0%} of the 16-bit peak: {hours}",
    ]


def flops(config: GenerationConfig, base: Outline, classifier: Outline | None, upsampler: Outline | None) -> float:
    """Floating-point operations of one image, 2 for each multiply-add; a guided step adds the classifier twice,
    forward and back to its input."""
    steps = evaluations(config.sampler, UNGUIDED)
    multiply_adds = forward_multiply_adds(base.architecture) * steps
    if classifier and config.guidance.scale:
        guided = float(steps)
        if config.guidance.interval is not None:
            first, last = config.guidance.interval
            guided *= min(1.0, (last - first + 1) / base.num_timesteps)
        multiply_adds += round(2 * forward_multiply_adds(classifier.architecture) * guided)
    if upsampler:
        multiply_adds += forward_multiply_adds(upsampler.architecture) * evaluations(config.upsampling, UNGUIDED)
    return 2.0 * multiply_adds
