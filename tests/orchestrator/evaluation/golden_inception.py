"""Random Inception weights of the golden data, which replace the published file because tests cannot download it."""

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
    """Write the weights to `path`, and set their digest as the expected one. Return the state dict and the digest."""
    shapes = json.loads((GOLDEN / "inception_state_dict.json").read_text())["shapes"]
    with np.load(GOLDEN / "inception_random_weights.npz") as arrays:
        state = random_weights({name: arrays[name] for name in ("seed", "fc_scale")}, shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    published = extractors.PUBLISHED["inception"]._replace(sha256=digest)
    monkeypatch.setitem(extractors.PUBLISHED, "inception", published)
    return state, digest
