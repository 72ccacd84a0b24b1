"""The halving: nested rungs, decisions with sureness, rounds that can be replayed, and an orderly end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from orchestrator.search.config import Limit
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Evaluation, Outcome, Rules, SuccessiveHalving
from orchestrator.search.space import Proposer, Setting, Space, SpaceConfig

SPACE = SpaceConfig(scales=(0.0, 1.0, 2.0, 4.0), num_steps=(5, 10, 20), samplers=("ddpm", "ddim"))
FULL = 512
World = Callable[[Evaluation], Outcome]


def rules(**changes: Any) -> Rules:
    settings: dict[str, Any] = {
        "rungs": (64, 128, 256, FULL), "trials": 18, "round_size": 6, "finalists": 2, "alpha": 0.05, "tolerance": 0.0,
        "seed": 0, "fresh_seed": 9, "exact": (False,), "violation": lambda metrics, surely: 0.0,
    }  # fmt: skip
    return Rules(**settings | changes)


def quality(setting: Setting) -> float:
    """Best, at 0, near scale 1.5 with most steps."""
    return (setting.scale - 1.5) ** 2 + 5 / setting.num_steps + 0.3 * (setting.sampler == "ddpm")


def world(task: Evaluation) -> Outcome:
    """Scores that share most of their noise; an index has the same at every rung."""
    common = np.random.default_rng([1, task.seed]).standard_normal(FULL)
    own = np.random.default_rng([2, task.seed, int(task.setting.name[-8:], 16)]).standard_normal(FULL)
    scores = quality(task.setting) + 2 * common + 0.5 * own
    return Outcome([scores[None, : task.n]], {"score": {"value": scores[: task.n].mean(), "interval": None}})


def run(halving: SuccessiveHalving, world: World) -> list[list[Evaluation]]:
    """The tasks that were asked for, round by round."""
    asked: list[list[Evaluation]] = []
    outcomes: list[Outcome] | None = None
    rounds = halving.run()
    while True:
        try:
            tasks = next(rounds) if outcomes is None else rounds.send(outcomes)
        except StopIteration:
            return asked
        asked.append(tasks)
        outcomes = [world(task) for task in tasks]


def halved(world: World = world, space: SpaceConfig = SPACE, **changes: Any) -> SuccessiveHalving:
    halving, _ = halved_and_asked(world, Limit(), space, **changes)
    return halving


def halved_and_asked(
    world: World, limit: Limit, space: SpaceConfig, **changes: Any
) -> tuple[SuccessiveHalving, list[list[Evaluation]]]:
    chosen = rules(**changes)
    proposals = Proposer(Space(space, ("w",), 1000, np.inf), chosen.seed, len(chosen.exact), chosen.round_size)
    halving = SuccessiveHalving(chosen, proposals, SampleBudget(limit, batch_size=64, full=FULL))
    return halving, run(halving, world)


def test_the_winner_is_found_and_most_others_are_stopped_early() -> None:
    halving, asked = halved_and_asked(world, Limit(), SPACE)
    winner = halving.finalists[0]
    assert quality(winner.setting) < min(quality(t.setting) for t in halving.trials) + 0.1
    assert winner.level == 3 and winner.fresh is not None and winner.stopped is None
    drawn = sum(rules().rungs[trial.level] for trial in halving.trials)
    assert drawn < len(halving.trials) * FULL / 2, "decisions save nothing"
    assert {task.seed for task in asked[-1]} == {9}, "the finals are on fresh seeds"
    assert all("surely worse" in t.stopped for t in halving.trials if t.stopped)
    assert all(t.stopped or t.level == 3 for t in halving.trials), "without a budget all is decided"


def test_a_search_is_a_function_of_its_seed_and_replays_to_where_it_stood() -> None:
    first, asked = halved_and_asked(world, Limit(), SPACE)
    again, asked_again = halved_and_asked(world, Limit(), SPACE)
    assert asked == asked_again and [t.setting for t in first.ranked()] == [t.setting for t in again.ranked()]
    other, _ = halved_and_asked(world, Limit(), SPACE, seed=1)
    assert [t.setting for t in other.trials] != [t.setting for t in first.trials]


def test_rungs_are_nested_and_no_setting_is_proposed_twice() -> None:
    halving, asked = halved_and_asked(world, Limit(), SPACE)
    seen: dict[Setting, int] = {}
    for task in (task for tasks in asked for task in tasks if task.seed == 0):
        assert task.n == rules().rungs[seen.get(task.setting, -1) + 1], "a rung was left out or drawn twice"
        seen[task.setting] = seen.get(task.setting, -1) + 1
    assert len({trial.setting for trial in halving.trials}) == len(halving.trials) == 18


def test_models_that_do_not_differ_are_not_stopped() -> None:
    def equal(task: Evaluation) -> Outcome:
        own = np.random.default_rng([3, task.seed, int(task.setting.name[-8:], 16)]).standard_normal((1, FULL))
        return Outcome([own[:, : task.n]], {})

    halving = halved(equal)
    assert sum(trial.stopped is not None for trial in halving.trials) <= 1


def test_a_failing_trial_is_recorded_and_stops_nothing() -> None:
    def failing(task: Evaluation) -> Outcome:
        return Outcome(failed="FloatingPointError: NaN") if task.setting.num_steps == 20 else world(task)

    halving = halved(failing)
    failed = [trial for trial in halving.trials if trial.failed]
    assert failed and all(t.setting.num_steps == 20 and t.failed == "FloatingPointError: NaN" for t in failed)
    assert halving.finalists[0].setting.num_steps == 10


def test_a_budget_ends_in_order_with_the_finals_paid_for() -> None:
    for samples in (64 * 6 + 2 * FULL, 2_000, 3_000):
        chosen = rules()
        budget = SampleBudget(Limit(samples=samples), batch_size=64, full=FULL)
        halving = SuccessiveHalving(
            chosen, Proposer(Space(SPACE, ("w",), 1000, np.inf), 0, 1, chosen.round_size), budget
        )
        run(halving, world)
        assert halving.stopped_by_budget and budget.samples <= samples
        assert halving.finalists and halving.finalists[0].fresh is not None


def test_a_constraint_stops_what_surely_breaks_it_and_bars_the_rest_from_winning() -> None:
    def bounded(task: Evaluation) -> Outcome:
        return world(task) if task.setting.scale < 1.5 else Outcome(world(task).scores, {"score": {"value": 99.0}})

    def too_large(metrics: dict[str, Any], surely: bool) -> float:
        return metrics["score"]["value"] - 50.0

    halving = halved(bounded, violation=too_large)
    assert halving.finalists[0].setting.scale < 1.5
    barred = [trial for trial in halving.trials if trial.setting.scale >= 1.5]
    assert barred and all(trial.stopped == "breaks a constraint at n=64" for trial in barred)


def test_two_objectives_keep_a_front() -> None:
    def two(task: Evaluation) -> Outcome:
        scores = world(task).scores[0]
        return Outcome([scores, np.full_like(scores, task.setting.evaluations)], {})

    halving = halved(two, exact=(False, True))
    running = [trial.setting for trial in halving.trials if trial.runs]
    assert len({setting.num_steps for setting in running}) > 1, "cheaper settings belong to the front"
    for trial in halving.trials:
        if trial.stopped:
            rival = halving.trials[int(trial.stopped.rsplit(" ", 1)[1])]
            assert rival.setting.evaluations <= trial.setting.evaluations
            assert quality(rival.setting) < quality(trial.setting)


def test_a_tolerance_saves_what_would_not_matter() -> None:
    sure = halved(space=SPACE.model_copy(update={"continuous": False}))
    saving = halved(space=SPACE.model_copy(update={"continuous": False}), tolerance=0.2)
    drawn = [sum(rules().rungs[trial.level] for trial in halving.trials) for halving in (sure, saving)]
    assert drawn[1] < drawn[0]
    assert quality(saving.finalists[0].setting) <= quality(sure.finalists[0].setting) + 0.4


@pytest.mark.parametrize("rungs", [(64,), (64, FULL)])
def test_few_rungs_do(rungs: tuple[int, ...]) -> None:
    assert halved(rungs=rungs).finalists
