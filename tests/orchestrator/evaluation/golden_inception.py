"""A file of weights by the golden recipe, taken for the published ones, which no test can download."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.evaluation import extractors
from tests.reference_metrics import random_weights

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"


def write_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], str]:
    """Write them to `path`, and let their digest be the one wanted; answer state dict and digest."""
    shapes = json.loads((GOLDEN / "inception_state_dict.json").read_text())["shapes"]
    with np.load(GOLDEN / "inception_random_weights.npz") as arrays:
        state = random_weights({name: arrays[name] for name in ("seed", "fc_scale")}, shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", digest)
    return state, digest
