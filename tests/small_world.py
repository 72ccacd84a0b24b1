"""A store with the output of the README's commands on the digits, with as few images as possible."""

import runpy
import sys
from pathlib import Path

from tests import servers

JOBS = Path(__file__).resolve().parents[1] / "jobs"
IN_PROCESS = ["--num-workers", "0"]  # without Ray
STEPS = [
    ("prepare_dataset", []),
    ("train_adm", ["--total-images", "1280", "--snapshot-every", "320", *IN_PROCESS]),
    ("train_classifier", ["--total-images", "1280", *IN_PROCESS]),
    ("train_upsampler", ["--total-images", "1280", *IN_PROCESS]),
    ("generate_samples", ["--num-samples", "16", "--sampler.num-steps", "2", "--export", "npz", *IN_PROCESS]),
    (
        "tune_guidance",
        ["--space.num-steps", "2", "3", "--rungs", "64", "128", "--trials", "2", *IN_PROCESS],
    ),
]  # fmt: skip


def build(folder: str) -> None:
    """Run all jobs on the store `folder`."""
    with servers.environment(ADMIRAL_STORE=folder, MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"):
        for job, arguments in STEPS:
            run(job, ["digits", *arguments])


def run(job: str, arguments: list[str]) -> None:
    """Run `python jobs/JOB.py ARGUMENTS` in this process.

    Raises:
        SystemExit: the job failed, with its exit code.
    """
    before = sys.argv
    sys.argv = [f"{job}.py", *arguments]
    try:
        runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
    finally:
        sys.argv = before
