"""Presets of ablations: the tables of the papers at their published sizes and at small sizes."""

import yaml

from orchestrator.ablations.config import TABLES, AblationsConfig


def ablation_presets() -> dict[str, tuple[str, AblationsConfig]]:
    """Return one preset for each of Admiral's tables, with its description."""
    presets = {}
    for path in sorted(TABLES.glob("*.yaml")):
        hardware = {"num_workers": 1} if path.stem.endswith("_small") else {"num_workers": 8, "num_gpus": 1}
        config = AblationsConfig.model_validate({"table": path.stem, "output": f"ablations/{path.stem}", **hardware})
        presets[path.stem] = (yaml.safe_load(path.read_bytes())["about"], config)
    return presets
