"""Test that a config is refused if its fields do not fit each other."""

import numpy as np
import pytest

from orchestrator.data.dataset import StreamShare
from orchestrator.training.config import AdmConfig
from orchestrator.training.losses import make_microbatches
from orchestrator.training.presets import adm_presets


def test_a_network_for_grey_images_has_grey_outputs() -> None:
    """`--model.in-channels 1` is enough; other numbers of outputs are refused."""
    preset = adm_presets()["images"][1]
    for variance, outputs in (("learned_range", 2), ("fixed_small", 1)):
        fields = preset.model_dump()
        fields["diffusion"]["variance"] = variance
        fields["model"] |= {"in_channels": 1, "out_channels": 3 * outputs}
        assert AdmConfig.model_validate(fields).model.out_channels == outputs
        fields["model"]["out_channels"] = 5
        with pytest.raises(ValueError, match=rf"--model\.out-channels 5 .*accepted: {outputs}"):
            AdmConfig.model_validate(fields)


def test_a_network_of_one_channel_refuses_coloured_images() -> None:
    images = np.full((2, 8, 8, 3), 7, np.uint8)
    numbers = {"labels": np.zeros(2, np.int64), "samples": np.arange(2), "flips": np.zeros(2, bool)}
    share = StreamShare(stream=0, epoch=0, images=images, undecodable=np.zeros(2, bool), **numbers)
    assert make_microbatches([share], channels=1, seed=0, rows=2)[0].x_start.shape == (2, 1, 8, 8)
    images[1, 3, 3, 2] = 8
    with pytest.raises(ValueError, match=r"--model\.in-channels 1 is for grey images"):
        make_microbatches([share], channels=1, seed=0, rows=2)


def test_labels_are_dropped_by_seed_epoch_and_sample() -> None:
    """However the samples are dealt to workers and microbatches, the same ones lose their labels."""
    count, seed = 4_000, 3

    def labels(rows: slice, microbatch: int, epoch: int = 0, seed: int = seed) -> np.ndarray:
        samples = np.arange(count)[rows]
        share = StreamShare(
            stream=0, epoch=epoch, images=np.zeros((len(samples), 2, 2, 3), np.uint8), labels=samples % 10,
            samples=samples, flips=np.zeros(len(samples), bool), undecodable=np.zeros(len(samples), bool),
        )  # fmt: skip
        made = make_microbatches([share], 3, seed, microbatch, label_dropout=0.1, null_label=10)
        return np.concatenate([batch.labels.numpy() for batch in made])

    whole = labels(slice(None), 512)
    kept = whole < 10
    assert (whole[kept] == np.arange(count)[kept] % 10).all() and set(whole[~kept]) == {10}
    assert abs((~kept).mean() - 0.1) < 4 * (0.09 / count) ** 0.5
    halves = [labels(slice(None, 1_000), 64), labels(slice(1_000, None), 300)]
    assert (np.concatenate(halves) == whole).all()
    assert (labels(slice(None), 512, epoch=1) != whole).any() and (labels(slice(None), 512, seed=4) != whole).any()
