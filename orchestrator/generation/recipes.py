"""Settings of a generation that are not options: those of a publication, of a search, or of the samples folder."""

from typing import Any

from pydantic import BaseModel

from models import zoo
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator import storage


def recommended(name: str) -> dict[str, Any]:
    """Return fields of a generation's config as published for the model `name` of the zoo.

    Raises:
        ValueError: the zoo has no such model, or no published settings for it.
    """
    entry = zoo.entry(name)
    if not entry.recipe or entry.checkpoint is None or entry.network.kind == "classifier":
        known = [other for other, found in zoo.ZOO.items() if found.recipe and found.checkpoint]
        raise ValueError(f"recipe={name} has no published sampler and guidance; accepted: {', '.join(known)}")
    if entry.network.low_res_size:
        raise ValueError(f"recipe={name} is an upsampler; name the model whose samples it enlarges")
    recipe = entry.recipe
    return {
        "output": f"{name}/samples",
        "weights": entry.checkpoint,
        "classifier": zoo.entry(recipe.classifier).checkpoint if recipe.classifier else None,
        "sampler": recipe.sampler,
        "guidance": recipe.guidance,
    }


def recorded(run: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a generation's config that are in a folder's run.json."""
    config, record = run["config"], run["record"]
    names = {"weights", "classifier", "upsampler", "recipe", "labels"} & record.keys()
    hashes = {"weights", "classifier", "upsampler", "weak_weights", "labels", "numerics_version", "num_samples"}
    fields = {name: value for name, value in config.items() if name not in hashes}
    fields["guidance"] = fields["guidance"] | {"weak_weights": record.get("weak_weights")}
    return fields | {name: record[name] for name in names}


class _Setting(BaseModel, extra="forbid"):
    """A setting of a search. Other keys are refused, because a generation without them would give other samples."""

    weights: str  # path of the diffusion model
    sampler: SamplerConfig
    guidance: GuidanceConfig


class _Winner(BaseModel):
    setting: _Setting


class _SearchResult(BaseModel):
    classifier: str | None
    winner: _Winner


def winner(uri: str) -> dict[str, Any]:
    """Return the best settings of a search: sampler, guidance, weights and classifier.

    uri: its search.json, or the folder with it.

    Raises:
        FileNotFoundError: there is no search.json.
        ValueError: the file is not the result of a search, or has a setting that a generation does not have.
    """
    uri = uri if uri.endswith(".json") else storage.join(uri, "search.json")
    try:
        result = _SearchResult.model_validate(storage.read_json(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not the result of a search: {error}") from error
    return {"classifier": result.classifier, **dict(result.winner.setting)}
