"""P0: one SHA-256, five times. Run by `make prove`, or by hand as `python -m tests.chaos.prove --seed 0`.

A small diffusion model is trained by the real loop under Ray, with reduction=exact: by 1, 2 and 4 workers, by 2 workers
of which some are killed at random, and by 2, then 1, then 4 workers. What is printed is the hash of the state at the
end: weights, every average, the optimizer. Exit code 1 where two of them differ.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from cluster.session import session
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from tests.chaos.audit import consumed, order_hash, state_hash
from tests.chaos.killer import Kill, random_plan
from tests.chaos.trainings import CHECKPOINT, Ground, arguments, config_of, ground, train_here, train_in_parts

CHECKPOINTS = 6  # in a training
KILLS = 3


@dataclass(frozen=True)
class Options:
    """What may differ from one proof to the next."""

    seed: int = 0  # of the kills


def main(options: Options) -> None:
    """Print the hashes as they come."""
    hashes = set()
    with ground(options.seed) as place, session(8):  # 4 workers, and room for the tasks that read their data
        for what, state, order in _proofs(place, options.seed):
            print(f"{state}  {what}", flush=True)
            hashes.add((state, order))
    if len(hashes) > 1:
        print("they differ", file=sys.stderr)
    sys.exit(len(hashes) != 1)


def _proofs(place: Ground, seed: int) -> Iterator[tuple[str, str, str]]:
    """What was done, the hash of the state at the end, and that of the order in which rows were consumed."""

    def hashes(config: AdmConfig) -> tuple[str, str]:
        return state_hash(config), order_hash(consumed(config))

    def training(name: str, workers: int) -> AdmConfig:
        return config_of(arguments(place.store, name, workers, CHECKPOINTS))

    for workers in (1, 2, 4):
        config = training(f"workers-{workers}", workers)
        train(config)
        yield f"{workers} worker{'s' if workers > 1 else ''}", *hashes(config)

    config = training("killed", 2)
    plan = random_plan(config, KILLS, seed, drivers=False)
    account = train_here(config, place.proxy, plan, seed)
    yield f"2 workers, {sum(account.kills.values())} killed: {', '.join(account.by_phase)}", *hashes(config)

    parts = [training("resized", workers) for workers in (2, 1, 4)]
    train_in_parts(parts, place.proxy, [Kill("stop", 2 * CHECKPOINT), Kill("stop", 4 * CHECKPOINT)])
    yield "2, then 1, then 4 workers", *hashes(parts[-1])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
