"""The search beside the full grid, on scanned digits: the same result, from a quarter of the samples.

    make demo-search SEED=0

Trains the digits' networks where they are not there yet, draws every setting of a grid to the full n, then lets the
search halve the same settings with a budget of a quarter of these samples. What the grid drew fills the search's cache,
since equal samples need not be drawn twice: the search's books count every sample that it would have drawn. Ends with
one line of JSON; exit code 1 where the search's winner is surely worse than the grid's, or cost too much.
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
from models.metrics import paired_difference
from models.paired_tests import paired_means
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
    """The grid, and what the search may spend."""

    seed: int = 0  # labels and noise, and the search's proposals
    folder: str = "runs/demo-search"  # networks, the grid, the search
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    num_steps: tuple[int, ...] = (5, 10, 20, 40)
    samplers: tuple[str, ...] = ("ddpm", "ddim")
    rungs: tuple[int, ...] = (64, 128, 256, 512, 1024)  # the grid is drawn to the last one
    trials: int = 24  # settings that the search may try
    share: float = 0.25  # of the grid's samples, that the search may draw
    workers: int = 2
    weights: str = "digits/diffusion"
    classifier: str = "digits/classifier"
    dataset: str = "datasets/digits"
    draw_again: bool = False  # let the search draw its samples itself


def demonstrate(demo: Demo) -> dict[str, Any]:
    """Grid, search and their comparison; answers the JSON line."""
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
    """Every setting, drawn to the full n: a search with one rung and no proposals."""
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
        round_size=count,
        finalists=1,
        seed=demo.seed,
        num_workers=demo.workers,
    )


def halving_config(demo: Demo, count: int) -> SearchConfig:
    """The search of the same settings."""
    changes = {
        "output": f"search-seed{demo.seed}",
        "rungs": demo.rungs,
        "trials": demo.trials,
        "round_size": max(2, demo.trials // 3),
        "finalists": 2,
        "budget": str(int(demo.share * count * demo.rungs[-1])),
    }
    return SearchConfig(**grid_config(demo, count).model_dump() | changes)


def fill_cache(grid: SearchConfig, halving: SearchConfig) -> None:
    """The grid's batches where the search looks for its own; not the records, which it makes itself."""
    source, target = (Path(config.path(config.output), "trials") for config in (grid, halving))
    shutil.copytree(
        source, target, copy_function=_link, dirs_exist_ok=True,
        ignore=lambda folder, names: [n for n in names if n.startswith("n-") or n == f"seed-{grid.fresh_seed}"],
    )  # fmt: skip


def _link(source: str, target: str) -> None:
    if not os.path.exists(target):
        os.link(source, target)


def compare(demo: Demo, grid: SearchConfig, grid_result: Any, search_result: Any) -> dict[str, Any]:
    """How the search's winner stands against the grid's, by the grid's own samples; and what each took."""
    n, count = demo.rungs[-1], len(grid_result["trials"])
    scores = {}
    for trial in grid_result["trials"]:
        setting = Setting(**trial["setting"])
        scores[setting] = read_outcome(grid, Evaluation(setting, n, demo.seed)).scores[0]
    best = min(scores, key=lambda setting: float(scores[setting][0].mean()))
    chosen = Setting(**search_result["winner"]["setting"])
    difference = paired_difference(scores[chosen][0], scores[best][0])
    assert difference.low is not None
    ratio = search_result["samples"] / (count * n)
    broken = [
        f"the search's winner is surely worse: {describe(difference)}" if chosen != best and difference.low > 0 else "",
        f"it drew {ratio:.3f} of the grid's samples" if ratio > demo.share else "",
    ]
    return {
        "seed": demo.seed,
        "grid_winner": str(best),
        "search_winner": str(chosen),
        "paired_difference": {"value": difference.value, "interval": [difference.low, difference.high]},
        "grid_samples": count * n,
        "search_samples": search_result["samples"],
        "ratio": round(ratio, 4),
        "variance_unpaired_over_paired": variance_ratios(list(scores.values()), scores[best]),
        "broken": [words for words in broken if words],
    }


def variance_ratios(scores: list[np.ndarray], best: np.ndarray) -> dict[str, float]:
    """Variance of an unpaired difference from the best over that of the paired one: quartiles over all settings."""
    ratios = []
    for other in scores:
        paired = paired_means(other, best)[1][0] ** 2
        if paired > 0:
            ratios.append(float((other[0].var(ddof=1) + best[0].var(ddof=1)) / best.shape[1] / paired))
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {"low": round(float(low), 2), "median": round(float(middle), 2), "high": round(float(high), 2)}


def train(demo: Demo) -> None:
    """Dataset and networks, by the jobs, where they are not there yet."""
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
