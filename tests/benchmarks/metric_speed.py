"""Compare the speed of metrics with straightforward implementations, by alternating runs and their median ratio.

Times are CPU seconds summed over threads, so that other load on the machine has little effect.

    python -m tests.benchmarks.metric_speed [--only NAME] [--pairs N] [--num-threads N]

- inception: features of a batch by torch-fidelity and by Admiral, with the same random weights. It needs the package
  torch-fidelity (`pip install -e '.[bench]'`).
- frechet: by scipy's `sqrtm` of the product, and by symmetric eigenvalues.
- precision: of 10,000 samples and 10,000 references, by `torch.cdist` with whole matrices, and by exact blocks.
- merging: seconds for 1 to 64 shards of the same features. The time is linear if it is constant for each block.
"""

import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from models.inception import InceptionNetwork
from models.manifolds import precision_recall
from models.metrics import BLOCK, Moments, block_moments, frechet_distance, merge_in_order, moments
from tests.benchmarks.pool_efficiency import median_interval
from tests.reference_metrics import random_weights

DIMENSION = 2048


@dataclass
class Options:
    only: Literal["all", "inception", "frechet", "precision", "merging"] = "all"  # the comparison to run
    pairs: int = 3  # alternating runs of each
    num_threads: int = 1  # CPU threads
    batch_size: int = 16  # images of the Inception network
    image_size: int = 64  # pixels
    rows: int = 10_000  # samples, and references, of precision and recall


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(options.num_threads)
    print(options)
    print(f"{'what':12} {'plain s':>9} {'ours s':>9} {'plain/ours':>10}  {'from':>6} {'to':>6}  goal")
    for name, time_it in (("inception", inception), ("frechet", frechet), ("precision", precision)):
        if options.only in ("all", name):
            time_it(options)
    if options.only in ("all", "merging"):
        merging()


def inception(options: Options) -> None:
    """Time the features of one batch."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        print(f"inception    skipped: torch-fidelity cannot be imported ({error}); run pip install -e '.[bench]'")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(_random_inception(), path)
        peer = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    ours = InceptionNetwork(_random_inception())
    pixels = np.random.default_rng(0).integers(
        0, 256, (options.batch_size, options.image_size, options.image_size, 3), dtype=np.uint8
    )
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def plain() -> Tensor:
        with torch.no_grad():
            return peer(channels_first)[0]

    difference = np.linalg.norm(plain().numpy() - ours(pixels).pool) / np.linalg.norm(ours(pixels).pool)
    assert difference < 1e-4, f"the features differ by {difference}"
    _row("inception", options.pairs * 4, plain, lambda: ours(pixels), 1.5)


def _random_inception() -> dict[str, Tensor]:
    """Return the random weights of the golden data."""
    golden = Path(__file__).parents[1] / "golden" / "metrics"
    shapes = json.loads((golden / "inception_state_dict.json").read_text())["shapes"]
    with np.load(golden / "inception_random_weights.npz") as arrays:
        return random_weights({name: arrays[name] for name in ("seed", "fc_scale")}, shapes)


def frechet(options: Options) -> None:
    """Time the distance of two Gaussians of 2,048 dimensions."""
    import scipy.linalg

    rng = np.random.default_rng(1)
    a, b = (moments(np.maximum(rng.standard_normal((4096, DIMENSION)), 0) * s).gaussian for s in (1.0, 1.1))

    def plain() -> float:
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
        delta = a.mean - b.mean
        return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root.real))

    def ours() -> float:
        return frechet_distance(a, b)

    assert math.isclose(plain(), ours(), rel_tol=1e-6)
    _row("frechet", options.pairs, plain, ours, 4)


def precision(options: Options) -> None:
    """Time precision and recall of unit Gaussians in 2,048 dimensions."""
    rng = np.random.default_rng(2)
    reference, samples = (rng.standard_normal((options.rows, DIMENSION), np.float32) for _ in range(2))
    before = _peak_bytes()

    def ours() -> tuple[float, float]:
        estimates = precision_recall(reference, samples)
        return estimates[0].value, estimates[1].value

    ours()
    print(f"precision    {(_peak_bytes() - before) / 2**30:.2f} GiB at the peak in addition to the features; goal: 2")
    real, fake = torch.from_numpy(reference), torch.from_numpy(samples)

    def plain() -> tuple[float, float]:
        real_radii, fake_radii = (torch.cdist(x, x).kthvalue(4, dim=1).values for x in (real, fake))
        distances = torch.cdist(fake, real)
        inside = (distances <= real_radii).any(1), (distances <= fake_radii[:, None]).any(0)
        return float(inside[0].double().mean()), float(inside[1].double().mean())

    assert np.allclose(plain(), ours(), atol=2 / options.rows)
    _row("precision", options.pairs, plain, ours, 1.5)


def merging() -> None:
    """Time merging the same 64 blocks in 1 to 64 shards, and 16 to 256 blocks."""
    blocks = list(block_moments(np.random.default_rng(3).standard_normal((64 * BLOCK, 512), np.float32)))

    def merged(parts: list[list[Moments]]) -> Moments:
        return merge_in_order(block for part in parts for block in part)

    for num_shards in (1, 4, 16, 64):
        size = 64 // num_shards
        parts = [blocks[i : i + size] for i in range(0, 64, size)]
        seconds = min(_seconds(partial(merged, parts)) for _ in range(5))
        print(f"merging      {num_shards:3} shards of {size:2} blocks: {seconds * 1e3:7.1f} ms")
    for count in (16, 64, 256):
        many = (blocks * 4)[:count]
        seconds = min(_seconds(partial(merge_in_order, many)) for _ in range(5))
        print(f"merging      {count:3} blocks: {seconds * 1e3:7.1f} ms, {seconds * 1e3 / count:5.2f} ms each")


def _row(name: str, pairs: int, plain: Callable[[], Any], ours: Callable[[], Any], goal: float) -> None:
    seconds = np.array([[_seconds(plain), _seconds(ours)] for _ in range(pairs)])
    ratios = np.sort(seconds[:, 0] / seconds[:, 1])
    low, high = median_interval(ratios)
    medians = np.median(seconds, axis=0)
    numbers = f"{medians[0]:9.2f} {medians[1]:9.2f} {np.median(ratios):10.2f}  {low:6.2f} {high:6.2f}"
    print(f"{name:12} {numbers}  {goal:g}")


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
