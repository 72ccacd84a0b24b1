"""Test that means by quartile of t are means over images for every split into microbatches."""

import pytest
import torch

from cluster.collectives import Group
from orchestrator.training.meter import Meter, means_by_quartile, sums_by_quartile
from orchestrator.training.state import TrainingState
from tests.orchestrator.training.runs import adm, context


def test_means_by_quartile_are_over_images() -> None:
    terms = {"loss": torch.tensor([1.0, 2.0, 4.0, 8.0]), "t": torch.tensor([0, 249, 250, 999])}
    parts = [{name: values[rows] for name, values in terms.items()} for rows in (slice(0, 1), slice(1, 4))]
    sums = sum(sums_by_quartile(part, ["loss"], 1000) for part in parts)
    assert isinstance(sums, torch.Tensor)
    assert means_by_quartile(sums, ["loss"]) == {"loss": 3.75, "loss_q0": 1.5, "loss_q1": 4.0, "loss_q3": 8.0}


def test_a_report_covers_the_time_since_the_last_one() -> None:
    config = adm("none", "none", batch_size=4, dtype="float16")
    state, meter = TrainingState(config, torch.device("cpu")), Meter(config, context(), Group(0, 1))
    for loss, norm, undecodable in ((1.0, 3.0, 0), (2.0, torch.nan, 2)):
        meter.add(
            [{"loss": torch.full((4,), loss), "t": torch.zeros(4, dtype=torch.int64)}], torch.tensor(norm), undecodable
        )
        state.position += 4
    records = list(meter.report(state))
    meter.add([{"loss": torch.full((4,), 5.0), "t": torch.zeros(4, dtype=torch.int64)}], torch.tensor(1.0), 0)
    records += meter.report(state)
    first, second = (record["metrics"] for record in records)
    assert records[0]["images"] == 8
    assert (first["loss"], first["loss_q0"], first["grad_norm"]) == (1.5, 1.5, 3.0)
    assert (first["skipped_steps"], first["undecodable_images"], first["log2_loss_scale"]) == (1, 2, 20)
    assert (second["loss"], second["skipped_steps"], second["undecodable_images"]) == (5.0, 0, 0)
    weights = torch.cat([tensor.detach().flatten() for tensor in state.model.parameters()])
    assert first["param_norm"] == pytest.approx(float(weights.norm()), rel=1e-5)
    assert (
        first["peak_memory_bytes"] > 2**20 and 0 <= first["data_wait_fraction"] <= 1 and first["images_per_second"] > 0
    )
    assert "mfu" not in first, "the peak of this CPU is unknown"
