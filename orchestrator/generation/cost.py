"""What a generation will read, write and cost, from the architectures alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from models.costs import Evaluations, sampling_evaluations, sampling_flops
from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.unet import Architecture
from orchestrator import storage
from orchestrator.config import JobConfig
from orchestrator.cost import Cost, fits, not_there_yet, priced, sampling_cost
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.sampling import Networks
from orchestrator.weights.imported import is_imported
from orchestrator.weights.network import Network, described, latest_weights, weights_about, weights_file
from orchestrator.weights.published import released_entry

UNGUIDED = GuidanceConfig()
ASSUMED_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # images, where B is yet to be probed: the first that fits


class Outline(NamedTuple):
    """What the cost of sampling depends on."""

    uri: str
    architecture: Architecture
    diffusion: DiffusionConfig


Trained = Mapping[str, tuple[Architecture, DiffusionConfig]]  # what trainings will leave, by their output


def cost_lines(config: GenerationConfig, images: int, trained: Trained) -> list[str]:
    """Return the lines of a plan: what `images` images read, write and cost, with the assumptions."""
    named = [
        path for path in (config.weights, config.classifier, config.upsampler, config.guidance.weak_weights) if path
    ]
    lines = [f"reads   {', '.join(path if is_imported(path) else config.path(path) for path in named)}"]
    absent = not_there_yet(absent_weights(config, named))
    try:
        base = outline(config, config.weights, config.recipe, trained)
        classifier = classifier_outline(config, trained)
        upsampler, weak = (
            outline(config, path, None, trained) if path else None
            for path in (config.upsampler, config.guidance.weak_weights)
        )
    except FileNotFoundError:
        return [*lines, "cost    known as soon as the weights are there", *absent]
    written = images * sum(3 * network.architecture.image_size**2 for network in (base, upsampler) if network)
    guides = {"classifier": classifier, "classifier_free": base, "auto": weak}
    half = config.dtype != "float32"
    return [
        *lines,
        f"writes  {written / 1e9:,.3g} GB at most",
        *([f"        not counted: --classifier {config.classifier}"] if config.classifier and not classifier else []),
        *(
            priced(cost, config.cost, config.num_workers, config.num_gpus, half)
            for cost in costs(config, images, base, guides, upsampler)
        ),
        *absent,
    ]


def absent_weights(config: JobConfig, paths: Sequence[str]) -> list[str]:
    """Return the URIs of those weights that are not there yet, in whole or in training."""
    return [config.path(path) for path in paths if not is_imported(path) and not _is_there(config, path)]


def _is_there(config: JobConfig, path: str) -> bool:
    try:
        return storage.exists(config.path(weights_file(path, config.path)))
    except FileNotFoundError:
        return False


def outline(config: JobConfig, path: str, recipe: str | None = None, trained: Trained | None = None) -> Outline:
    """Return the outline of a released file by its name alone, so that it need not be there yet; of others from their
    file, or from what is known of the training that will write it.

    Raises:
        FileNotFoundError: they are not there, and nothing is known of their training.
    """
    uri = config.path(path)
    if uri.endswith(".pt"):
        entry = released_entry(uri, recipe)
        return Outline(uri, entry.network, entry.diffusion)
    if not _is_there(config, path) and trained and path in trained:
        return Outline(uri, *trained[path])
    file = uri if uri.endswith(".safetensors") else storage.join(uri, "weights", latest_weights(uri))
    return Outline(uri, *described(weights_about(file)))


def classifier_outline(config: GenerationConfig, trained: Trained | None = None) -> Outline | None:
    """Return the outline of the classifier; None where there is none, or one that is imported."""
    if config.classifier is None or is_imported(config.classifier):
        return None
    return outline(config, config.classifier, None, trained)


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
    half, stages = config.dtype != "float32", _stages(config, base, guides.get(config.guidance.kind), upsampler)
    for batch in [config.batch_size] if config.batch_size else ASSUMED_BATCHES:
        found = [sampling_cost(stage.model, stage.evaluations, images, batch, half, stage.guide) for stage in stages]
        if all(fits(cost, config.cost) for cost in found):
            break
    return found


def flops_per_sample(config: GenerationConfig, networks: Networks) -> float:
    """Return the FLOPs of one sample, in a cascade of both its stages; those of an imported classifier do not count."""
    guide = networks.guide(config.guidance.kind)
    stages = _stages(config, networks.weights, guide if isinstance(guide, Network) else None, networks.upsampler)
    return sum(sampling_flops(stage.evaluations, stage.model, stage.guide) for stage in stages)


class _Stage(NamedTuple):
    """One chain: a network, how often it and its guide are evaluated, and the guide."""

    model: Architecture
    evaluations: Evaluations
    guide: Architecture | None


def _stages(
    config: GenerationConfig,
    base: Outline | Network,
    guide: Outline | Network | None,
    upsampler: Outline | Network | None,
) -> list[_Stage]:
    guided_by = guide.architecture if guide and config.guidance.scale else None
    evaluations = sampling_evaluations(config.sampler, config.guidance, base.diffusion)
    found = [_Stage(base.architecture, evaluations, guided_by)]
    if upsampler is not None:
        enlarging = sampling_evaluations(config.upsampling, UNGUIDED, upsampler.diffusion)
        found.append(_Stage(upsampler.architecture, enlarging, None))
    return found
