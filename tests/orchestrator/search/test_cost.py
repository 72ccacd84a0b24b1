"""The budget of a search: whole batches, new samples only, its three units, and a clock that survives a kill."""

from pathlib import Path

import pytest

from models.samplers import SamplerConfig
from orchestrator import storage
from orchestrator.search import cost as search_cost
from orchestrator.search.config import Limit
from orchestrator.search.cost import Clock, SampleBudget
from orchestrator.search.halving import Evaluation, affordable
from orchestrator.search.space import Setting

CHEAP = Setting(weights="w", sampler=SamplerConfig(name="ddim", num_steps=10), evaluations=10)
COSTLY = Setting(weights="w", sampler=SamplerConfig(name="ddim", num_steps=40), evaluations=40)


def num_affordable(budget: SampleBudget, tasks: list[Evaluation], reserve: list[Evaluation]) -> int:
    return affordable(budget.prices(tasks), budget.left(reserve))


def test_a_promoted_trial_pays_for_its_new_batches_only() -> None:
    budget = SampleBudget(Limit(), batch_size=64, full=0)
    budget.spend([Evaluation(CHEAP, 250, 0), Evaluation(COSTLY, 250, 0)])
    assert (budget.samples, budget.evaluations()) == (512, 256 * 50)
    budget.spend([Evaluation(CHEAP, 500, 0)])
    budget.spend([Evaluation(CHEAP, 500, 9)])
    assert budget.samples_of(CHEAP) == 512 + 512 and budget.samples == 256 + 1024
    budget.spend([Evaluation(CHEAP, 250, 0)])
    assert budget.samples == 1280, "all of them were drawn before"


def test_a_budget_of_samples_keeps_a_reserve_for_the_final_evaluation() -> None:
    budget = SampleBudget(Limit(3 * 256 + 1024), batch_size=64, full=0)
    final = [Evaluation(CHEAP, 1000, 9)]
    assert num_affordable(budget, [Evaluation(CHEAP, 250, seed) for seed in range(5)], final) == 3
    budget.spend([Evaluation(CHEAP, 250, seed) for seed in range(3)])
    assert num_affordable(budget, [Evaluation(COSTLY, 250, 0)], final) == 0
    assert num_affordable(budget, [Evaluation(COSTLY, 250, 0)], []) == 1


def test_a_share_counts_network_evaluations() -> None:
    budget = SampleBudget(Limit(10, "%"), batch_size=64, full=64 * 500)
    assert num_affordable(budget, [Evaluation(CHEAP, 64, seed) for seed in range(9)], []) == 5
    mixed = [Evaluation(COSTLY, 64, 0), Evaluation(CHEAP, 64, 0), Evaluation(CHEAP, 64, 1)]
    assert num_affordable(budget, mixed, []) == 2


def test_the_clock_continues_after_a_kill_and_replayed_rounds_begin_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, uri = 0.0, str(tmp_path / "clock.json")
    monkeypatch.setattr(search_cost.time, "monotonic", lambda: now)

    def start() -> tuple[SampleBudget, Clock]:
        clock = Clock(uri)
        return SampleBudget(Limit(1.0, "h"), batch_size=64, full=0, clock=clock), clock

    budget, clock = start()
    assert num_affordable(budget, [Evaluation(COSTLY, 640, 0)] * 9, []) == 9, "the speed is not known yet"
    now = 600.0  # ten minutes for 6,400 evaluations
    budget.spend([Evaluation(CHEAP, 640, 0)])
    settings = [Evaluation(CHEAP, 640, seed) for seed in range(1, 9)]
    assert num_affordable(budget, settings, []) == 5 and num_affordable(budget, settings, settings[:1]) == 4
    now = 700.0
    clock.save()

    now = 5_000.0  # killed, and started again an hour later: the evaluation has a record
    budget, clock = start()
    now = 5_001.0
    budget.spend([Evaluation(CHEAP, 640, 0)])
    assert num_affordable(budget, settings, []) == 5, "a replayed evaluation takes its recorded time"
    assert clock.seconds == 701.0
    budget.spend([Evaluation(CHEAP, 640, 1)])
    clock.save()
    assert storage.read_json(uri) == {"seconds": 701.0, "rounds": [600.0, 701.0]}
