"""Successive halving with paired tests: which trials are evaluated at which rung, and which are stopped.

A trial has a setting and draws the first n samples of one set of indices; a rung is such an n.
`SuccessiveHalving.run` is a generator: it yields evaluations of trials at a rung and is sent their outcomes. It has no
other state, so replaying the records of an interrupted search leads to where that search stood, in whatever order the
evaluations were done.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.paired_tests import ErrorBudget, front_ranks, standing, surely_worse
from orchestrator.search.space import Setting

Scores = list[np.ndarray]  # for each objective [c, n]: less is better, all criteria must agree


class Evaluation(NamedTuple):
    """The evaluation of a setting at a rung: by its first n samples of a seed."""

    setting: Setting
    n: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave: each objective's scores, and all metrics for the record; or why it failed."""

    scores: Scores = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()  # objectives in whose place another score stands at so few samples
    failed: str | None = None


class Proposals(Protocol):
    """Who proposes settings: asked in rounds, and told of all that was proposed, in the order of proposal."""

    def ask(self, count: int) -> list[tuple[Any, Setting]]: ...

    def tell(self, trial: Any, rungs: list[tuple[float, ...]], finished: bool, violation: float) -> None: ...


class Budget(Protocol):
    """What the search may spend."""

    def affords(self, tasks: list[Evaluation], beside: int) -> bool:
        """Return whether the budget holds these evaluations and `beside` full draws besides."""

    def spend(self, tasks: list[Evaluation]) -> None:
        """Take the cost of these evaluations from the budget."""


@dataclass(frozen=True)
class Rules:
    """How trials are compared, and how many there are."""

    rungs: tuple[int, ...]  # samples, rising; the last is the full n
    trials: int  # settings tried at most
    round_size: int  # proposals at once
    finalists: int  # the best few, drawn again on fresh seeds
    alpha: float  # chance of ever stopping the best
    tolerance: float  # a difference from the best, as a share of its score, that does not matter
    seed: int
    fresh_seed: int
    exact: tuple[bool, ...]  # for each objective: whether it is known without sampling
    violation: Callable[[dict[str, Any], bool], float]  # by how much metrics break the constraints; with True, surely


@dataclass
class Trial:
    """A setting on its way."""

    number: int
    setting: Setting
    handle: Any = None  # the proposer's
    outcomes: list[Outcome] = field(default_factory=list)  # by rung
    stopped: str | None = None  # why it goes no further, once that is sure
    failed: str | None = None
    fresh: Outcome | None = None

    @property
    def level(self) -> int:
        """The highest rung reached; -1 before the first."""
        return len(self.outcomes) - 1

    @property
    def runs(self) -> bool:
        """Whether it may go further."""
        return self.stopped is None and self.failed is None


