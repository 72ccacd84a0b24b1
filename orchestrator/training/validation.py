"""Evaluation of the losses on the validation split during a training, and a warning about overfitting."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import Group
from models.diffusion import UniformTimesteps
from orchestrator.data.dataset import Manifest, StreamShare, read_images
from orchestrator.training.config import Config, TrainingConfig
from orchestrator.training.losses import Terms, make_losses, make_microbatches
from orchestrator.training.meter import means_by_quartile, sums_by_quartile
from orchestrator.training.state import TrainingState

EPOCH = 2**64 - 1  # in the keys of noise and timesteps; no training has so many epochs
SIGNIFICANT_RISE = 4.0  # standard errors by which the loss must have risen for the warning

log = logging.getLogger(__name__)


class Validation:
    """Evaluates the losses on the first images of the validation split, always with the same noise and timesteps.

    Two evaluations therefore differ only in the weights, and their losses are compared image by image. Each worker
    evaluates a contiguous share of the images.
    """

    def __init__(self, config: Config, manifest: Manifest, group: Group) -> None:
        self._config, self._group = config, group
        self._losses = make_losses(config, UniformTimesteps(config.diffusion.num_timesteps))
        count, rows = validation_count(config, manifest), config.microbatch_rows(group.world_size)
        share = rows * -(-count // (rows * group.world_size))  # images of a worker, in whole microbatches
        begin, end = (min(count, share * rank) for rank in (group.rank, group.rank + 1))
        self._shares: list[StreamShare] = []  # one for each microbatch
        if begin == end:
            return
        images, labels = read_images(manifest, "validation", begin, end, config.model.image_size)
        for first in range(0, end - begin, rows):
            part = slice(first, first + rows)
            samples = np.arange(begin, end)[part]
            none = np.zeros(len(samples), bool)
            self._shares.append(
                StreamShare(
                    stream=0, epoch=EPOCH, images=images[part], labels=labels[part], samples=samples, flips=none,
                    undecodable=none,
                )
            )  # fmt: skip

    def evaluate(self, state: TrainingState) -> Iterator[dict[str, Any]]:
        """Yield the mean loss terms as a record, on rank 0; all workers must iterate.

        "val_loss_above_best" is the difference from the lowest loss so far. If it becomes significant, a warning is
        logged.
        """
        config, device = self._config, next(state.model.parameters()).device
        own_terms: list[Terms] = []
        state.model.eval()
        with torch.no_grad():
            for share in self._shares:
                (batch,) = make_microbatches([share], config, len(share.samples))
                terms = self._losses(config.in_dtype(state.model), batch.to(device))
                own_terms.append({name: values.cpu() for name, values in terms.items()})
        state.model.train()
        all_terms = [terms for share in self._group.gather(own_terms) for terms in share]
        merged = {name: torch.cat([terms[name] for terms in all_terms]) for name in all_terms[0]}
        names = [name for name in merged if name != "t"]
        sums = sums_by_quartile(merged, names, config.diffusion.num_timesteps)
        means = {f"val_{name}": mean for name, mean in means_by_quartile(sums, names).items()}
        means["val_loss_above_best"] = self._compare_with_best(state, merged["loss"].double())
        if self._group.rank == 0:
            yield {"images": state.position, "metrics": means}

    def _compare_with_best(self, state: TrainingState, losses: Tensor) -> float:
        """Return how much the mean of `losses`, [images], is above the best one so far; store them if they are better.

        If the difference is significant for the first time, log a warning.
        """
        assert state.best_validation is not None, "the state of a training with validation has it"
        rise = losses - state.best_validation
        if rise.mean() <= 0:  # False if the loss is not finite
            state.best_validation.copy_(losses)
            state.best_validation_position = state.position
            state.overfits = False
            return 0.0
        mean, error = float(rise.mean()), float(rise.std() / len(rise) ** 0.5)
        if mean > SIGNIFICANT_RISE * error and not state.overfits:
            state.overfits = True
            if self._group.rank == 0:
                log.warning(
                    "the network is overfitting: at %s images its validation loss is %.4g +- %.2g above that at %s "
                    "images; the training continues. Train shorter, raise weight_decay or dropout, or use more data",
                    f"{state.position:,}", mean, error, f"{state.best_validation_position:,}",
                )  # fmt: skip
        return mean


def validation_count(config: TrainingConfig, manifest: Manifest) -> int:
    """Return the number of images in an evaluation, 0 without eval_every.

    Raises:
        ValueError: eval_every is set, but the dataset has no validation split.
    """
    if not config.eval_every:
        return 0
    if "validation" not in manifest.splits:
        raise ValueError(
            f"eval_every={config.eval_every}, but dataset {manifest.name} has no validation split; "
            "prepare it with --validation-fraction 0.05, or pass --eval-every none"
        )
    return min(config.eval_images, manifest.num_samples("validation"))
