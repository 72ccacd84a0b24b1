"""The papers' findings, looked for in small: scanned digits on two cores, in about an hour.

    make findings

Runs the small tables of `jobs/run_ablations.py` and prints, finding by finding, what the paper found, what is seen here
with its 95% interval, and whether that agrees. A finding whose interval holds 0 cannot be told at this size. The same
command goes on where it was stopped.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from orchestrator import storage
from orchestrator.ablations.result import BITS, number

ROOT = Path(__file__).resolve().parents[2]
FD = "fd_digits"

Json = dict[str, Any]


class Finding(NamedTuple):
    """A difference between two rows of a table, and the sign that a paper found it to have."""

    paper: str
    text: str
    table: str
    row: str
    metric: str
    sign: int


def _sampling(steps: int) -> list[Finding]:
    """Return what is said about this number of steps; DDIM is the better one up to 50 of 1,000."""
    table, sign = "sampling_steps_small", -1 if steps <= 50 else 1
    better = "better" if sign < 0 else "worse"
    return [
        Finding("DDIM table 1", f"DDIM is {better} than DDPM at {steps} steps", table, f"ddim {steps}", FD, sign),
        Finding("IDDPM figure 8", f"learned range beats fixed large variances at {steps} steps", table,
                f"fixed large {steps}", FD, 1),
    ]  # fmt: skip


ADM, IDDPM, DDPM = "adm_table1_small", "iddpm_objectives_small", "ddpm_parameterisation_small"
GUIDANCE = "guidance_curve_small"
FINDINGS = [
    Finding("ADM table 3", "addition and GroupNorm is worse than AdaGN", ADM, "addition and GroupNorm", FD, 1),
    Finding("ADM table 1", "attention at more resolutions helps", ADM, "attention at 8 and 4", FD, -1),
    Finding("ADM table 1", "more heads help", ADM, "attention at 8 and 4, 4 heads", FD, -1),
    Finding("ADM table 1", "BigGAN's up- and downsampling helps", ADM, "BigGAN up and down", FD, -1),
    Finding("ADM table 1", "rescaling residuals does not help", ADM, "residuals rescaled", FD, 1),
    Finding("IDDPM table 1", "the linear schedule is worse than cosine in bits/dim", IDDPM, "linear, hybrid", BITS, 1),
    Finding("IDDPM table 1", "the linear schedule gives worse samples", IDDPM, "linear, hybrid", FD, 1),
    Finding("IDDPM table 1", "the simple loss is worse than the hybrid in bits/dim", IDDPM, "cosine, simple", BITS, 1),
    Finding("IDDPM table 1", "the bound as loss is better in bits/dim", IDDPM, "cosine, bound", BITS, -1),
    Finding("IDDPM table 1", "the bound as loss gives worse samples", IDDPM, "cosine, bound", FD, 1),
    Finding("IDDPM figure 6", "importance sampling helps the bound", IDDPM,
            "cosine, bound, importance sampling", BITS, -1),
    Finding("IDDPM figure 4", "without the noisiest fifth of a cosine chain, samples are worse", "sampling_steps_small",
            "ddpm 80, noisiest fifth skipped", FD, 1),
    Finding("DDPM table 2", "previous x by the simple loss is worse than eps", DDPM, "previous x, simple", FD, 1),
    Finding("DDPM section 3.2", "predicting x_0 by the simple loss is worse than eps", DDPM, "x_0, simple", FD, 1),
    Finding("DDPM table 2", "eps by the bound is worse than eps by the simple loss", DDPM, "eps, bound", FD, 1),
    *(finding for steps in (5, 10, 25, 100) for finding in _sampling(steps)),
    *(Finding("ADM figure 4", f"{what} with the scale, {kind}conditional", GUIDANCE, row, metric, sign)
      for kind, row in (("", "scale 4"), ("un", "unconditional, scale 4"))
      for what, metric, sign in (("precision rises", "precision", 1), ("recall falls", "recall", -1),
                                 ("Inception Score rises", "inception_score_digits", 1))),
]  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """Where the tables lie, and what they are run with."""

    store: str = "runs/findings"
    num_workers: int = 1  # of each training
    together: int = 2  # trainings at once
    tables: tuple[str, ...] = tuple(dict.fromkeys(finding.table for finding in FINDINGS))


def run(options: Findings) -> dict[str, Json]:
    """Prepare, train the classifier, run the tables; return the content of each ablations.json."""
    workers = ["--num-workers", str(options.num_workers)]
    _job(options, "prepare_dataset", "digits")
    _job(options, "train_classifier", "digits", *workers)
    found = {}
    for table in options.tables:
        _job(options, "run_ablations", table, *workers, "--together", str(options.together))
        found[table] = storage.read_json(storage.join(options.store, "ablations", table, "ablations.json"))
    return found


def _job(options: Findings, job: str, *arguments: str) -> None:
    command = [sys.executable, f"jobs/{job}.py", *arguments, "--store", str(Path(options.store).absolute())]
    subprocess.run(command, cwd=ROOT, check=True)


def judged(finding: Finding, result: Json) -> tuple[str, str]:
    """Return what is seen here, and whether it agrees with the paper."""
    row = result["rows"].get(finding.row)
    difference = row["differences"].get(finding.metric) if row else None
    if difference is None:
        return "not measured", "cannot be told"
    if difference["interval"] is None:
        return number(difference), "cannot be told"
    low, high = (finding.sign * end for end in difference["interval"])
    low, high = min(low, high), max(low, high)
    verdict = "agrees" if low > 0 else "disagrees" if high < 0 else "cannot be told"
    return f"{number(difference)}, {difference['n']} training seed{'s' * (difference['n'] > 1)}", verdict


def main(options: Findings) -> None:
    """Print the table of findings, in Markdown."""
    results = run(options)
    print("| paper | finding | measured by | difference seen here, 95% interval | verdict |\n|---|---|---|---|---|")
    for finding in FINDINGS:
        if finding.table in results:
            seen, verdict = judged(finding, results[finding.table])
            print(f"| {finding.paper} | {finding.text} | {finding.metric} | {seen} | {verdict} |")


if __name__ == "__main__":
    main(tyro.cli(Findings, description=__doc__))
