"""The costs that --dry-run prints agree with the papers; `python -m tests.orchestrator.test_cost` prints both.

Sources: ADM (arXiv 2105.05233) table 7 for images/s on a V100 (theoretical, and reached), table 10 for V100-days; arXiv
2112.10752 table 18 for sampling on an A100.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.costs import Evaluations, count_parameters, peak_memory, training_state_bytes
from models.features import Features
from models.zoo import ZOO
from orchestrator.cost import (
    GPUS,
    Cost,
    CostConfig,
    extraction_cost,
    gpu_seconds,
    peak_flops,
    priced,
    sampling_cost,
    training_cost,
)
from tests.models.published import PAPER_PEAK, TABLE_7

DAY = 86_400
# images that the paper trained on: iterations x batch
IMAGES = {
    "adm-64": 540_000 * 2048,
    "adm-128": 4_360_000 * 256,
    "adm-256": 1_980_000 * 256,
    "adm-512": 1_940_000 * 256,
    "upsampler-64-256": 500_000 * 256,
    "upsampler-128-512": 1_050_000 * 256,
}
# V100-days of the generators, one network or two stages
TABLE_10 = {
    ("adm-128",): 521,
    ("adm-256",): 916,
    ("adm-64", "upsampler-64-256"): 329,
    ("adm-128", "upsampler-128-512"): 1878,
}


@pytest.mark.parametrize(
    "names", [("adm-256",), *(pytest.param(names, marks=pytest.mark.slow) for names in TABLE_10 if len(names) > 1)]
)
def test_training_cost_matches_the_papers_v100_days(names: tuple[str, ...]) -> None:
    assert sum(v100_days(name) for name in names) == pytest.approx(TABLE_10[names], rel=0.01)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 19.5e12),
        ("NVIDIA L40S", "float16", 362e12),
        ("NVIDIA GH200 480GB", "float16", 989e12),
        ("NVIDIA L40", "float16", None),  # neither an L4 nor an L40S
        ("NVIDIA RTX A1000", "float16", None),
        ("NVIDIA T400 4GB", "float16", None),
        ("x86_64 AVX512", "float16", None),
    ],
)
def test_peaks_are_those_of_the_named_gpus(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak


def test_the_assumed_mfu_lies_within_a_tenth_of_the_papers() -> None:
    seconds = gpu_seconds(whole_training("adm-256"), CostConfig(gpu="V100"), half=True)
    assert seconds / DAY == pytest.approx(916, rel=0.1)


def whole_training(name: str, batch: int = 1) -> Cost:
    """Return the cost that --dry-run counts for the paper's training."""
    network = ZOO[name].network
    memory = {"state": training_state_bytes(network, 1), "step": peak_memory(network, "training", batch, half=True)}
    return training_cost(network, IMAGES[name], memory)


def v100_days(name: str) -> float:
    """Return the V100-days of the paper's training at the MFU of table 7."""
    theoretical, reached = TABLE_7[name]
    config = CostConfig(gpu="V100", mfu=reached / theoretical * PAPER_PEAK / GPUS["V100"].half)
    return gpu_seconds(whole_training(name), config, half=True) / DAY


def test_guided_sampling_cost_matches_a_measurement_on_an_a100() -> None:
    network, classifier = ZOO["adm-256"].network, ZOO["classifier-256"].network
    guided = sampling_cost(network, Evaluations(250, 250), images=1, batch=1, half=True, guide=classifier)
    plain = sampling_cost(network, Evaluations(250, 0), images=1, batch=1, half=True)
    config = CostConfig(gpu="A100")
    assert 1 / gpu_seconds(guided, config, half=True) == pytest.approx(0.07, rel=0.05)
    assert 1 / gpu_seconds(plain, config, half=True) == pytest.approx(0.12, rel=0.05)


def test_features_are_counted_on_an_image() -> None:
    def extractor(images: np.ndarray) -> Features:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        weights = torch.ones(5, 3, 1, 1)
        return Features(torch.nn.functional.conv2d(pixels, weights).mean((2, 3)).numpy(), None, None)

    extractor.name, extractor.dimension, extractor.num_classes = "sum", 5, None  # type: ignore[attr-defined]
    cost = extraction_cost(extractor, 16, images=10, batch=4)  # type: ignore[arg-type]
    assert cost.flops == 10 * 2 * 16 * 16 * 3 * 5
    assert sum(cost.memory.values()) >= 4 * 4 * 16 * 16 * (3 + 5), "pixels and features of four images in float32"


def test_the_lines_state_what_does_not_fit_and_what_is_assumed() -> None:
    cost = training_cost(ZOO["adm-256"].network, images=1000, memory={"weights": 9 * 10**9, "activations": 90 * 10**9})
    small, large = (priced(cost, CostConfig(gpu=gpu), 8, 1, half=True) for gpu in ("V100", "H200"))
    assert "TOO MUCH" in small and "TOO MUCH" not in large
    assert "on 8" in large and "ADM table 7" in large and "989" in large
    own = priced(cost, CostConfig(mfu=0.5), 8, 1, half=True)
    assert "50%" in own and "--cost.mfu" in own


def test_dollars_are_printed_with_gpu_hours_if_a_price_is_given() -> None:
    cost = whole_training("adm-64")
    hours = gpu_seconds(cost, CostConfig(), half=True) / 3600
    stated = priced(cost, CostConfig(usd_per_hour=2.5, spot_discount=0.6), 8, 1, half=True)
    assert f"${2.5 * hours:,.2f}, ${hours:,.2f} on spot" in stated and "$" not in priced(cost, CostConfig(), 8, 1, True)
    on_cpus = priced(cost, CostConfig(usd_per_hour=2.5), 8, 0, half=True)
    assert "H100" not in on_cpus and "$" not in on_cpus and "FLOPs" in on_cpus


def paper_table() -> str:
    """Return a Markdown table of the costs of the paper's networks, computed here and stated in the paper."""
    lines = [
        "| network | parameters | forward GMAC | training TFLOPs/image | images/s at 120 TFLOP/s: here, paper "
        "| V100-days at the paper's share: here | at the assumed 37% | H100-days at 37% | memory, batch 8, half |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in IMAGES:
        cost = whole_training(name, batch=8)
        theoretical, days = (str(TABLE_7[name][0]), f"{v100_days(name):,.0f}") if name in TABLE_7 else ("-", "-")
        assumed = [gpu_seconds(cost, CostConfig(gpu=gpu), True) / DAY for gpu in ("V100", "H100")]
        flops = cost.flops_per_image
        lines.append(
            f"| {name} | {count_parameters(ZOO[name].network) / 1e6:.1f} M | {flops / 6e9:,.1f} | {flops / 1e12:.2f} "
            f"| {PAPER_PEAK / flops:.1f}, {theoretical} | {days} | {assumed[0]:,.0f} | {assumed[1]:,.0f} "
            f"| {sum(cost.memory.values()) / 1e9:.1f} GB |"
        )
    lines.append("")
    for names, stated in TABLE_10.items():
        lines.append(f"- {' + '.join(names)}: {sum(map(v100_days, names)):,.0f} V100-days here, {stated} in table 10")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_cluster_page_contains_this_table() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
    assert paper_table() in page.read_text()


if __name__ == "__main__":
    print(paper_table())
