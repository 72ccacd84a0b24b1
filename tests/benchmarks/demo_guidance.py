"""Compare every kind of guidance at equal cost on scanned digits, in less than half an hour on two idle cores.

    make demo-guidance

Trains a diffusion model with label dropout and snapshots, and a classifier. Both have the digits preset otherwise. The
first snapshot is the weaker model. Then a search draws every setting of a grid to the same n. Prints a table with the
kind, the scale, the steps, the network evaluations in passes of the model, the bias-corrected Fréchet distance, and the
accuracy: the share of samples that the feature network classifies as their label. The search's folder holds
`guidance.png` and `kinds.png`.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from orchestrator import storage
from orchestrator.search.pictures import best_by_kind
from orchestrator.search.space import Setting
from orchestrator.training.snapshots import snapshots

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = "fd_digits"


@dataclass(frozen=True)
class Demo:
    """The grid and the trainings."""

    store: str = "runs/demo-guidance"  # dataset, networks and search
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    num_steps: tuple[int, ...] = (8, 16)
    samples: int = 1024  # of each setting
    total_images: int = 89_600  # of each training
    weak_images: int = 12_800  # approximately; the length of training of the weaker model
    workers: int = 2


def demonstrate(demo: Demo) -> dict[str, Any]:
    """Train the networks that do not exist yet, search, and return the content of search.json."""
    length = ["--total-images", str(demo.total_images), "--num-workers", str(demo.workers)]
    run = "digits/dropout"
    _job(demo, "prepare_dataset")
    dropout = ["--label-dropout", "0.1", "--snapshot-every", str(demo.weak_images), "--output", run]
    _job(demo, "train_adm", *dropout, *length)
    _job(demo, "train_classifier", *length)
    weak = f"{run}/weights/{snapshots(storage.join(demo.store, run))[0].name}"
    _job(
        demo, "tune_guidance", "--weights", run, "--output", "digits/kinds", "--space.samplers", "ddim",
        "--space.guidance", "classifier", "classifier_free", "auto", "--space.weak-weights", weak,
        "--space.scales", *map(str, demo.scales), "--space.no-continuous", "--space.num-steps",
        *map(str, demo.num_steps), "--rungs", str(demo.samples), "--trials", "1000", "--finalists", "1",
        "--num-workers", str(demo.workers),
    )  # fmt: skip
    return storage.read_json(storage.join(demo.store, "digits", "kinds", "search.json"))


def _job(demo: Demo, job: str, *arguments: str) -> None:
    command = [sys.executable, f"jobs/{job}.py", "digits", "--store", str(Path(demo.store).absolute()), *arguments]
    subprocess.run(command, cwd=ROOT, check=True)


def table(result: dict[str, Any]) -> str:
    """Return a line for each setting, with the best of each kind marked."""
    best = [trial["number"] for trial in best_by_kind(result["trials"], OBJECTIVE).values()]
    lines = [f"{'kind':16} {'scale':>5} {'steps':>5} {'passes':>6}   {'fd_digits, bias-corrected':28} recognised"]
    for trial in sorted(result["trials"], key=lambda trial: trial["behind_winner"][OBJECTIVE]["value"]):
        setting, distance = Setting(**trial["setting"]), trial["objective"][OBJECTIVE]
        accuracy = trial["metrics"]["accuracy"]
        lines.append(
            f"{setting.guidance.kind:16} {setting.guidance.scale:5g} {setting.sampler.num_steps:5} "
            f"{trial['metrics']['evaluations']['value']:6.1f}   {_number(distance):28} {_number(accuracy)}"
            + "  best of its kind"
            * (trial["number"] in best)
        )
    return "\n".join(lines)


def _number(estimate: dict[str, Any]) -> str:
    ends = estimate["interval"]
    return f"{estimate['value']:.4f}" + (f" ({ends[0]:.4f} to {ends[1]:.4f})" if ends else "")


if __name__ == "__main__":
    demo = tyro.cli(Demo, description=__doc__)
    print(table(demonstrate(demo)))
