"""Test that a config is refused if its fields do not fit each other."""

from typing import Any

import pytest

from orchestrator.order import OrderConfig
from orchestrator.training.config import AdmConfig
from orchestrator.training.presets import adm_presets
from tests.orchestrator.training.runs import adm


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 15}, "batch_size=15 is not a multiple of order.num_streams=2; use 14 or 16"),
        ({"num_workers": 4}, "num_workers=4 does not divide order.num_streams=2; use a power of two up to 2"),
        ({"order": OrderConfig(num_streams=3)}, "order.num_streams=3 is not a power of two"),
        ({"microbatch_size": 4, "reduction": "exact"}, "cannot be combined with reduction=exact, .* 8 images"),
        ({"power_emas": (0.05,)}, "set snapshot_every, for example to 6"),
        ({"power_emas": (0.5,), "snapshot_every": 16}, r"sigma_rel=0\.5 is not in"),
        ({"ema_rates": (1.0,)}, r"ema_rates=1\.0"),
        ({"profile_steps": (15, 10)}, r"profile_steps=\(15, 10\) is not BEGIN END"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adm("none", "impossible", **changes)
