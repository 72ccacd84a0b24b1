"""Trainings under random kills, and one line of JSON with the result. Run by hand, or by `make chaos`:

    python -m tests.chaos.run --kills 20 --seed 0

The training job runs with 2 and 4 workers on s3:// behind a proxy that also fails requests at random. Workers and
drivers are killed at random moments of every phase, and a last training loses a whole node. Every training must end
with the state of an undisturbed training, and must have consumed the same rows. The drift of reduction=fast is measured
too. The exit code is 1 if anything differs. The same seed gives the same plan.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import tyro

from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from tests.chaos.audit import consumed, noise_hash, order_hash, state_hash
from tests.chaos.killer import Kill, random_plan
from tests.chaos.nodes import lose_a_node
from tests.chaos.trainings import Ground, arguments, config_of, ground, train_by_job
from tests.orchestrator.training.runs import newest_checkpoint

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
    with ground(options.seed) as place:
        expected = _undisturbed(place, "exact")
        found: dict[str, dict[str, str]] = {"undisturbed, 1 worker": expected}
        left = options.kills
        for number, workers in zip(range(options.kills), cycle((2, 4)), strict=False):
            if not left:
                break
            seed = options.seed * 1000 + number
            name = f"{workers} workers, seed {seed}"
            argv = arguments(place.store, f"killed-{number}", workers, CHECKPOINTS)
            plan = random_plan(config_of(argv), min(KILLS, left), seed, drivers=True)
            left -= len(plan)
            print(f"{name}: {', '.join(f'{k.victim} {k.phase} at {k.position}' for k in plan)}", flush=True)
            faults = [place.proxy.add(fault, probability=0.01) for fault in ("503", "reset", "half", "swallow")]
            counts += train_by_job(argv, place.proxy, plan, seed).kills
            for rule in faults:
                place.proxy.remove(rule)
            found[name] = _hashes(config_of(argv))
            print(f"{name}: {found[name]}", flush=True)
        argv = arguments(place.store, "node", 2, CHECKPOINTS)
        counts["a node"] += lose_a_node(argv, place.proxy)
        found["a node lost"] = _hashes(config_of(argv))
        drift = _drift_of_fast(place, options.seed)
        failed = place.proxy.faults()
    equal = all(hashes == expected for hashes in found.values())
    result: dict[str, Any] = {
        "seed": options.seed,
        "kills": sum(counts.values()),
        "by_kind": dict(sorted(counts.items())),
        "requests_failed": failed,
        "trainings": len(found),
        "hashes_compared": sum(len(hashes) for hashes in found.values()),
        "equal": equal,
        "state": sorted({hashes["state"] for hashes in found.values()}),
        "drift_of_fast": drift,
    }
    print(json.dumps(result))
    sys.exit(0 if equal else 1)


def _undisturbed(place: Ground, reduction: str) -> dict[str, str]:
    config = config_of(arguments(place.store, f"undisturbed-{reduction}", 0, CHECKPOINTS, reduction=reduction))
    train(config)
    return _hashes(config)


def _hashes(config: AdmConfig) -> dict[str, str]:
    rows = consumed(config)
    return {"state": state_hash(config), "order": order_hash(rows), "noise": noise_hash(rows)}


def _drift_of_fast(place: Ground, seed: int) -> dict[str, float]:
    """Return the largest differences of weights after reduction=fast on 4 workers: under kills, and from exact."""
    weights = {}
    for name, kills in (("fast", 0), ("fast-killed", 2)):
        argv = arguments(place.store, name, 4, CHECKPOINTS, reduction="fast")
        plan: list[Kill] = random_plan(config_of(argv), kills, seed, drivers=False)
        train_by_job(argv, place.proxy, plan, seed)
        weights[name] = _weights(config_of(argv))
    weights["exact"] = _weights(config_of(arguments(place.store, "undisturbed-exact", 0, CHECKPOINTS)))
    return {
        f"from {name}": max(float((weights["fast"][key] - weights[name][key]).abs().max()) for key in weights[name])
        for name in ("fast-killed", "exact")
    }


def _weights(config: AdmConfig) -> dict[str, torch.Tensor]:
    found = newest_checkpoint(config.path(config.output))
    assert found is not None
    return {name: tensor.double() for name, tensor in found.tensors.items() if name.startswith("model.")}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
