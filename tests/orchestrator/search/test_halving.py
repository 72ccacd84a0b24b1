"""Successive halving: nested rungs, the allocation of a budget, decisions by tests, and replay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models.scores import share_scores
from orchestrator.search.config import Limit
from orchestrator.search.cost import SampleBudget
from orchestrator.search.halving import Evaluation, Outcome, SuccessiveHalving
from orchestrator.search.objectives import EVALUATIONS
from orchestrator.search.space import OptunaProposals, Setting, Space, SpaceConfig
from tests.orchestrator.search.passes import PASSES
from tests.orchestrator.search.worlds import (
    FD,
    PRECISE,
    PRECISION,
    World,
    bounded,
    catastrophes,
    config_of,
    grid,
    normal,
    search,
    trade_off,
)

SPACE = SpaceConfig(scales=(0.0, 1.0, 2.0, 4.0), num_steps=(5, 10, 20), samplers=("ddpm", "ddim"))
FULL = 512


def quality(setting: Setting) -> float:
    """Return a quality that is best, at 0, near scale 1.5 with the most steps."""
    return (setting.guidance.scale - 1.5) ** 2 + 5 / setting.sampler.num_steps + 0.3 * (setting.sampler.name == "ddpm")


def world(task: Evaluation) -> Outcome:
    """Return scores that share most of their noise; the score of an index is the same at every rung."""
    common = np.random.default_rng([1, task.seed]).standard_normal(FULL)
    own = np.random.default_rng([2, task.seed, int(task.setting.name[-8:], 16)]).standard_normal(FULL)
    scores = quality(task.setting) + 2 * common + 0.5 * own
    return Outcome({FD: scores[: task.n]}, metrics={FD: {"value": scores[: task.n].mean()}}, unbiased=(FD,))


def search_with_optuna(
    world: World = world, limit: Limit | None = None, trials: int = 18, **changes: Any
) -> tuple[SuccessiveHalving, list[list[Evaluation]]]:
    """Run a search whose settings Optuna proposes."""
    config = config_of(trials, **{"rungs": (64, 128, 256, FULL), "round_size": 6, "finalists": 2} | changes)
    proposals = OptunaProposals(Space(SPACE, ("w",), PASSES, np.inf), config.seed, len(config.objective), 6)
    return search(config, world, limit=limit, proposals=proposals)


def test_all_trials_start_and_the_winner_is_found() -> None:
    halving, rounds = search_with_optuna()
    assert [len(tasks) for tasks in rounds[:3]] == [6, 6, 6]
    assert {task.n for tasks in rounds[:3] for task in tasks} == {64}
    winner = halving.finalists[0]
    assert quality(winner.setting) < min(quality(trial.setting) for trial in halving.trials) + 0.1
    assert winner.final is not None and winner.eliminated is None
    assert {task.seed for task in rounds[-1]} == {9}, "the final evaluation uses fresh seeds"
    drawn = sum(halving.config.rungs[trial.level] for trial in halving.trials)
    assert drawn < 0.6 * len(halving.trials) * FULL, "elimination saves nothing"


def test_the_same_seed_gives_the_same_search() -> None:
    first, rounds = search_with_optuna(limit=Limit(3_000))
    second, second_rounds = search_with_optuna(limit=Limit(3_000))
    assert rounds == second_rounds
    assert [trial.setting for trial in first.ranked()] == [trial.setting for trial in second.ranked()]
    other, _ = search_with_optuna(seed=1)
    assert [trial.setting for trial in other.trials] != [trial.setting for trial in first.trials]


def test_if_the_trial_that_eliminated_all_others_fails_on_fresh_seeds_the_next_best_wins() -> None:
    qualities = normal(lambda number: 3.0 * number, 0, 4)

    def world(task: Evaluation) -> Outcome:
        return Outcome(failed="NaN") if (task.setting.guidance.scale, task.seed) == (0, 9) else qualities(task)

    halving, rounds = search(config_of(4), world)
    assert all(trial.eliminated for trial in halving.trials[1:]) and halving.trials[0].failed
    assert [trial.number for trial in halving.finalists] == [1] and halving.finalists[0].final is not None
    assert [task.setting.guidance.scale for task in rounds[-1]] == [1.0]


class Batches:
    """Proposes settings in batches of these sizes."""

    def __init__(self, sizes: list[int]) -> None:
        self._settings, self._sizes = grid(sum(sizes)), sizes

    def ask(self, count: int) -> list[Setting]:
        size = self._sizes.pop(0)
        proposed, self._settings = self._settings[:size], self._settings[size:]
        return proposed

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        pass


def test_a_last_small_batch_of_proposals_leaves_the_reserve_of_all_finalists() -> None:
    config = config_of(9, round_size=8, finalists=2, rungs=(64, 1024))
    budget = 8 * 64 + 2 * 1024
    _, rounds = search(config, normal(lambda _: 0.0, 0, 9), grid(9), Limit(budget), Batches([8, 1]))
    assert [len(tasks) for tasks in rounds] == [8, 2] and sum(task.n for tasks in rounds for task in tasks) == budget


def test_rungs_are_nested_and_no_setting_is_proposed_twice() -> None:
    halving, rounds = search_with_optuna()
    level_of: dict[Setting, int] = {}
    for task in (task for tasks in rounds for task in tasks if task.seed == 0):
        assert task.n == halving.config.rungs[level_of.get(task.setting, -1) + 1], "a rung was skipped or drawn twice"
        level_of[task.setting] = level_of.get(task.setting, -1) + 1
    assert len({trial.setting for trial in halving.trials}) == len(halving.trials) == 18


def test_a_budget_is_shared_among_the_rungs_and_pays_for_the_final_evaluation() -> None:
    for samples in (64 * 6 + 2 * FULL, 2_000, 3_000):
        budget = SampleBudget(Limit(samples), 64, 0)
        proposals = OptunaProposals(Space(SPACE, ("w",), PASSES, np.inf), 0, 1, 6)
        config = config_of(18, rungs=(64, 128, 256, FULL), round_size=6, finalists=2)
        halving = SuccessiveHalving(config, 18, proposals, budget, world)
        list(halving.run())
        assert halving.stopped_by_budget and budget.samples <= samples
        assert len(halving.finalists) == 2 and halving.finalists[0].final is not None


def test_a_smaller_budget_halves_faster_and_the_best_are_promoted() -> None:
    counts = {}
    for share in (20.0, 40.0):
        halving, rounds = search(config_of(16), normal(lambda i: 0.1 * i, 0, 16), limit=Limit(share, "%"))
        counts[share] = [len(tasks) for tasks in rounds[:-1]]
        assert all(a >= b for a, b in zip(counts[share], counts[share][1:], strict=False))
        waiting = [trial for trial in halving.trials if trial.not_promoted]
        assert waiting and all("not promoted at n=" in str(trial.not_promoted) for trial in waiting)
        assert halving.ranked()[0].number < 4
    assert sum(counts[20.0]) < sum(counts[40.0]) and counts[20.0][0] == counts[40.0][0] == 16


@pytest.mark.parametrize(
    ("share", "counts"), [(10, [24, 12, 6, 3, 2]), (25, [24, 24, 18, 9, 5, 2]), (100, [24, 24, 24, 24, 24, 24])]
)
def test_the_budget_keeps_the_last_rung_for_two_trials_or_promotes_half_if_it_cannot_reach_it(
    share: float, counts: list[int]
) -> None:
    config = config_of(24, rungs=(64, 128, 256, 512, 1024, 2048))
    _, rounds = search(config, normal(lambda i: 0.0, 0, 24, full=2048), limit=Limit(share, "%"))
    assert [len(tasks) for tasks in rounds[:-1]] == counts


def test_the_rungs_end_when_one_trial_is_left() -> None:
    halving, rounds = search(config_of(6), normal(lambda i: 20.0 * (i > 0), 0, 6))
    assert [len(tasks) for tasks in rounds] == [6, 6, 1] or [len(tasks) for tasks in rounds] == [6, 1]
    assert all("significantly worse" in str(trial.eliminated) for trial in halving.trials[1:])


def test_a_failing_trial_is_recorded_and_the_others_go_on() -> None:
    def failing(task: Evaluation) -> Outcome:
        return Outcome(failed="FloatingPointError: NaN") if task.setting.sampler.num_steps == 20 else world(task)

    halving, _ = search_with_optuna(failing)
    failed = [trial for trial in halving.trials if trial.failed]
    assert {(trial.setting.sampler.num_steps, trial.failed) for trial in failed} == {(20, "FloatingPointError: NaN")}
    assert halving.finalists[0].setting.sampler.num_steps == 10


def test_a_trial_that_breaks_a_constraint_is_eliminated_or_cannot_win() -> None:
    def precise(task: Evaluation) -> Outcome:
        scale = task.setting.guidance.scale
        hits = np.random.default_rng(int(scale)).random(task.n) < (0.9 if scale < 3 else 0.1)
        scores = normal(lambda i: -i, 0, 6)(task).scores | {PRECISION: share_scores(hits)}
        return Outcome(scores, unbiased=(PRECISION,))

    halving, _ = search(config_of(6, constraints=PRECISE), precise)
    assert halving.finalists[0].number == 2
    assert all("significantly breaks precision" in str(trial.eliminated) for trial in halving.trials[3:])


def test_a_constraint_on_a_biased_value_eliminates_no_trial() -> None:
    def biased(task: Evaluation) -> Outcome:
        return Outcome(normal(lambda i: 9.0, 0, 3)(task).scores)

    halving, _ = search(config_of(3, constraints=("fd_digits<=1",)), biased)
    assert not any(trial.eliminated for trial in halving.trials) and not halving.finalists


def test_two_objectives_keep_a_front() -> None:
    def add_evaluations(task: Evaluation) -> Outcome:
        return Outcome(world(task).scores | {EVALUATIONS: np.full(task.n, float(task.setting.evaluations))})

    halving, _ = search_with_optuna(add_evaluations, objective=(FD, EVALUATIONS))
    running = [trial.setting for trial in halving.trials if trial.is_running]
    assert len({setting.sampler.num_steps for setting in running}) > 1, "cheaper settings belong to the front"
    for trial in halving.trials:
        if trial.eliminated:
            rival = halving.trials[int(trial.eliminated.rsplit(" ", 1)[1])]
            assert rival.setting.evaluations <= trial.setting.evaluations
            assert quality(rival.setting) < quality(trial.setting)


@pytest.mark.parametrize("rungs", [(64,), (64, FULL)])
def test_one_or_two_rungs_suffice(rungs: tuple[int, ...]) -> None:
    assert search_with_optuna(rungs=rungs)[0].finalists


WORLDS: dict[str, Callable[[int], World]] = {
    "ties": lambda run: normal(lambda i: 0.0, run, 8),
    "clear winner": lambda run: normal(lambda i: 0.5 * (i > 0), run, 8),
    "curve": lambda run: normal(lambda i: 0.02 * i**2, run, 8),
    "catastrophes": lambda run: catastrophes(run, 8),
    "bounded": lambda run: bounded(run, 8),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_best_trial_is_eliminated_in_at_most_alpha_of_searches(name: str) -> None:
    """Run 20 searches in which trial 0 is the best; `python -m tests.benchmarks.search_worlds` runs more."""
    wrong = 0
    for run in range(20):
        halving, _ = search(config_of(8, constraints=PRECISE if name == "bounded" else ()), WORLDS[name](run))
        wrong += halving.trials[0].eliminated is not None
    assert wrong <= 2, f"{wrong} of 20"


def test_few_samples_do_not_favour_guidance() -> None:
    """KID, and a bias correction without strata, choose too much guidance in this world of 64 dimensions."""
    chosen = []
    for run in range(4):
        halving, _ = search(config_of(6, rungs=(64, 128, 256)), trade_off(run, 6, full=256))
        chosen.append(halving.ranked()[0].number)
        assert halving.trials[2].eliminated is None
    assert np.mean(chosen) == pytest.approx(2, abs=0.6)
