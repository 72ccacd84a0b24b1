"""The last lines of a training: a classifier's accuracy by noise level, and the next command."""

from orchestrator.closing import next_command
from orchestrator.metrics_log import history
from orchestrator.training.config import Config, NoisyClassifierConfig

LEVELS = ("little noise", "some noise", "much noise", "almost pure noise")  # the quartiles of the timesteps
GAP = 0.2  # difference of accuracy between training and validation images from which a classifier overfits
USEFUL = 0.5  # least accuracy at little noise, from chance (0) to certainty (1), of a classifier that can guide


def classifier_lines(run: str, num_classes: int) -> list[str]:
    """Return lines with the accuracy of a classifier by quartile of timesteps and a verdict; none without metrics."""
    found = {name: history(run, name) for name in ("accuracy", "val_accuracy")}
    shown = "val_accuracy" if found["val_accuracy"] else "accuracy"
    if not found[shown]:
        return []
    last = found[shown][-1][1]
    quartiles = [(level, history(run, f"{shown}_q{q}")) for q, level in enumerate(LEVELS)]
    images = "validation" if shown == "val_accuracy" else "training"
    parts = [f"{values[-1][1]:.1%} at {level}" for level, values in quartiles if values]
    lines = [f"accuracy on {images} images {last:.1%}: {', '.join(parts)} (chance: {1 / num_classes:.1%})"]
    low_noise = quartiles[0][1][-1][1] if quartiles[0][1] else last
    if found["val_accuracy"] and found["accuracy"] and (gap := found["accuracy"][-1][1] - last) > GAP:
        lines.append(f"verdict: overfitting, {gap:.1%} better on training images; train shorter, or use more data")
    elif low_noise < (least := USEFUL + (1 - USEFUL) / num_classes):
        lines.append(f"verdict: too weak to guide, below {least:.1%} at little noise; train longer")
    else:
        lines.append("verdict: it can guide")
    return lines


def following(config: Config) -> str:
    """Return the command for the next job, which uses the weights of this training."""
    if isinstance(config, NoisyClassifierConfig):
        return next_command("tune_guidance", classifier=config.output)
    if config.model.low_res_size:
        return next_command("generate_samples", upsampler=config.output)
    return next_command("generate_samples", weights=config.output)
