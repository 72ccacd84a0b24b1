"""The race: nested rungs, verdicts with sureness, rounds that can be replayed, and an orderly end."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from orchestrator.search.config import Limit
from orchestrator.search.cost import Costs
from orchestrator.search.halving import Heat, Outcome, Race, Rules
from orchestrator.search.space import Proposer, Setting, Space, SpaceConfig

SPACE = SpaceConfig(scales=(0.0, 1.0, 2.0, 4.0), steps=(5, 10, 20), samplers=("ddpm", "ddim"))
FULL = 512
World = Callable[[Heat], Outcome]


def rules(**changes: Any) -> Rules:
    settings: dict[str, Any] = {
        "rungs": (64, 128, 256, FULL), "trials": 18, "round_size": 6, "finalists": 2, "alpha": 0.05, "tolerance": 0.0,
        "seed": 0, "fresh_seed": 9, "exact": (False,), "violation": lambda metrics, surely: 0.0,
    }  # fmt: skip
    return Rules(**settings | changes)


def quality(setting: Setting) -> float:
    """Best, at 0, near scale 1.5 with most steps."""
    return (setting.scale - 1.5) ** 2 + 5 / setting.steps + 0.3 * (setting.sampler == "ddpm")


def world(heat: Heat) -> Outcome:
    """Scores that share most of their noise; an index has the same at every rung."""
    common = np.random.default_rng([1, heat.seed]).standard_normal(FULL)
    own = np.random.default_rng([2, heat.seed, int(heat.setting.name[-8:], 16)]).standard_normal(FULL)
    scores = quality(heat.setting) + 2 * common + 0.5 * own
    return Outcome([scores[None, : heat.n]], {"score": {"value": scores[: heat.n].mean(), "interval": None}})


def run(race: Race, world: World) -> list[list[Heat]]:
    """The heats that were asked for, round by round."""
    asked: list[list[Heat]] = []
    outcomes: list[Outcome] | None = None
    rounds = race.run()
    while True:
        try:
            heats = next(rounds) if outcomes is None else rounds.send(outcomes)
        except StopIteration:
            return asked
        asked.append(heats)
        outcomes = [world(heat) for heat in heats]


def raced(world: World = world, space: SpaceConfig = SPACE, **changes: Any) -> Race:
    race, _ = raced_and_asked(world, Limit(), space, **changes)
    return race


def raced_and_asked(world: World, limit: Limit, space: SpaceConfig, **changes: Any) -> tuple[Race, list[list[Heat]]]:
    chosen = rules(**changes)
    proposals = Proposer(Space(space, ("w",), 1000, np.inf), chosen.seed, len(chosen.exact), chosen.round_size)
    race = Race(chosen, proposals, Costs(limit, batch_size=64, full=FULL))
    return race, run(race, world)


def test_the_winner_is_found_and_most_others_are_stopped_early() -> None:
    race, asked = raced_and_asked(world, Limit(), SPACE)
    winner = race.finalists[0]
    assert quality(winner.setting) < min(quality(t.setting) for t in race.trials) + 0.1
    assert winner.level == 3 and winner.fresh is not None and winner.stopped is None
    drawn = sum(rules().rungs[trial.level] for trial in race.trials)
    assert drawn < len(race.trials) * FULL / 2, "verdicts save nothing"
    assert {heat.seed for heat in asked[-1]} == {9}, "the finals are on fresh seeds"
    assert all("surely worse" in t.stopped for t in race.trials if t.stopped)
    assert all(t.stopped or t.level == 3 for t in race.trials), "without a budget all is decided"


def test_a_race_is_a_function_of_its_seed_and_replays_to_where_it_stood() -> None:
    first, asked = raced_and_asked(world, Limit(), SPACE)
    again, asked_again = raced_and_asked(world, Limit(), SPACE)
    assert asked == asked_again and [t.setting for t in first.ranked()] == [t.setting for t in again.ranked()]
    other, _ = raced_and_asked(world, Limit(), SPACE, seed=1)
    assert [t.setting for t in other.trials] != [t.setting for t in first.trials]


def test_rungs_are_nested_and_no_setting_is_proposed_twice() -> None:
    race, asked = raced_and_asked(world, Limit(), SPACE)
    seen: dict[Setting, int] = {}
    for heat in (heat for heats in asked for heat in heats if heat.seed == 0):
        assert heat.n == rules().rungs[seen.get(heat.setting, -1) + 1], "a rung was left out or drawn twice"
        seen[heat.setting] = seen.get(heat.setting, -1) + 1
    assert len({trial.setting for trial in race.trials}) == len(race.trials) == 18


def test_models_that_do_not_differ_are_not_stopped() -> None:
    def equal(heat: Heat) -> Outcome:
        own = np.random.default_rng([3, heat.seed, int(heat.setting.name[-8:], 16)]).standard_normal((1, FULL))
        return Outcome([own[:, : heat.n]], {})

    race = raced(equal)
    assert sum(trial.stopped is not None for trial in race.trials) <= 1


def test_a_failing_trial_is_recorded_and_stops_nothing() -> None:
    def failing(heat: Heat) -> Outcome:
        return Outcome(failed="FloatingPointError: NaN") if heat.setting.steps == 20 else world(heat)

    race = raced(failing)
    failed = [trial for trial in race.trials if trial.failed]
    assert failed and all(t.setting.steps == 20 and t.failed == "FloatingPointError: NaN" for t in failed)
    assert race.finalists[0].setting.steps == 10


def test_a_budget_ends_in_order_with_the_finals_paid_for() -> None:
    for samples in (64 * 6 + 2 * FULL, 2_000, 3_000):
        chosen = rules()
        costs = Costs(Limit(samples=samples), batch_size=64, full=FULL)
        race = Race(chosen, Proposer(Space(SPACE, ("w",), 1000, np.inf), 0, 1, chosen.round_size), costs)
        run(race, world)
        assert race.stopped_by_budget and costs.samples <= samples
        assert race.finalists and race.finalists[0].fresh is not None


def test_a_constraint_stops_what_surely_breaks_it_and_bars_the_rest_from_winning() -> None:
    def bounded(heat: Heat) -> Outcome:
        return world(heat) if heat.setting.scale < 1.5 else Outcome(world(heat).scores, {"score": {"value": 99.0}})

    def too_large(metrics: dict[str, Any], surely: bool) -> float:
        return metrics["score"]["value"] - 50.0

    race = raced(bounded, violation=too_large)
    assert race.finalists[0].setting.scale < 1.5
    barred = [trial for trial in race.trials if trial.setting.scale >= 1.5]
    assert barred and all(trial.stopped == "breaks a constraint at n=64" for trial in barred)


def test_two_objectives_keep_a_front() -> None:
    def two(heat: Heat) -> Outcome:
        scores = world(heat).scores[0]
        return Outcome([scores, np.full_like(scores, heat.setting.evaluations)], {})

    race = raced(two, exact=(False, True))
    running = [trial.setting for trial in race.trials if trial.runs]
    assert len({setting.steps for setting in running}) > 1, "cheaper settings belong to the front"
    for trial in race.trials:
        if trial.stopped:
            rival = race.trials[int(trial.stopped.rsplit(" ", 1)[1])]
            assert rival.setting.evaluations <= trial.setting.evaluations
            assert quality(rival.setting) < quality(trial.setting)


def test_a_tolerance_saves_what_would_not_matter() -> None:
    sure = raced(space=SPACE.model_copy(update={"continuous": False}))
    saving = raced(space=SPACE.model_copy(update={"continuous": False}), tolerance=0.2)
    drawn = [sum(rules().rungs[trial.level] for trial in race.trials) for race in (sure, saving)]
    assert drawn[1] < drawn[0]
    assert quality(saving.finalists[0].setting) <= quality(sure.finalists[0].setting) + 0.4


@pytest.mark.parametrize("rungs", [(64,), (64, FULL)])
def test_few_rungs_do(rungs: tuple[int, ...]) -> None:
    assert raced(rungs=rungs).finalists