class SuccessiveHalving:
    """All trials of a search."""

    def __init__(self, rules: Rules, proposals: Proposals, budget: Budget) -> None:
        self.rules, self._proposals, self._budget = rules, proposals, budget
        self.trials: list[Trial] = []
        self.finalists: list[Trial] = []  # the best first
        self.stopped_by_budget = False
        self._level = ErrorBudget(rules.alpha, len(rules.rungs), rules.trials - 1).level

    def run(self) -> Generator[list[Evaluation], list[Outcome], None]:
        """Run rounds of proposals, then what is still undecided, then the final evaluation."""
        while len(self.trials) < self.rules.trials and not self.stopped_by_budget:
            new_trials = self._propose()
            if not new_trials:
                break
            yield from self._evaluate(new_trials, 0)
            for level in range(1, len(self.rules.rungs)):
                places = math.ceil(len(new_trials) / 2**level)
                yield from self._evaluate(self._next(level)[:places], level)
            self._tell()
        while undecided := self._undecided():
            level = undecided[0].level + 1
            together = [trial for trial in undecided if trial.level + 1 == level]
            if not (yield from self._evaluate(together[: max(2, self.rules.round_size // 4)], level)):
                break
        yield from self._final_evaluation()

    # ------------------------------------------------------------------------------------------------ stages

    def _propose(self) -> list[Trial]:
        count = min(self.rules.round_size, self.rules.trials - len(self.trials))
        first = len(self.trials)
        return [Trial(first + i, setting, handle) for i, (handle, setting) in enumerate(self._proposals.ask(count))]

    def _evaluate(self, trials: list[Trial], level: int) -> Generator[list[Evaluation], list[Outcome], bool]:
        """Evaluate `trials` at a rung, as many as the budget holds, and decide about all that stand there."""
        n, seed = self.rules.rungs[level], self.rules.seed
        while trials and not self._budget.affords(
            [Evaluation(t.setting, n, seed) for t in trials], self.rules.finalists
        ):
            trials, self.stopped_by_budget = trials[:-1], True
        tasks = [Evaluation(trial.setting, n, seed) for trial in trials]
        if not tasks:
            return False
        outcomes = yield tasks
        self._budget.spend(tasks)
        self.trials += [trial for trial in trials if level == 0]
        for trial, outcome in zip(trials, outcomes, strict=True):
            if outcome.failed:
                trial.failed = outcome.failed
            else:
                trial.outcomes.append(outcome)
        self._decide(level)
        return True

    def _decide(self, level: int) -> None:
        """Stop those at this rung that are surely worse than another, or surely break a constraint.

        All comparisons come before any decision, so that their order plays no part.
        """
        decisions = {trial.number: self._decision(trial, level) for trial in self.trials if trial.runs}
        for trial in self.trials:
            if trial.level == level:
                trial.stopped = trial.stopped or decisions.get(trial.number)

    def _decision(self, trial: Trial, level: int) -> str | None:
        n = self.rules.rungs[level]
        if trial.level != level:
            return None
        if self.rules.violation(trial.outcomes[level].metrics, True) > 0:
            return f"breaks a constraint at n={n}"
        for rival in self._at(level):
            if rival is not trial and self._allowed(rival) and self._worse(trial, rival, level):
                return f"surely worse at n={n} than trial {rival.number}"
        best = self._best(level)
        if best is not None and best is not trial and self._not_better(trial, best, level):
            return f"surely not better at n={n} than trial {best.number} by more than {self.rules.tolerance:.1%}"
        return None

    def _undecided(self) -> list[Trial]:
        """Those that run and are not at the last rung, the most promising first."""
        last = len(self.rules.rungs) - 1
        return self._by_promise([trial for trial in self.trials if trial.runs and 0 <= trial.level < last])

    def _next(self, level: int) -> list[Trial]:
        """Those that wait one rung below, the most promising first."""
        return self._by_promise([trial for trial in self.trials if trial.runs and trial.level == level - 1])

    def _final_evaluation(self) -> Generator[list[Evaluation], list[Outcome], None]:
        """The best few again, on fresh seeds and at full n: what is reported was not chosen by."""
        self.finalists = self.ranked()[: self.rules.finalists]
        tasks = [Evaluation(trial.setting, self.rules.rungs[-1], self.rules.fresh_seed) for trial in self.finalists]
        if tasks:
            outcomes = yield tasks
            self._budget.spend(tasks)
            for trial, outcome in zip(self.finalists, outcomes, strict=True):
                trial.fresh = outcome

    def _tell(self) -> None:
        """Tell of all trials that have not been told of, in their order."""
        last = len(self.rules.rungs) - 1
        for trial in self.trials:
            if trial.handle is not None:
                rungs = [tuple(map(_mean, outcome.scores)) for outcome in trial.outcomes]
                violation = self.rules.violation(trial.outcomes[-1].metrics, False) if rungs else 0.0
                self._proposals.tell(trial.handle, [] if trial.failed else rungs, trial.level == last, violation)
                trial.handle = None

    # ------------------------------------------------------------------------------------------------ comparisons

    def ranked(self) -> list[Trial]:
        """Return the candidates for the winner, the best first: those at the highest rung that are allowed."""
        standing = [trial for trial in self.trials if trial.runs and trial.outcomes and self._allowed(trial)]
        farthest = max((trial.level for trial in standing), default=-1)
        return self._by_promise([trial for trial in standing if trial.level == farthest])

    def _at(self, level: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.level >= level and trial.failed is None]

    def _allowed(self, trial: Trial) -> bool:
        return self.rules.violation(trial.outcomes[-1].metrics, False) <= 0

    def _best(self, level: int) -> Trial | None:
        """The leader at a rung, where one objective counts."""
        there = [trial for trial in self._at(level) if self._allowed(trial)]
        if not there or len(self.rules.exact) > 1:
            return None
        return min(there, key=lambda trial: (_mean(trial.outcomes[level].scores[0]), trial.number))

    def _worse(self, trial: Trial, rival: Trial, level: int) -> bool:
        """Whether the rival is surely better in every objective; in an exact one, not worse is enough."""
        sure = []
        pairs = zip(trial.outcomes[level].scores, rival.outcomes[level].scores, strict=True)
        for (mine, its), exact in zip(pairs, self.rules.exact, strict=True):
            if exact and mine[0, 0] == its[0, 0]:
                continue
            sure.append(bool(mine[0, 0] > its[0, 0]) if exact else surely_worse(mine, its, self._level))
        return bool(sure) and all(sure)

    def _not_better(self, trial: Trial, best: Trial, level: int) -> bool:
        if not self.rules.tolerance or self.rules.exact[0]:
            return False
        mine, its = trial.outcomes[level].scores[0], best.outcomes[level].scores[0]
        return surely_worse(mine, its, self._level, self.rules.tolerance)

    def _by_promise(self, trials: list[Trial]) -> list[Trial]:
        """With one objective by standard errors from the leader of the own rung; with two by fronts."""
        if len(self.rules.exact) > 1 and trials:
            values = np.array([[_mean(s) for s in trial.outcomes[-1].scores] for trial in trials])
            ranks = front_ranks(values)
            return [trials[i] for i in sorted(range(len(trials)), key=lambda i: (ranks[i], values[i, 0], i))]

        def behind(trial: Trial) -> float:
            best = self._best(trial.level) or trial
            return standing(trial.outcomes[-1].scores[0], best.outcomes[trial.level].scores[0])

        return sorted(trials, key=lambda trial: (behind(trial), trial.number))


def _mean(scores: np.ndarray) -> float:
    """The first criterion's mean; infinite where there is none."""
    return float(scores[0].mean()) if len(scores) else math.inf
