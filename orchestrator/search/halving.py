"""Successive halving with paired tests: which trials are promoted to the next rung, and which are eliminated.

A trial samples with one setting. A rung is a number of samples n at which trials are compared. All trials start at the
first rung. At each rung, all trials have drawn the same n indices. A budget determines how many trials are promoted,
best first. A trial that is significantly worse than another is eliminated, whatever the budget is. Successive halving:
Jamieson & Talwalkar 2016.

A search that was interrupted is replayed from its records. Nothing here depends on the order in which evaluations end.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from models.metrics import Strata
from models.paired_tests import differences, front_ranks, level_of_a_test, surely_positive
from orchestrator.progress import counted
from orchestrator.search.config import SearchConfig
from orchestrator.search.objectives import EVALUATIONS, Constraint
from orchestrator.search.space import Setting

if TYPE_CHECKING:
    from orchestrator.search.cost import SampleBudget


class Evaluation(NamedTuple):
    """The evaluation of a setting on its first n samples of a seed."""

    setting: Setting
    n: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of an evaluation, or the reason why it failed."""

    scores: dict[str, np.ndarray] = field(default_factory=dict)  # [n] by objective and bounded metric; less is better
    strata: Strata = None  # the labels of the samples, if they are not drawn at random
    metrics: dict[str, Any] = field(default_factory=dict)  # every metric, as search.json shows it
    unbiased: tuple[str, ...] = ()  # scores whose mean is an unbiased estimate of the metric
    failed: str | None = None


class Round(NamedTuple):
    """Evaluations that may run at the same time, and a line that describes them."""

    tasks: list[Evaluation]
    description: str


class Proposals(Protocol):
    """A source of settings."""

    def ask(self, count: int) -> list[Setting]:
        """Return up to `count` settings that were not proposed before."""

    def tell(self, setting: Setting, values: list[float], violation: float) -> None:
        """Receive a setting's objectives at the first rung, in the order of proposal.

        values: less is better; empty if the trial failed.
        violation: by how much the setting breaks the constraints; 0 or less if it satisfies them.
        """


@dataclass(eq=False)
class Trial:
    """A setting and its outcomes so far."""

    number: int
    setting: Setting
    outcomes: list[Outcome] = field(default_factory=list)  # by rung
    eliminated: str | None = None  # why it is not the best
    not_promoted: str | None = None  # why the budget did not promote it
    failed: str | None = None  # why it could not be sampled or measured
    final: Outcome | None = None  # of the final evaluation on fresh seeds

    @property
    def level(self) -> int:
        """Return the index of the highest rung reached; -1 before the first."""
        return len(self.outcomes) - 1

    @property
    def is_running(self) -> bool:
        """Return whether the trial can be promoted to the next rung."""
        return not (self.eliminated or self.not_promoted or self.failed)


