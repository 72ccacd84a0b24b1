"""Count how often a search eliminates the best trial, in simulated worlds whose best trial is known.

    python -m tests.benchmarks.search_worlds --runs 200

Prints for each world the share of searches that eliminated the best, the share that chose it, and the samples of the
full grid that were drawn, with and without a budget. The family-wise error must be at most alpha = 0.05.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tyro

from orchestrator.search.config import Limit
from tests.orchestrator.search.worlds import PRECISE, World, bounded, catastrophes, config_of, normal, search, trade_off


@dataclass(frozen=True)
class Case:
    """A world, its number of trials and its best trial."""

    make: Callable[[int], World]
    trials: int = 24
    best: int = 0
    constraints: tuple[str, ...] = ()


CASES = {
    "ties": Case(lambda run: normal(lambda i: 0.0, run, 24)),
    "clear winner": Case(lambda run: normal(lambda i: 0.5 * (i > 0), run, 24)),
    "curve": Case(lambda run: normal(lambda i: 0.004 * (i - 5) ** 2, run, 24), best=5),
    "catastrophes": Case(lambda run: catastrophes(run, 24)),
    "constraint": Case(lambda run: bounded(run, 24), constraints=PRECISE),
    "trade-off": Case(lambda run: trade_off(run, 12), trials=12, best=2),
}


@dataclass(frozen=True)
class Worlds:
    """The number of searches of each world; run r has the seed r."""

    runs: int = 200
    worlds: tuple[str, ...] = tuple(CASES)


def main(worlds: Worlds) -> None:
    for name in worlds.worlds:
        case = CASES[name]
        for budget, limit in (("no budget", Limit()), ("25%", Limit(25, "%"))):
            eliminated = chosen = drawn = 0
            for run in range(worlds.runs):
                config = config_of(case.trials, constraints=case.constraints)
                halving, _ = search(config, case.make(run), limit=limit)
                eliminated += halving.trials[case.best].eliminated is not None
                chosen += [trial.number for trial in halving.ranked()[:1]] == [case.best]
                drawn += sum(halving.config.rungs[trial.level] for trial in halving.trials)
            share = drawn / worlds.runs / case.trials / 1024
            rates = f"eliminated {eliminated / worlds.runs:.3f}  chosen {chosen / worlds.runs:.3f}"
            print(f"{name:14} {budget:10} {rates}  drawn {share:.3f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Worlds, description=__doc__))
