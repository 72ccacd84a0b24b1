"""Check promise P0: five trainings have the same SHA-256. Run `make prove`, or `python -m tests.chaos.prove --seed 0`.

Trains a small diffusion model under Ray with reduction=exact: with 1, 2 and 4 workers, with 2 workers under random
kills, and with 2, then 1, then 4 workers. Prints the hash of each final state: weights, every EMA and the optimizer.
The exit code is 1 if two hashes differ.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from cluster.session import session
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from tests.chaos.audit import consumed, order_hash, state_hash
from tests.chaos.killer import Kill, killing, random_plan
from tests.chaos.trainings import CHECKPOINT, ChaosStorage, arguments, chaos_storage, config_of

CHECKPOINTS = 6  # in a training
KILLS = 3


@dataclass(frozen=True)
class Options:
    """The kills."""

    seed: int = 0  # of the kills


def main(options: Options) -> None:
    """Print the hash of each training as soon as it has finished."""
    hashes = set()
    with chaos_storage(options.seed) as chaos, session(8):  # 4 workers, and the tasks that read their data
        for description, state, order in _proofs(chaos, options.seed):
            print(f"{state}  {description}", flush=True)
            hashes.add((state, order))
    if len(hashes) > 1:
        print("the hashes differ", file=sys.stderr)
    sys.exit(len(hashes) != 1)


def _proofs(chaos: ChaosStorage, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield a description of each training, the hash of its final state, and the hash of the order of its rows."""

    def hashes(config: AdmConfig) -> tuple[str, str]:
        return state_hash(config), order_hash(consumed(config))

    def training(name: str, workers: int) -> AdmConfig:
        return config_of(arguments(chaos.store, name, workers, CHECKPOINTS))

    for workers in (1, 2, 4):
        config = training(f"workers-{workers}", workers)
        train(config)
        yield f"{workers} worker{'s' if workers > 1 else ''}", *hashes(config)

    config = training("killed", 2)
    plan = random_plan(config, KILLS, seed, drivers=False)
    with killing(chaos.proxy, config, plan, seed=seed):
        train(config)
    print(f"killed: {', '.join(dict.fromkeys(kill.phase for kill in plan))}", file=sys.stderr)
    yield f"2 workers, {len(plan)} kills", *hashes(config)

    parts = [training("resized", workers) for workers in (2, 1, 4)]
    with killing(chaos.proxy, parts[0], [Kill("stop", 2 * CHECKPOINT), Kill("stop", 4 * CHECKPOINT)]):
        for config in parts:
            with contextlib.suppress(KeyboardInterrupt):  # raised after a stop
                train(config)
    yield "2, then 1, then 4 workers", *hashes(parts[-1])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
