"""The result of a search as text and page."""

import pytest

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.search.result import contradictions, describe_difference, label
from orchestrator.search.space import Setting


def test_settings_with_different_weights_have_different_labels() -> None:
    chosen = {"sampler": SamplerConfig(name="ddim", num_steps=10), "guidance": GuidanceConfig(scale=2.0)}
    settings = [Setting(weights=f"run/ema-{rate}.safetensors", **chosen) for rate in (0.9, 0.99)]
    assert len({str(setting) for setting in settings}) == 1
    assert [label(setting, several_weights=True) for setting in settings] == [
        "ddim, 10 steps, scale 2, run/ema-0.9",
        "ddim, 10 steps, scale 2, run/ema-0.99",
    ]


@pytest.mark.parametrize(("value", "contradicts"), [(1.3, False), (-0.2, False), (-0.97, True)])
def test_a_finalist_that_is_better_than_the_winner_on_fresh_samples_is_named(value: float, contradicts: bool) -> None:
    setting = Setting(weights="w", sampler=SamplerConfig(name="ddim", num_steps=25)).model_dump(mode="json")
    equal, worse = ({"value": v, "interval": [v - h, v + h]} for v, h in ((0.0, 0.0), (value, 0.7)))
    finalists = [{"setting": setting, "behind_winner": {"fd_digits": difference}} for difference in (equal, worse)]
    result = {"objective": ["fd_digits"], "trials": [{"setting": setting}], "finalists": finalists}
    assert len(contradictions(result)) == contradicts
    ends = "0.6 to 2" if value > 0 else f"{-value - 0.7:.4g} to {-value + 0.7:.4g}"
    assert describe_difference(worse) == f"{'worse' if value > 0 else 'better'} by {abs(value):.4g} ({ends})"
