"""Successive halving with paired tests: which trials go on to the next rung, and which are eliminated.

A trial has a setting and draws the first n samples of one set of indices; a rung is such an n. All trials start at the
first rung. From there a budget decides how many go on, the best first; and a trial that is surely worse than another is
eliminated, whatever the budget is. Successive halving: Jamieson & Talwalkar 2016.

`SuccessiveHalving.run` is a generator: it yields rounds of evaluations and is sent their outcomes. It has no other
state, so replaying the records of an interrupted search leads to where that search stood, in whatever order the
evaluations were done.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.metrics import Strata
from models.paired_tests import differences, front_ranks, level_of_a_test, surely_positive
from orchestrator.progress import counted
from orchestrator.search.objectives import EVALUATIONS, Constraint
from orchestrator.search.space import Setting


class Evaluation(NamedTuple):
    """The evaluation of a setting at a rung: by its first n samples of a seed."""

    setting: Setting
    n: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave, or why it failed."""

    scores: dict[str, np.ndarray] = field(default_factory=dict)  # [n] by objective and bounded metric, less is better
    strata: Strata = None
    metrics: dict[str, Any] = field(default_factory=dict)  # all of them, for the record
    unbiased: tuple[str, ...] = ()  # scores whose mean is the metric's own value
    failed: str | None = None


class Round(NamedTuple):
    """Evaluations that may run at once, and why they are made."""

    tasks: list[Evaluation]
    text: str


class Proposals(Protocol):
    """Who proposes settings."""

    def ask(self, count: int) -> list[Setting]:
        """Return settings that were not proposed before; none where there is nothing left to propose."""

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        """Take the objectives at the first rung, less is better, none where it failed, in the order of proposal."""


class Budget(Protocol):
    """What the search may spend."""

    def fitting(self, tasks: list[Evaluation], share: float, reserve: list[Evaluation]) -> int:
        """Return how many of the tasks, in their order, `share` of what is left beside `reserve` affords."""

    def spend(self, tasks: list[Evaluation]) -> None:
        """Take the cost of these evaluations from the budget."""


@dataclass(frozen=True)
class Rules:
    """How trials are compared, and how many there are."""

    objectives: tuple[str, ...]
    constraints: tuple[Constraint, ...]  # of sampled metrics
    rungs: tuple[int, ...]  # samples, rising; the last is the full n
    trials: int  # settings tried at most
    round_size: int  # proposals at once
    finalists: int  # the best few, drawn again on fresh seeds
    alpha: float  # family-wise error: the probability of ever eliminating the best trial
    seed: int
    fresh_seed: int


@dataclass(eq=False)
class Trial:
    """A setting on its way."""

    number: int
    setting: Setting
    outcomes: list[Outcome] = field(default_factory=list)  # by rung
    eliminated: str | None = None  # why it is surely not the best
    waits: str | None = None  # why it goes no further for now
    failed: str | None = None
    fresh: Outcome | None = None

    @property
    def level(self) -> int:
        """The highest rung reached; -1 before the first."""
        return len(self.outcomes) - 1

    @property
    def runs(self) -> bool:
        """Whether it goes on to the next rung."""
        return not (self.eliminated or self.waits or self.failed)