class SuccessiveHalving:
    """The trials of a search and all decisions about them.

    num_trials: maximum number of settings.
    outcome_of: returns the outcome of an evaluation. It is called for each evaluation of a round when the next round is
        requested.
    """

    def __init__(
        self,
        config: SearchConfig,
        num_trials: int,
        proposals: Proposals,
        budget: "SampleBudget",
        outcome_of: Callable[[Evaluation], Outcome],
    ) -> None:
        self.config, self._bounds, self._num_trials = config, config.bounds, num_trials
        self._proposals, self._budget, self._outcome_of = proposals, budget, outcome_of
        self.trials: list[Trial] = []
        self.finalists: list[Trial] = []  # best first
        self.stopped_by_budget = False
        self._significance_level = level_of_a_test(config.alpha, len(config.rungs), num_trials - 1, len(self._bounds))

    def run(self) -> Iterator[Round]:
        """Yield the rounds of the search: the first rung for all proposals, the higher rungs, the final evaluation."""
        yield from self._first_rung()
        for level in range(1, len(self.config.rungs)):
            trials = self._promote(level)
            if len(trials) < 2:
                break  # nothing is left to compare, and the final evaluation measures the best
            yield from self._evaluate(trials, level, self._describe_rung(level, len(trials)))
        yield from self._final_evaluation()

    # ------------------------------------------------------------------------------------------------ rungs

    def _first_rung(self) -> Iterator[Round]:
        """Evaluate all proposals that the budget allows, and report their outcomes to the source of proposals."""
        while (first := len(self.trials)) < self._num_trials and not self.stopped_by_budget:
            count = min(self.config.round_size, self._num_trials - first)
            proposed = [Trial(first + i, setting) for i, setting in enumerate(self._proposals.ask(count))]
            tasks = [self._task(trial, 0) for trial in proposed]
            left = self._budget.left(self._reserve([*proposed, *self.trials]))
            trials = proposed[: affordable(self._budget.prices(tasks), left)]
            self.stopped_by_budget |= len(trials) < len(proposed)
            if not trials:
                break
            self.trials += trials
            yield from self._evaluate(trials, 0, self._describe_rung(0, len(trials)))
            for trial in trials:
                values = [] if trial.failed else [mean_value(trial.outcomes[0], name) for name in self.config.objective]
                self._proposals.tell(trial.setting, values, self.violation(trial) if values else 0.0)

    def _promote(self, level: int) -> list[Trial]:
        """Return the trials to promote to a rung, best first.

        The budget reserves the cost of the last rung for the best two, and has equal shares for the rungs before it. If
        a share pays for less than a third of the trials, the last rung is out of reach, and half of them are promoted.
        """
        candidates = self._best_first([trial for trial in self.trials if trial.is_running])
        last, best_two = len(self.config.rungs) - 1, candidates[:2]
        remaining = self._budget.left(self._reserve(candidates))
        prices = self._budget.prices([self._task(trial, level) for trial in candidates])
        count = affordable(prices, remaining)
        if level < last:
            to_last = self._budget.prices([self._task(trial, last) for trial in best_two])
            to_rung_before = self._budget.prices([self._task(trial, last - 1) for trial in best_two])
            share = (remaining - sum(to_last) + sum(to_rung_before)) / (last - level)
            target = affordable(prices, share)
            if 3 * target < len(candidates):
                target = -(-len(candidates) // 2)
            count = min(count, max(target, 2))
        for trial in candidates[count:]:
            trial.not_promoted = f"not promoted at n={self.config.rungs[level - 1]}"
        self.stopped_by_budget |= count < len(candidates)
        return candidates[:count]

    def _evaluate(self, trials: list[Trial], level: int, description: str) -> Iterator[Round]:
        """Evaluate trials at a rung, and eliminate those that are significantly worse than another one."""
        tasks = [self._task(trial, level) for trial in trials]
        yield Round(tasks, description)
        self._budget.spend(tasks)
        for trial, outcome in zip(trials, map(self._outcome_of, tasks), strict=True):
            if outcome.failed:
                trial.failed = outcome.failed
            else:
                trial.outcomes.append(outcome)
        self._eliminate([trial for trial in trials if trial.level == level], level)

    def _final_evaluation(self) -> Iterator[Round]:
        """Evaluate the best trials at full n on fresh seeds, since selection biases the values that it used.

        If all of them fail, evaluate the next best ones.
        """
        n, seed = self.config.rungs[-1], self.config.fresh_seed
        while all(trial.failed for trial in self.finalists) and (ranked := self.ranked()):
            self.finalists = ranked[: self.config.finalists]
            tasks = self._reserve(self.finalists)
            yield Round(
                tasks, f"final evaluation: {counted(len(tasks), 'trial')} at n={n} on fresh seeds (seed {seed})"
            )
            self._budget.spend(tasks)
            for trial, task in zip(self.finalists, tasks, strict=True):
                trial.final = self._outcome_of(task)
                trial.failed = trial.final.failed

    def _describe_rung(self, level: int, count: int) -> str:
        """Return the line that announces a rung with `count` trials, and how many others the rung before ended."""
        n = self.config.rungs[level]
        description = f"rung {level + 1} of {len(self.config.rungs)}: {counted(count, 'trial')} at n={n}"
        if level == 0:
            return description
        before = [t for t in self.trials if t.level + bool(t.failed) == level - 1]
        counts = {
            "failed": sum(t.failed is not None for t in before),
            "eliminated": sum(t.eliminated is not None for t in before),
            "not promoted": sum(t.not_promoted is not None for t in before),
        }
        ended = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        return f"{description} ({ended})" if ended else description

    def _task(self, trial: Trial, level: int) -> Evaluation:
        return Evaluation(trial.setting, self.config.rungs[level], self.config.seed)

    def _reserve(self, trials: list[Trial]) -> list[Evaluation]:
        """Return the final evaluations of the first few of these trials, for which the budget keeps a reserve."""
        n, seed = self.config.rungs[-1], self.config.fresh_seed
        return [Evaluation(trial.setting, n, seed) for trial in trials[: self.config.finalists]]

    # ------------------------------------------------------------------------------------------------ comparisons

    def ranked(self) -> list[Trial]:
        """Return the trials that can win, best first: ordered by their rung, then by their outcomes there.

        If all others have failed, trials that were eliminated because of them can win, too.
        """
        feasible = [t for t in self.trials if t.outcomes and not t.failed and self.violation(t) <= 0]
        candidates = [trial for trial in feasible if not trial.eliminated] or feasible
        by_level = [[t for t in candidates if t.level == level] for level in range(len(self.config.rungs))]
        return [trial for trials in reversed(by_level) for trial in self._best_first(trials)]

    def violation(self, trial: Trial) -> float:
        """Return by how much a trial's point estimates break the constraints; 0 or less if they satisfy them."""
        scores = trial.outcomes[-1].scores
        excesses = [c.excess(scores[c.metric]) for c in self._bounds if len(scores[c.metric])]
        return max((float(excess.mean()) for excess in excesses), default=0.0)

    def _eliminate(self, at_rung: list[Trial], level: int) -> None:
        """Eliminate trials at a rung that significantly break a constraint or are significantly worse than a rival.

        A rival is a trial that significantly satisfies all constraints.
        """
        n, bounds = self.config.rungs[level], self._bounds
        rivals = [t for t in at_rung if all(self._is_significant(bound, t, at_rung, breaks=False) for bound in bounds)]
        spans = {rival.number: self._spans(rival, at_rung) for rival in rivals}
        decisions: list[str | None] = []  # all of them before any is applied, so that their order does not matter
        for trial in at_rung:
            broken = [bound.metric for bound in bounds if self._is_significant(bound, trial, at_rung, breaks=True)]
            better = (r.number for r in rivals if r is not trial and self._is_worse(trial, r, spans[r.number]))
            if broken:
                decisions.append(f"significantly breaks {broken[0]} at n={n}")
            else:
                rival = next(better, None)
                decisions.append(None if rival is None else f"significantly worse at n={n} than trial {rival}")
        for trial, decision in zip(at_rung, decisions, strict=True):
            trial.eliminated = decision

    def _is_significant(self, constraint: Constraint, trial: Trial, at_rung: list[Trial], breaks: bool) -> bool:
        """Return whether a test shows that a trial breaks a constraint (or satisfies it, if not `breaks`)."""
        outcome, name, sign = trial.outcomes[-1], constraint.metric, 1 if breaks else -1
        if name not in outcome.unbiased or not len(outcome.scores[name]):
            return False
        span = max(float(np.ptp(other.outcomes[-1].scores[name])) for other in at_rung)
        excess = sign * constraint.excess(outcome.scores[name])
        return surely_positive(excess, outcome.strata, self._significance_level, self.config.rungs[trial.level], span)

    def _spans(self, rival: Trial, at_rung: list[Trial]) -> dict[str, float]:
        """Return by objective the widest range of paired differences from a rival over all trials at its rung."""
        spans = {}
        for name in self.config.objective:
            rival_scores = rival.outcomes[-1].scores[name]
            paired = [differences(other.outcomes[-1].scores[name], rival_scores) for other in at_rung]
            spans[name] = max(float(np.ptp(values)) if len(values) else 0.0 for values in paired)
        return spans

    def _is_worse(self, trial: Trial, rival: Trial, spans: dict[str, float]) -> bool:
        """Return whether tests show that the rival is better in every objective.

        Network evaluations are known exactly, so in them it suffices that the rival is not worse.
        """
        n, strata = self.config.rungs[trial.level], trial.outcomes[-1].strata
        is_better = []  # of the rival, by objective
        for name in self.config.objective:
            own_scores, rival_scores = trial.outcomes[-1].scores[name], rival.outcomes[-1].scores[name]
            if not len(own_scores) or own_scores.mean() < rival_scores.mean():
                return False
            if name != EVALUATIONS:
                paired = differences(own_scores, rival_scores)
                is_better.append(surely_positive(paired, strata, self._significance_level, n, spans[name]))
            elif own_scores[0] > rival_scores[0]:
                is_better.append(True)
        return bool(is_better) and all(is_better)

    def _best_first(self, trials: list[Trial]) -> list[Trial]:
        """Order trials at one rung by constraint violation, Pareto front (with two objectives) and first objective."""
        if not trials:
            return []
        values = np.array([[mean_value(t.outcomes[-1], name) for name in self.config.objective] for t in trials])
        ranks = front_ranks(values) if len(self.config.objective) > 1 else np.zeros(len(trials))
        broken = [max(self.violation(trial), 0.0) for trial in trials]
        order = sorted(range(len(trials)), key=lambda i: (broken[i], ranks[i], values[i, 0], trials[i].number))
        return [trials[i] for i in order]


def affordable(prices: list[float], amount: float) -> int:
    """Return how many of the first prices an amount pays for."""
    return int((np.cumsum(prices) <= amount).sum())


def mean_value(outcome: Outcome, name: str) -> float:
    """Return the mean score; infinity if n is too small for scores."""
    scores = outcome.scores[name]
    return float(scores.mean()) if len(scores) else math.inf
