"""The books of a search: whole batches, only what is new, and both kinds of budget."""

import pytest

from orchestrator.search import cost as search_cost
from orchestrator.search.config import Limit
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Evaluation
from orchestrator.search.space import Setting

CHEAP = Setting(weights="w", sampler="ddim", num_steps=10, evaluations=10)
DEAR = Setting(weights="w", sampler="ddim", num_steps=40, evaluations=40)


def test_a_promoted_trial_pays_for_its_new_batches_only() -> None:
    budget = SampleBudget(Limit(), batch_size=64, full=1000)
    budget.spend([Evaluation(CHEAP, 250, 0), Evaluation(DEAR, 250, 0)])
    assert (budget.samples, budget.evaluations) == (512, 256 * 50)
    budget.spend([Evaluation(CHEAP, 500, 0)])
    budget.spend([Evaluation(CHEAP, 500, 9)])
    assert budget.of(CHEAP) == 512 + 512 and budget.samples == 256 + 1024
    budget.spend([Evaluation(CHEAP, 250, 0)])
    assert budget.samples == 1280, "drawn already"


def test_a_budget_of_samples_keeps_the_finals_in_reserve() -> None:
    budget = SampleBudget(Limit(samples=3 * 256 + 1024), batch_size=64, full=1000)
    assert budget.affords([Evaluation(CHEAP, 250, 0)] * 1, beside=1)
    budget.spend([Evaluation(CHEAP, 250, seed) for seed in range(3)])
    assert not budget.affords([Evaluation(DEAR, 250, 0)], beside=1) and budget.affords(
        [Evaluation(DEAR, 250, 0)], beside=0
    )


def test_a_budget_of_hours_goes_by_the_speed_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(search_cost.time, "monotonic", lambda: now)
    budget = SampleBudget(Limit(hours=1.0), batch_size=64, full=640)
    assert budget.affords([Evaluation(DEAR, 640, 0)], beside=0), "nothing is known of the speed yet"
    budget.spend([Evaluation(CHEAP, 640, 0)])
    now = 600.0  # ten minutes for 6,400 evaluations
    assert budget.affords([Evaluation(CHEAP, 640, 1)], beside=1) and not budget.affords(
        [Evaluation(DEAR, 640, 0)], beside=1
    )
    now = 3_000.0
    assert not budget.affords([Evaluation(CHEAP, 640, 1)], beside=1)
