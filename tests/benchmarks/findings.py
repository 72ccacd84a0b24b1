"""Check findings of the papers on a small scale: scanned digits on two cores, in about an hour.

    make findings

Runs the small tables of `jobs/run_ablations.py`, two at a time, each in its own process. Then prints each finding of a
paper, the difference that is measured here with its 95% interval, and whether they agree. If the interval contains 0,
the verdict is "cannot be told". The same command resumes the tables.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro

from models.diffusion import Diffusion, LossSecondMomentTimesteps, TimestepSampler, UniformTimesteps
from models.images import from_uint8
from models.metrics import Estimate, student_quantile
from orchestrator import storage
from orchestrator.ablations.result import BITS, format_estimate
from orchestrator.data.dataset import load_manifest, read_images
from orchestrator.evaluation.metrics import describe
from orchestrator.weights.network import load_network

ROOT = Path(__file__).resolve().parents[2]
FD = "fd_digits"
NOISE = "log10 of the gradient's variance"
BATCHES = 100  # gradients from which a variance is estimated
DATASET, CLEAN_CLASSIFIER = "datasets/digits", "digits/clean-classifier"

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
    """Return the findings for this number of steps. DDIM is better than DDPM up to 50 of 1,000 steps."""
    table, sign = "sampling_steps_small", -1 if steps <= 50 else 1
    better = "better" if sign < 0 else "worse"
    return [
        Finding("DDIM table 1", f"DDIM is {better} than DDPM at {steps} steps", table, f"ddim {steps}", FD, sign),
        Finding("IDDPM figure 8", f"learned range beats fixed large variances at {steps} steps",
                "iddpm_variances_small", f"fixed large {steps}", FD, 1),
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
    Finding("IDDPM figure 6", "importance sampling helps the bound", "iddpm_importance_small",
            "bound, importance sampling", BITS, -1),
    Finding("IDDPM section 3.3", "importance sampling makes the bound's gradient less noisy", IDDPM,
            "cosine, bound", NOISE, -1),
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
    Finding("ADM section 4.1", "a classifier of clean images guides worse", GUIDANCE,
            "scale 1, classifier of clean images", FD, 1),
]  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """The tables that are run, and their store."""

    store: str = "runs/findings"
    processes: int = 2  # tables at once, each on one core
    tables: tuple[str, ...] = tuple(dict.fromkeys(finding.table for finding in FINDINGS))


def run(options: Findings) -> dict[str, Json]:
    """Prepare, train both classifiers, and run the tables; return the content of each ablations.json."""
    _job(options, "prepare_dataset", "digits", "--num-workers", "0")
    _job(options, "train_classifier", "digits", "--num-workers", "0")
    _job(options, "train_classifier", "digits", "--num-workers", "0", "--noised", "false", "--output", CLEAN_CLASSIFIER)

    def result(table: str) -> Json:
        _job(options, "run_ablations", table, "--num-workers", "0")
        return storage.read_json(storage.join(options.store, "ablations", table, "ablations.json"))

    with ThreadPoolExecutor(options.processes) as pool:
        results = dict(zip(options.tables, pool.map(result, options.tables), strict=True))
    if IDDPM in results:
        row = results[IDDPM]["rows"]["cosine, bound"]
        row["differences"][NOISE] = gradient_noise(options.store, row["seeds"])
    return results


def _job(options: Findings, job: str, *arguments: str) -> None:
    store = ["--store", str(Path(options.store).absolute()), "--no-tracking"]
    subprocess.run([sys.executable, f"jobs/{job}.py", *arguments, *store], cwd=ROOT, check=True)


def gradient_noise(store: str, seeds: list[int]) -> Json:
    """Return how importance sampling changes the variance of the bound's gradient, over networks of all seeds.

    The difference is of log10 of the covariance's trace, by importance sampling minus by uniform timesteps, at the last
    weights of the row "cosine, bound", over BATCHES batches of 64 images.
    """
    changes = []
    for seed in seeds:
        run = storage.join(store, "ablations", IDDPM, "runs", f"cosine--bound-seed{seed}")
        changes.append(change_of_noise(run, storage.join(store, DATASET), seed))
    half = student_quantile(0.975, len(seeds) - 1) * float(np.std(changes, ddof=1)) / len(seeds) ** 0.5
    mean = float(np.mean(changes))
    return describe(Estimate(mean, len(seeds), mean - half, mean + half))


def change_of_noise(run: str, dataset: str, seed: int) -> float:
    """Return log10 of the gradient's variance by importance sampling over that by uniform timesteps."""
    network, rng = load_network(run), np.random.default_rng(seed)
    diffusion, manifest = Diffusion(network.diffusion), load_manifest(dataset)
    size, count = network.architecture.image_size, manifest.num_samples("train")
    pixels, labels = read_images(manifest, "train", 0, count, size)
    images, classes = from_uint8(torch.from_numpy(pixels), network.architecture.in_channels), torch.from_numpy(labels)
    parameters = list(network.module.requires_grad_().parameters())

    def losses(timesteps: np.ndarray) -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(count, size=len(timesteps)))
        noise = torch.from_numpy(rng.standard_normal((len(rows), *images.shape[1:]), np.float32))
        terms = diffusion.losses(network.module, images[rows], torch.from_numpy(timesteps), noise, y=classes[rows])
        return terms["loss"]

    def variance(timesteps: TimestepSampler) -> float:
        gradients = []
        for _ in range(BATCHES):
            t, weights = timesteps.draw(rng.random(64))
            loss = (losses(t) * torch.from_numpy(weights)).mean()
            gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
        return float(torch.stack(gradients).var(dim=0).sum())

    importance = LossSecondMomentTimesteps(diffusion.num_timesteps)
    all_timesteps = np.arange(diffusion.num_timesteps)
    with torch.no_grad():
        for _ in range(importance.history_per_term):
            importance.update(all_timesteps, losses(all_timesteps).double().numpy())
    return float(np.log10(variance(importance) / variance(UniformTimesteps(diffusion.num_timesteps))))


def judge(finding: Finding, result: Json) -> tuple[str, str]:
    """Return the measured difference as text, and the verdict: agrees, disagrees or cannot be told."""
    row = result["rows"].get(finding.row)
    difference = row["differences"].get(finding.metric) if row else None
    if difference is None:
        return "not measured", "cannot be told"
    if difference["interval"] is None:
        return format_estimate(difference), "cannot be told"
    low, high = (finding.sign * end for end in difference["interval"])
    low, high = min(low, high), max(low, high)
    verdict = "cannot be told"
    if low > 0:
        verdict = "agrees"
    elif high < 0:
        verdict = "disagrees"
    return f"{format_estimate(difference)}, {difference['n']} training seed{'s' * (difference['n'] > 1)}", verdict


def main(options: Findings) -> None:
    """Print the table of findings, in Markdown."""
    results = run(options)
    print("| paper | finding | measured by | difference seen here, 95% interval | verdict |\n|---|---|---|---|---|")
    for finding in FINDINGS:
        if finding.table in results:
            measured, verdict = judge(finding, results[finding.table])
            print(f"| {finding.paper} | {finding.text} | {finding.metric} | {measured} | {verdict} |")


if __name__ == "__main__":
    main(tyro.cli(Findings, description=__doc__))