class SuccessiveHalving:
    """All trials of a search."""

    def __init__(self, rules: Rules, proposals: Proposals, budget: Budget) -> None:
        self.rules, self._proposals, self._budget = rules, proposals, budget
        self.trials: list[Trial] = []
        self.finalists: list[Trial] = []  # the best first
        self.stopped_by_budget = False
        self._error = level_of_a_test(rules.alpha, len(rules.rungs), rules.trials - 1, len(rules.constraints))

    def run(self) -> Generator[Round, list[Outcome], None]:
        """Run the first rung with all proposals, then the higher ones, then the final evaluation."""
        yield from self._start()
        for level in range(1, len(self.rules.rungs)):
            trials = self._promote(level)
            if len(trials) < 2:
                break  # nothing is left to compare, and the final evaluation measures the best
            yield from self._evaluate(trials, level, self._text(level, len(trials)))
        yield from self._final_evaluation()

    # ------------------------------------------------------------------------------------------------ rungs

    def _start(self) -> Generator[Round, list[Outcome], None]:
        while len(self.trials) < self.rules.trials and not self.stopped_by_budget:
            count = min(self.rules.round_size, self.rules.trials - len(self.trials))
            first = len(self.trials)
            trials = [Trial(first + i, setting) for i, setting in enumerate(self._proposals.ask(count))]
            tasks = [self._task(trial, 0) for trial in trials]
            fitting = self._budget.fitting(tasks, 1.0, self._reserve(trials))
            self.stopped_by_budget |= fitting < len(trials)
            self.trials += trials[:fitting]
            if not trials[:fitting]:
                break
            text = f"rung 1 of {len(self.rules.rungs)}: {counted(fitting, 'trial')} start, n={self.rules.rungs[0]}"
            yield from self._evaluate(trials[:fitting], 0, text)
            for trial in trials[:fitting]:
                values = [] if trial.failed else [mean_value(trial.outcomes[0], name) for name in self.rules.objectives]
                self._proposals.tell(trial.setting, values, self.violation(trial) if values else 0.0)

    def _promote(self, level: int) -> list[Trial]:
        """Return the trials that go on to a rung: as many as its equal share of what is left of the budget affords."""
        candidates = self._by_promise([trial for trial in self.trials if trial.runs])
        tasks, reserve = [self._task(trial, level) for trial in candidates], self._reserve(candidates)
        count = self._budget.fitting(tasks, 1 / (len(self.rules.rungs) - level), reserve)
        if count < 2:
            count = min(2, self._budget.fitting(tasks, 1.0, reserve))
        for trial in candidates[count:]:
            trial.waits = f"not promoted at n={self.rules.rungs[level - 1]}"
        self.stopped_by_budget |= count < len(candidates)
        return candidates[:count]

    def _evaluate(self, trials: list[Trial], level: int, text: str) -> Generator[Round, list[Outcome], None]:
        """Evaluate `trials` at a rung, and eliminate what is surely not the best there."""
        if not trials:
            return
        tasks = [self._task(trial, level) for trial in trials]
        outcomes = yield Round(tasks, text)
        self._budget.spend(tasks)
        for trial, outcome in zip(trials, outcomes, strict=True):
            if outcome.failed:
                trial.failed = outcome.failed
            else:
                trial.outcomes.append(outcome)
        self._eliminate([trial for trial in trials if trial.level == level], level)

    def _final_evaluation(self) -> Generator[Round, list[Outcome], None]:
        """Evaluate the best few again, on fresh seeds and at full n: what is reported was not chosen by."""
        self.finalists = self.ranked()[: self.rules.finalists]
        tasks = self._reserve(self.finalists)
        if tasks:
            n, seed = self.rules.rungs[-1], self.rules.fresh_seed
            outcomes = yield Round(
                tasks, f"final evaluation: {counted(len(tasks), 'trial')}, n={n} on fresh seeds (seed {seed})"
            )
            self._budget.spend(tasks)
            for trial, outcome in zip(self.finalists, outcomes, strict=True):
                trial.fresh = outcome

    def _text(self, level: int, count: int) -> str:
        """Say what became of the trials at the rung below."""
        n, below = self.rules.rungs[level], [t for t in self.trials if t.level == level - 1 or t.failed]
        parts = [
            f"{sum(t.failed is not None for t in below)} failed",
            f"{sum(t.eliminated is not None for t in below)} eliminated",
            f"{sum(t.waits is not None and not t.failed for t in below)} not promoted",
        ]
        told = ", ".join(part for part in parts if part[0] != "0")
        return f"rung {level + 1} of {len(self.rules.rungs)}: {counted(count, 'trial')} at n={n}" + (
            f" ({told})" * bool(told)
        )

    def _task(self, trial: Trial, level: int) -> Evaluation:
        return Evaluation(trial.setting, self.rules.rungs[level], self.rules.seed)

    def _reserve(self, trials: list[Trial]) -> list[Evaluation]:
        """Return the final evaluations of the first few of these trials, which the budget has to hold."""
        n, seed = self.rules.rungs[-1], self.rules.fresh_seed
        return [Evaluation(trial.setting, n, seed) for trial in trials[: self.rules.finalists]]

    # ------------------------------------------------------------------------------------------------ comparisons

    def ranked(self) -> list[Trial]:
        """Return the candidates for the winner, the best first: by rung, then as at that rung."""
        found = [t for t in self.trials if t.outcomes and not (t.failed or t.eliminated) and self.violation(t) <= 0]
        by_level = [[t for t in found if t.level == level] for level in range(len(self.rules.rungs))]
        return [trial for trials in reversed(by_level) for trial in self._by_promise(trials)]

    def violation(self, trial: Trial) -> float:
        """Return by how much a trial breaks the constraints as far as it is known; 0 or less where it keeps them."""
        scores = trial.outcomes[-1].scores
        excesses = [c.excess(scores[c.metric]) for c in self.rules.constraints if len(scores[c.metric])]
        return max((float(excess.mean()) for excess in excesses), default=0.0)

    def _eliminate(self, there: list[Trial], level: int) -> None:
        """Eliminate of the trials at a rung those that are surely not the best."""
        n, bounds = self.rules.rungs[level], self.rules.constraints
        rivals = [t for t in there if all(self._sure(bound, t, there, breaks=False) for bound in bounds)]
        spans = {rival.number: self._spans(rival, there) for rival in rivals}
        decisions: list[str | None] = []  # all before any is taken, so that their order plays no part
        for trial in there:
            broken = [bound.metric for bound in bounds if self._sure(bound, trial, there, breaks=True)]
            better = (r.number for r in rivals if r is not trial and self._surely_worse(trial, r, spans[r.number]))
            if broken:
                decisions.append(f"surely breaks {broken[0]} at n={n}")
            else:
                rival = next(better, None)
                decisions.append(None if rival is None else f"surely worse at n={n} than trial {rival}")
        for trial, decision in zip(there, decisions, strict=True):
            trial.eliminated = decision

    def _sure(self, constraint: Constraint, trial: Trial, there: list[Trial], breaks: bool) -> bool:
        """Return whether a trial surely breaks, or surely keeps, a constraint at its rung."""
        outcome, name, sign = trial.outcomes[-1], constraint.metric, 1 if breaks else -1
        if name not in outcome.unbiased or not len(outcome.scores[name]):
            return False
        span = max(float(np.ptp(other.outcomes[-1].scores[name])) for other in there)
        excess = sign * constraint.excess(outcome.scores[name])
        return surely_positive(excess, outcome.strata, self._error, self.rules.rungs[trial.level], span)

    def _spans(self, rival: Trial, there: list[Trial]) -> dict[str, float]:
        """Return the widest range of paired differences from a rival that any trial at its rung has shown."""
        found = {}
        for name in self.rules.objectives:
            its = rival.outcomes[-1].scores[name]
            others = [differences(other.outcomes[-1].scores[name], its) for other in there]
            found[name] = max(float(np.ptp(each)) if len(each) else 0.0 for each in others)
        return found

    def _surely_worse(self, trial: Trial, rival: Trial, spans: dict[str, float]) -> bool:
        """Return whether the rival is surely better in every objective; where no sampling is needed, if not worse."""
        n, sure = self.rules.rungs[trial.level], []
        for name in self.rules.objectives:
            mine, its = trial.outcomes[-1].scores[name], rival.outcomes[-1].scores[name]
            if not len(mine) or mine.mean() < its.mean():
                return False
            if name != EVALUATIONS:
                strata = trial.outcomes[-1].strata
                sure.append(surely_positive(differences(mine, its), strata, self._error, n, spans[name]))
            elif mine[0] > its[0]:
                sure.append(True)
        return bool(sure) and all(sure)

    def _by_promise(self, trials: list[Trial]) -> list[Trial]:
        """Order trials at one rung: those that break a constraint last; else by the objective, with two by fronts."""
        if not trials:
            return []
        values = np.array([[mean_value(t.outcomes[-1], name) for name in self.rules.objectives] for t in trials])
        ranks = front_ranks(values) if len(self.rules.objectives) > 1 else np.zeros(len(trials))
        broken = [max(self.violation(trial), 0.0) for trial in trials]
        order = sorted(range(len(trials)), key=lambda i: (broken[i], ranks[i], values[i, 0], trials[i].number))
        return [trials[i] for i in order]


def mean_value(outcome: Outcome, name: str) -> float:
    """Return the mean score; infinite where there are no scores at so few samples."""
    scores = outcome.scores[name]
    return float(scores.mean()) if len(scores) else math.inf
