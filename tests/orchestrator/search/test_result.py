"""The result of a search as text."""

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.search.result import label
from orchestrator.search.space import Setting


def test_settings_with_different_weights_have_different_labels() -> None:
    chosen = {"sampler": SamplerConfig(name="ddim", num_steps=10), "guidance": GuidanceConfig(scale=2.0)}
    settings = [Setting(weights=f"run/ema-{rate}.safetensors", **chosen) for rate in (0.9, 0.99)]
    assert len({str(setting) for setting in settings}) == 1
    assert [label(setting, several=True) for setting in settings] == [
        "ddim, 10 steps, scale 2, run/ema-0.9",
        "ddim, 10 steps, scale 2, run/ema-0.99",
    ]
