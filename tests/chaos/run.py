"""Trainings under random kills, and one line of JSON with the result. Run by hand, or by `make chaos`:

    python -m tests.chaos.run --kills 20 --seed 0

The training job runs with 2 and 4 workers on s3:// behind a proxy that also fails requests at random. Workers and
drivers are killed at random moments of every phase, and a last training loses a whole node. Every training must end
with the state of an undisturbed training, and must have consumed the same rows. The exit code is 1 if anything differs.
The same seed gives the same plan.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import tyro

from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from tests.chaos.audit import consumed, noise_hash, order_hash, state_hash
from tests.chaos.killer import random_plan
from tests.chaos.nodes import lose_a_node
from tests.chaos.trainings import arguments, chaos_storage, config_of, train_by_job

CHECKPOINTS = 8  # in a training
KILLS = 5  # in a training


@dataclass(frozen=True)
class Options:
    """The kills."""

    kills: int = 20  # SIGKILLs of workers and drivers
    seed: int = 0  # of the plans


def main(options: Options) -> None:
    """Run all trainings, and print the result as JSON in the last line."""
    counts: Counter[str] = Counter()
    with chaos_storage(options.seed) as chaos:
        config = config_of(arguments(chaos.store, "undisturbed", 0, CHECKPOINTS))
        train(config)
        expected = _hashes(config)
        hashes_of: dict[str, dict[str, str]] = {"undisturbed, 1 worker": expected}
        for number, remaining in enumerate(range(options.kills, 0, -KILLS)):
            workers, seed = (2, 4)[number % 2], options.seed * 1000 + number
            name = f"{workers} workers, seed {seed}"
            argv = arguments(chaos.store, f"killed-{number}", workers, CHECKPOINTS)
            plan = random_plan(config_of(argv), min(KILLS, remaining), seed, drivers=True)
            print(f"{name}: {', '.join(f'{k.victim} {k.phase} at {k.position}' for k in plan)}", flush=True)
            faults = [chaos.proxy.add(fault, probability=0.01) for fault in ("503", "reset", "half", "swallow")]
            train_by_job(argv, chaos.proxy, plan, seed)
            counts.update(f"{kill.phase} of {kill.victim}" for kill in plan)
            for rule in faults:
                chaos.proxy.remove(rule)
            hashes_of[name] = _hashes(config_of(argv))
            print(f"{name}: {hashes_of[name]}", flush=True)
        argv = arguments(chaos.store, "node", 2, CHECKPOINTS)
        counts["a node"] += lose_a_node(argv, chaos.proxy)
        hashes_of["a node lost"] = _hashes(config_of(argv))
        failed = chaos.proxy.faults()
    equal = all(hashes == expected for hashes in hashes_of.values())
    result: dict[str, Any] = {
        "seed": options.seed,
        "kills": sum(counts.values()),
        "by_kind": dict(sorted(counts.items())),
        "requests_failed": failed,
        "trainings": len(hashes_of),
        "hashes_compared": sum(len(hashes) for hashes in hashes_of.values()),
        "equal": equal,
        "state": sorted({hashes["state"] for hashes in hashes_of.values()}),
    }
    print(json.dumps(result))
    sys.exit(0 if equal else 1)


def _hashes(config: AdmConfig) -> dict[str, str]:
    rows = consumed(config)
    return {"state": state_hash(config), "order": order_hash(rows), "noise": noise_hash(rows)}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
