"""The result of a search as text and page."""

import pytest

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.search.config import Limit
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Evaluation, Outcome, SuccessiveHalving
from orchestrator.search.objectives import EVALUATIONS
from orchestrator.search.result import conclude, contradictions, describe_difference, label
from orchestrator.search.space import GridProposals, Setting
from tests.orchestrator.search.worlds import FD, config_of, grid, normal


def test_settings_with_different_weights_have_different_labels() -> None:
    chosen = {"sampler": SamplerConfig(name="ddim", num_steps=10), "guidance": GuidanceConfig(scale=2.0)}
    settings = [Setting(weights=f"run/ema-{rate}.safetensors", **chosen) for rate in (0.9, 0.99)]
    assert len({str(setting) for setting in settings}) == 1
    assert [label(setting, several_weights=True) for setting in settings] == [
        "ddim, 10 steps, scale 2, run/ema-0.9",
        "ddim, 10 steps, scale 2, run/ema-0.99",
    ]


def test_trials_that_fail_at_a_later_rung_or_on_fresh_seeds_are_named() -> None:
    """The best trial fails on fresh seeds, the next one at the second rung, and the last one at the first rung."""
    qualities, failing = normal(lambda number: 0.1 * number, 0, 8), {(0, 1024, 9), (1, 128, 0), (7, 64, 0)}
    config, settings = config_of(8, finalists=3, alpha=1e-9), grid(8)

    def world(task: Evaluation) -> Outcome:
        if (int(task.setting.guidance.scale), task.n, task.seed) in failing:
            return Outcome(failed=f"NaN at n={task.n}")
        scores = qualities(task).scores
        metrics = {name: {"value": 20.0, "interval": None} for name in (FD, EVALUATIONS)}
        return Outcome(scores, metrics=metrics, unbiased=(FD,))

    budget = SampleBudget(Limit(), 1, 0)
    halving = SuccessiveHalving(config, 8, GridProposals(settings, False), budget, world)
    descriptions = [step.description for step in halving.run()]
    result = conclude(config, halving, budget)
    assert {name.rpartition(" ")[2]: reason for name, reason in result["failed"].items()} == {
        "0": "NaN at n=1024", "1": "NaN at n=128", "7": "NaN at n=64"
    }  # fmt: skip
    assert result["winner"]["number"] == 2 and [point["number"] for point in result["front"]] == [2]
    assert [trial["status"] for trial in result["trials"]][:3] == ["failed", "failed", "winner"]
    assert ["1 failed" in description for description in descriptions] == [False, True, True, False, False, False]


@pytest.mark.parametrize(("value", "contradicts"), [(1.3, False), (-0.2, False), (-0.97, True)])
def test_a_finalist_that_is_better_than_the_winner_on_fresh_samples_is_named(value: float, contradicts: bool) -> None:
    setting = Setting(weights="w", sampler=SamplerConfig(name="ddim", num_steps=25)).model_dump(mode="json")
    equal, worse = ({"value": v, "interval": [v - h, v + h]} for v, h in ((0.0, 0.0), (value, 0.7)))
    finalists = [{"setting": setting, "behind_winner": {"fd_digits": difference}} for difference in (equal, worse)]
    result = {"objective": ["fd_digits"], "trials": [{"setting": setting}], "finalists": finalists}
    assert len(contradictions(result)) == contradicts
    ends = "0.6 to 2" if value > 0 else f"{-value - 0.7:.4g} to {-value + 0.7:.4g}"
    assert describe_difference(worse) == f"{'worse' if value > 0 else 'better'} by {abs(value):.4g} ({ends})"
