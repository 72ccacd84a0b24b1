"""Where a generation's settings come from, if not from its own options: a published recommendation, or a search."""

from typing import Any

from pydantic import BaseModel

from models import zoo
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator import storage


def recommended(name: str) -> dict[str, Any]:
    """Fields of a generation's config as published for the zoo's model `name`: its first recipe.

    Raises:
        ValueError: the zoo has no such model, or knows no recommendation for it.
    """
    entry = zoo.entry(name)
    if not entry.recipes or entry.checkpoint is None or entry.network.kind == "classifier":
        known = [other for other, found in zoo.ZOO.items() if found.recipes and found.checkpoint]
        raise ValueError(f"recipe={name!r}: nothing is published on how to sample it; there is for {', '.join(known)}")
    if entry.network.low_res_size:
        raise ValueError(f"recipe={name!r} is an upsampler: name the model whose samples it enlarges")
    recipe = entry.recipes[0]
    return {
        "output": f"{name}/samples",
        "weights": entry.checkpoint,
        "classifier": zoo.entry(recipe.classifier).checkpoint if recipe.classifier else None,
        "sampler": recipe.sampler,
        "guidance": recipe.guidance,
    }


class _Setting(BaseModel, extra="forbid"):
    """What a search can choose. A key that is not here is refused: half a setting would give other samples."""

    weights: str  # the diffusion model, as a path or under the store
    sampler: SamplerConfig
    guidance: GuidanceConfig


class _Winner(BaseModel):
    setting: _Setting


class _SearchResult(BaseModel):
    classifier: str | None  # likewise
    winner: _Winner


def winner(uri: str) -> dict[str, Any]:
    """Fields of a generation's config as a search found them best: sampler, guidance, weights and classifier.

    `uri` is its search.json, or the folder that holds it.

    Raises:
        FileNotFoundError: no search.json there.
        ValueError: it is none, or has a setting that a generation does not know.
    """
    uri = uri if uri.endswith(".json") else storage.join(uri, "search.json")
    try:
        result = _SearchResult.model_validate(storage.read_json(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is not the result of a search: {error}") from error
    return {"classifier": result.classifier, **dict(result.winner.setting)}
