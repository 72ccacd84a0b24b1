"""Post-hoc EMA: an average of any length, computed from the power-function averages that a training stored."""

from models.ema import Profile, combination
from orchestrator import storage
from orchestrator.closing import next_command, print_closing
from orchestrator.cost import not_there_yet
from orchestrator.training.config import AverageConfig
from orchestrator.training.snapshots import power_snapshots
from orchestrator.weights.network import load_network, save_weights, weights_about

WORST_PROFILE = 0.1  # largest relative error of the averaging profile that is accepted


def average(config: AverageConfig) -> str:
    """Compute the average as a linear combination of snapshots, and return the URI of its weights file.

    The snapshots are read one after another, so at most two of them are in memory.

    Raises:
        ValueError: the run has no power-function averages, none at `images`, or too few to approximate the length; or
            the file exists and holds other weights.
    """
    output = average_uri(config)
    run, snapshots = config.path(config.weights), _select_snapshots(config)
    trainings = [weights_about(uri)["training"] for _, _, uri in snapshots]
    training = trainings[-1] | {"average": f"posthoc-{config.sigma_rel}"}
    if storage.exists(output) and (stored := weights_about(output)["training"]) != training:
        raise ValueError(
            f"--output {output} exists and holds the average {stored.get('average')} at {stored.get('images')} images; "
            "pass another name"
        )
    profiles = [
        Profile(training["updates"], sigma_rel)
        for training, (_, sigma_rel, _) in zip(trainings, snapshots, strict=True)
    ]
    requested = Profile(profiles[-1].updates, config.sigma_rel)
    coefficients, error = combination(profiles, requested)
    if error > WORST_PROFILE:
        raise ValueError(
            f"sigma_rel={config.sigma_rel}: the profile from the {len(snapshots)} snapshots in {run} has an error of "
            f"{error:.0%}, and at most {WORST_PROFILE:.0%} is accepted; choose a length nearer to those of power_emas, "
            "or train with a smaller snapshot_every"
        )
    network = load_network(snapshots[-1][2])
    total = {name: 0.0 * tensor.double() for name, tensor in network.module.state_dict().items()}
    for coefficient, (_, _, uri) in zip(coefficients, snapshots, strict=True):
        for name, tensor in load_network(uri).module.state_dict().items():
            total[name].add_(tensor, alpha=float(coefficient))
    weights = {name: tensor.float() for name, tensor in total.items()}
    save_weights(output, weights, network.architecture, network.diffusion, network.classes, training)
    print(
        f"{output}: sigma_rel {config.sigma_rel:g} from {len(snapshots)} snapshots; its profile has an error of "
        f"{error:.2%} (up to {WORST_PROFILE:.0%} is accepted)"
    )
    print_closing([], [next_command("generate_samples", weights=output)])
    return output


def plan(config: AverageConfig) -> tuple[AverageConfig, str]:
    """Return the config and the text of a dry run: what would be read and written."""
    run = config.path(config.weights)
    if not storage.list_names(storage.join(run, "weights")):
        return config, "\n".join([f"reads   {run}", *not_there_yet([run])])
    lines = [f"reads   {uri}" for _, _, uri in _select_snapshots(config)]
    return config, "\n".join([*lines, f"writes  {average_uri(config)}"])


def _select_snapshots(config: AverageConfig) -> list[tuple[int, float, str]]:
    """Return (images, sigma_rel, URI) of the snapshots up to the end of the average, oldest first."""
    run = config.path(config.weights)
    stored = power_snapshots(run)
    if not stored:
        raise ValueError(f"{run} has no power-function averages; train with --power-emas 0.05 0.1")
    positions = sorted({images for images, _, _ in stored})
    last = positions[-1] if config.images is None else config.images
    if last not in positions:
        nearest = min(positions, key=lambda images: abs(images - last))
        raise ValueError(f"images={last}: {run} has no snapshot there; the nearest is at {nearest}")
    return [snapshot for snapshot in stored if snapshot[0] <= last]


def average_uri(config: AverageConfig) -> str:
    """Return the URI of the average's weights file."""
    if config.output is not None:
        return config.path(config.output)
    images = _select_snapshots(config)[-1][0]
    name = f"images-{images:012d}-{config.sigma_rel:g}.safetensors"
    return storage.join(config.path(config.weights), "weights", "posthoc", name)
