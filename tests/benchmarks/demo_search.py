"""Compare a search with the full grid on scanned digits: its regret at a quarter of the network evaluations.

    make demo-search SEED=0

Trains the digits networks if they do not exist yet and draws every setting of a grid to the full n. Then it runs
successive halving on the same settings with a quarter of these evaluations as its budget. The search reuses the grid's
samples, but its budget counts every sample that it would have drawn. The last line is JSON with the regret on the
grid's samples. The exit code is 1 if the search's winner is significantly worse than the grid's, or if the search cost
too much.
`python -m tests.benchmarks.search_regret` measures the regret of many searches.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from cluster.session import session
from models.paired_tests import differences, interval
from orchestrator import storage
from orchestrator.evaluation.metrics import describe
from orchestrator.search.config import SearchConfig
from orchestrator.search.evaluator import read_outcome
from orchestrator.search.halving import Evaluation
from orchestrator.search.job import search
from orchestrator.search.space import Setting, SpaceConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Demo:
    """The grid and the budget of the search."""

    seed: int = 0  # labels and noise, and the search's proposals
    folder: str = "runs/demo-search"  # networks, the grid, the search
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    num_steps: tuple[int, ...] = (5, 10, 20, 40)
    samplers: tuple[str, ...] = ("ddpm", "ddim")
    rungs: tuple[int, ...] = (64, 128, 256, 512, 1024)  # the grid is drawn to the last one
    share: float = 0.25  # budget of the search, as a share of the network evaluations of the grid
    workers: int = 2
    weights: str = "digits/diffusion"
    classifier: str = "digits/classifier"
    dataset: str = "datasets/digits"
    draw_again: bool = False  # do not reuse the samples of the grid


def demonstrate(demo: Demo) -> dict[str, Any]:
    """Run the grid and the search, and return their comparison."""
    count = len(demo.scales) * len(demo.num_steps) * len(demo.samplers)
    grid, halving = grid_config(demo, count), halving_config(demo, count)
    with session(demo.workers and demo.workers + 1):
        begin = time.monotonic()
        grid_result = storage.read_json(search(grid))
        drawn = time.monotonic()
        if not demo.draw_again:
            fill_cache(grid, halving)
        search_result = storage.read_json(search(halving))
        end = time.monotonic()
    return compare(demo, grid, grid_result, search_result) | {
        "grid_seconds": round(drawn - begin, 1),
        "search_seconds": round(end - drawn, 1),
        "seconds": round(end - begin, 1),
    }


def grid_config(demo: Demo, count: int) -> SearchConfig:
    """Return the config of the grid: a search with one rung, at the full n."""
    return SearchConfig(
        store=os.path.abspath(demo.folder),
        weights=(demo.weights,),
        classifier=demo.classifier,
        reference=demo.dataset,
        output=f"grid-seed{demo.seed}",
        space=SpaceConfig.model_validate(
            {"scales": demo.scales, "continuous": False, "num_steps": demo.num_steps, "samplers": demo.samplers}
        ),
        rungs=demo.rungs[-1:],
        trials=count,
        finalists=1,
        seed=demo.seed,
        num_workers=demo.workers,
    )


def halving_config(demo: Demo, count: int) -> SearchConfig:
    """Return the config of the search of the same settings."""
    changes = {
        "output": f"search-seed{demo.seed}",
        "rungs": demo.rungs,
        "budget": f"{100 * demo.share:g}%",
    }
    return SearchConfig(**grid_config(demo, count).model_dump() | changes)


def fill_cache(grid: SearchConfig, halving: SearchConfig) -> None:
    """Link the grid's batches, but not its records, into the folder of the search."""
    source, target = (Path(config.path(config.output), "trials") for config in (grid, halving))
    shutil.copytree(
        source, target, copy_function=_link, dirs_exist_ok=True,
        ignore=lambda folder, names: [n for n in names if n.startswith("n-") or n == f"seed-{grid.fresh_seed}"],
    )  # fmt: skip


def _link(source: str, target: str) -> None:
    if not os.path.exists(target):
        os.link(source, target)


def compare(demo: Demo, grid: SearchConfig, grid_result: Any, search_result: Any) -> dict[str, Any]:
    """Compare the search's winner with the grid's on the grid's samples, and the costs of both."""
    n, count = demo.rungs[-1], len(grid_result["trials"])
    outcomes = {}
    for trial in grid_result["trials"]:
        setting = Setting(**trial["setting"])
        outcomes[setting] = read_outcome(grid, Evaluation(setting, n, demo.seed))
    (name,) = grid.objective
    scores = {setting: outcome.scores[name] for setting, outcome in outcomes.items()}
    best = min(scores, key=lambda setting: float(scores[setting].mean()))
    chosen = Setting(**search_result["winner"]["setting"])
    regret = interval(differences(scores[chosen], scores[best]), n, outcomes[best].strata)
    assert regret.low is not None
    evaluations = [result["evaluations"] - result["final_evaluations"] for result in (search_result, grid_result)]
    ratio = evaluations[0] / evaluations[1]
    broken = [
        f"the search's winner is significantly worse: {describe(regret)}" if chosen != best and regret.low > 0 else "",
        f"the search took {ratio:.3f} of the grid's evaluations" if ratio > demo.share else "",
    ]
    return {
        "seed": demo.seed,
        "grid_winner": str(best),
        "search_winner": str(chosen),
        "regret": {"value": regret.value, "interval": [regret.low, regret.high]},
        "grid_samples": count * n,
        "search_samples": search_result["samples"],
        "evaluations_ratio": round(ratio, 4),
        "variance_unpaired_over_paired": variance_ratios(list(scores.values()), scores[best]),
        "broken": [text for text in broken if text],
    }


def variance_ratios(scores: list[np.ndarray], best: np.ndarray) -> dict[str, float]:
    """Return quartiles over all settings of the variance of unpaired differences from the best over paired ones."""
    ratios = []
    for other in scores:
        paired = differences(other, best).var(ddof=1)
        if paired > 0:
            ratios.append(float((other.var(ddof=1) + best.var(ddof=1)) / paired))
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {"low": round(float(low), 2), "median": round(float(middle), 2), "high": round(float(high), 2)}


def train(demo: Demo) -> None:
    """Prepare the dataset and train the networks if they do not exist yet."""
    for job in ("prepare_dataset", "train_adm", "train_classifier"):
        command = [sys.executable, f"jobs/{job}.py", "digits", "--store", os.path.abspath(demo.folder)]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    chosen_demo = tyro.cli(Demo, description=__doc__)
    if not storage.is_absolute(chosen_demo.weights):
        train(chosen_demo)
    result = demonstrate(chosen_demo)
    print(json.dumps(result))
    sys.exit(bool(result["broken"]))
