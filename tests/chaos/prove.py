"""P0: one SHA-256, five times. Run by `make prove`, or by hand as `python -m tests.chaos.prove --seed 0`.

A small diffusion model is trained by the real loop under Ray, with reduction=exact: by 1, 2 and 4 workers, by 2 workers
of which some are killed at random, and by 2, then 1, then 4 workers. What is printed is the hash of the state at the
end: weights, every average, the optimizer. Exit code 1 where two of them differ.
"""

import sys
from dataclasses import dataclass

import tyro

from cluster.session import session
from orchestrator.training import train
from tests.chaos.evidence import consumed, order_hash, state_hash
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
