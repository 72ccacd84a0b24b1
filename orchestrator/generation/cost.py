"""The cost of a generation, estimated from the architectures."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from models.costs import sampling_evaluations
from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.unet import Architecture
from orchestrator import storage
from orchestrator.config import JobConfig
from orchestrator.cost import Cost, fits, not_there_yet, priced, sampling_cost
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import Networks
from orchestrator.weights.imported import is_imported
from orchestrator.weights.network import Network, parse_header, weights_about, weights_file
from orchestrator.weights.published import released_entry

ASSUMED_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # with --batch-size 0, B is the first that fits into the GPU's memory


class Outline(NamedTuple):
    """What the cost of sampling with a network depends on."""

    architecture: Architecture
    diffusion: DiffusionConfig


# The networks that the presets of trainings define, by the output of the training.
Trained = Mapping[str, tuple[Architecture, DiffusionConfig]]


def cost_lines(config: GenerationConfig, images: int, trained: Trained) -> list[str]:
    """Return the lines of a dry run about `images` images: what is read and written, the cost and the assumptions.

    trained: the networks of weights that do not exist yet.
    """
    options = (config.weights, config.classifier, config.upsampler, config.guidance.weak_weights)
    paths = [path for path in options if path]
    lines = [f"reads   {', '.join(path if is_imported(path) else config.path(path) for path in paths)}"]
    absent = not_there_yet(absent_weights(config, paths))
    if config.search_result and not storage.exists(config.search_result):
        absent.append(f"not there yet: {config.search_result}; sampler, guidance and weights are those of the preset")
    try:
        base = outline(config, config.weights, config.recipe, trained)
        classifier = classifier_outline(config, trained)
        upsampler = outline(config, config.upsampler, None, trained) if config.upsampler else None
        weak_weights = config.guidance.weak_weights
        weak = outline(config, weak_weights, None, trained) if weak_weights else None
    except FileNotFoundError:
        return [*lines, "cost    unknown until the weights exist", *absent]
    written_bytes = images * sum(3 * network.architecture.image_size**2 for network in (base, upsampler) if network)
    lines.append(f"writes  {written_bytes / 1e9:,.3g} GB at most")
    if config.classifier and not classifier:
        lines.append(f"        not counted: --classifier {config.classifier}")
    guides = {"classifier": classifier, "classifier_free": base, "auto": weak}
    for cost in costs(config, images, base, guides, upsampler):
        lines.append(priced(cost, config.cost, config.num_workers, config.num_gpus, config.dtype != "float32"))
    return lines + absent


def absent_weights(config: JobConfig, paths: Sequence[str]) -> list[str]:
    """Return the URIs of the weights that do not exist yet."""
    return [config.path(path) for path in paths if not is_imported(path) and not _exists(config, path)]


def _exists(config: JobConfig, path: str) -> bool:
    """Return whether `path` is a file, or a training run with weights."""
    try:
        return storage.exists(config.path(weights_file(path, config.path)))
    except FileNotFoundError:
        return False


def outline(config: JobConfig, path: str, recipe: str | None = None, trained: Trained | None = None) -> Outline:
    """Return the outline of weights: of a .pt file by `recipe` or its name, of others from their file or `trained`.

    Raises:
        FileNotFoundError: the weights do not exist, and `trained` does not have them.
    """
    if path.endswith(".pt"):
        entry = released_entry(path, recipe)
        return Outline(entry.network, entry.diffusion)
    if trained and path in trained and not _exists(config, path):
        return Outline(*trained[path])
    return Outline(*parse_header(weights_about(config.path(weights_file(path, config.path)))))


def classifier_outline(config: GenerationConfig, trained: Trained | None = None) -> Outline | None:
    """Return the outline of the classifier; None if there is none or if it is imported."""
    if config.classifier is None or is_imported(config.classifier):
        return None
    return outline(config, config.classifier, None, trained)


def costs(
    config: GenerationConfig,
    images: int,
    base: Outline | Network,
    guides: Mapping[str, Outline | Network | None],
    upsampler: Outline | Network | None,
) -> list[Cost]:
    """Return the cost of each stage. If the config leaves B open, it is the first of ASSUMED_BATCHES that fits.

    guides: the network that each kind of guidance evaluates beside the model.
    """
    guide = guides.get(config.guidance.kind) if config.guidance.scale else None
    evaluations = sampling_evaluations(config.sampler, config.guidance, base.diffusion)
    stages = [(base.architecture, evaluations, guide.architecture if guide else None)]
    if upsampler is not None:
        evaluations = sampling_evaluations(config.upsampling, GuidanceConfig(), upsampler.diffusion)
        stages.append((upsampler.architecture, evaluations, None))
    half = config.dtype != "float32"
    for batch in [config.batch_size] if config.batch_size else ASSUMED_BATCHES:
        stage_costs = [
            sampling_cost(model, model_evaluations, images, batch, half, guide_architecture)
            for model, model_evaluations, guide_architecture in stages
        ]
        if all(fits(cost, config.cost) for cost in stage_costs):
            break
    return stage_costs


def flops_per_sample(config: GenerationConfig, networks: Networks) -> float:
    """Return the FLOPs of one sample over all stages, without those of an imported classifier."""
    guide = networks.guide(config.guidance.kind)
    guides: dict[str, Network | None] = {config.guidance.kind: guide if isinstance(guide, Network) else None}
    return sum(cost.flops for cost in costs(config, 1, networks.weights, guides, networks.upsampler))
