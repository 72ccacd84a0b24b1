"""Test that a published recipe or a search gives the settings, which options override."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.command_line import parse
from models import zoo
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.job import plan
from orchestrator.generation.presets import generation_presets
from orchestrator.training.presets import trained_networks


def generation_config(*argv: str) -> GenerationConfig:
    return parse("Generate.", generation_presets(), ["digits", *argv])


def test_a_recipe_is_the_published_recommendation_and_options_override_it() -> None:
    config = generation_config("--recipe", "adm-256", "--guidance.scale", "1.5", "--sampler.num-steps", "100")
    assert (config.weights, config.classifier) == ("256x256_diffusion.pt", "256x256_classifier.pt")
    assert (config.sampler.name, config.sampler.num_steps, config.guidance.scale) == ("ddpm", 100, 1.5)
    plain = generation_config("--recipe", "adm-512", "--weights", "mine.pt")
    assert config.output == "adm-256/samples" and plain.output == "adm-512/samples", "each recipe has its own folder"
    assert (plain.weights, plain.sampler.num_steps, plain.guidance.scale) == ("mine.pt", 250, 4.0)


@pytest.mark.parametrize("name", ["adm-64", "adm-128", "adm-256", "adm-256-uncond", "adm-512", "lsun-cat"])
def test_every_published_recommendation_is_a_valid_config(name: str) -> None:
    config, recipe = generation_config("--recipe", name), zoo.entry(name).recipe
    assert recipe is not None
    assert config.sampler == recipe.sampler and config.guidance == recipe.guidance
    assert (config.classifier is None) == (recipe.classifier is None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adm-65", "adm-65"),
        ("classifier-64", "has no published sampler and guidance; accepted: adm-64"),
        ("upsampler-64-256", "is an upsampler"),
    ],
)
def test_models_without_a_recipe_are_refused(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        generation_config("--recipe", name)
    assert end.value.code == 2 and message in capsys.readouterr().err


def write_search(folder: Path, setting: dict[str, Any]) -> str:
    search = {"classifier": "guide", "winner": {"setting": setting}, "trials": []}
    (folder / "search.json").write_text(json.dumps(search))
    return str(folder / "search.json")


def test_from_search_uses_the_winner(tmp_path: Path) -> None:
    sampler, guidance = {"name": "dpm_solver", "num_steps": 12}, {"kind": "classifier", "scale": 2.5}
    plain = {"weights": "run", "sampler": sampler, "guidance": guidance}
    config = generation_config("--from-search", write_search(tmp_path, plain), "--guidance.scale", "3")
    assert (config.sampler.name, config.sampler.num_steps, config.guidance.scale) == ("dpm_solver", 12, 3.0)
    assert (config.weights, config.classifier) == ("run", "guide"), "and not the preset's"
    edm = {"name": "edm", "num_steps": 12, "s_churn": 5.0, "s_min": 0.1, "s_max": 50.0}
    edm_setting = plain | {"sampler": edm, "guidance": guidance | {"interval": [0.1, 0.7]}}
    config = generation_config("--from-search", write_search(tmp_path, edm_setting).removesuffix("/search.json"))
    assert config.sampler.model_dump(include=set(edm)) == edm, "every setting of the sampler, not only those searched"
    assert config.guidance.interval == (0.1, 0.7)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"guidance": {"scale": 1.0}, "weights": "run"}, "sampler"),
        ({"guidance": {}, "sampler": {"name": "ddim", "temperature": 0.9}, "weights": "run"}, "temperature"),
        ({"guidance": {"scale": -1.0}, "sampler": {"name": "ddim"}, "weights": "run"}, "scale"),
    ],
)
def test_a_setting_that_generation_cannot_use_completely_is_an_error(
    tmp_path: Path, setting: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        generation_config("--from-search", write_search(tmp_path, setting))
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_only_a_dry_run_needs_no_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = ["--from-search", "a/search", "--store", str(tmp_path), "--num-gpus", "1"]
    with pytest.raises(SystemExit) as end:
        generation_config(*absent)
    assert end.value.code == 2 and "a/search/search.json" in capsys.readouterr().err
    config, text = plan(generation_config(*absent, "--dry-run", "--guidance.scale", "3"), trained_networks())
    assert (config.weights, config.guidance.scale) == ("digits/diffusion", 3.0)
    assert "FLOPs" in text and f"not there yet: {tmp_path}/a/search/search.json" in text
