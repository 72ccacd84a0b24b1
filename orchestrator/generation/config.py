"""The config of a generation, and where its settings may come from: a publication, a search or the samples' folder."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from models import zoo
from models.guidance import GuidanceConfig
from models.images import Rounding
from models.samplers import SamplerConfig
from orchestrator import storage
from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig


class GenerationConfig(JobConfig):
    """What determines the samples, and where they are written."""

    weights: str  # diffusion model: a training run's folder, a .safetensors file or a released .pt file
    ema: str | None = None  # average of the run to use, such as ema-0.9999; None = the one in the newest file
    at: str | None = None  # snapshot of the run: a number of images, or best as evaluate_run found; None = newest
    classifier: str | None = None  # classifier for guidance: a run's folder, a file, or package.module:function
    upsampler: str | None = None  # second stage that enlarges the samples (ADM-U): a run's folder or a file
    recipe: str | None = None  # released model whose published weights, sampler and guidance are the defaults
    from_search: str | None = None  # folder of a search whose best weights, sampler and guidance are the defaults
    output: str  # folder of the samples; enlarged ones are in upsampled/
    num_samples: int = Field(50_000, gt=0)  # images to generate
    seed: int = Field(0, ge=0, lt=2**64)  # determines the label, x_T and the step noise of each index
    labels: str = "balanced"  # balanced, uniform, a list such as 3,7, or a .json file with a list or weights
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    upsampling: SamplerConfig = SamplerConfig()  # The sampler of the second stage, which is not guided, as published.
    clip: bool = True  # clamp the predicted x_0 to [-1, 1], as published
    rounding: Rounding = "truncate"  # of pixels to 8 bits; the published code truncates
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # precision of convolutions and attention, by autocast
    tf32: bool = False  # allow TF32 in float32 convolutions and matrix products; the published code does not
    compile: bool = False  # torch.compile the networks: a slower start, but faster on long runs
    batch_size: int = Field(0, ge=0)  # batch size B: sample i is in batch floor(i/B); 0 = by memory
    shard_size: int = Field(512, gt=0)  # images in a shard, a multiple of B
    indices: Operational[tuple[int, ...]] = ()  # regenerate only these, into regenerated/, and compare their pixels
    export: Operational[Literal["npz", "png"] | None] = None  # also write samples.npz as published, or a folder png/
    num_workers: Operational[int] = Field(1, ge=0)  # sampling workers; 0 = in this process, without Ray
    num_gpus: Operational[float] = Field(0.0, ge=0)  # GPUs for each worker
    num_threads: Operational[int] = Field(1, gt=0)  # CPU threads of each worker
    cost: Operational[CostConfig] = CostConfig()
    mixed_platforms: Operational[bool] = False  # accept workers on other devices or software; pixels may then differ

    @property
    def operational(self) -> frozenset[str]:
        """Return the fields that may differ from run.json. Networks are compared by the hashes of their weights."""
        return super().operational | {"weights", "ema", "at", "classifier", "upsampler", "recipe", "from_search"}

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.guidance.scale and self.guidance.kind == "classifier" and self.classifier is None:
            raise ValueError(
                f"--guidance.scale {self.guidance.scale} needs a classifier: pass --classifier, --guidance.scale 0 or "
                "another --guidance.kind"
            )
        if self.batch_size and self.shard_size % self.batch_size:
            raise ValueError(f"--shard-size {self.shard_size} is not a multiple of --batch-size {self.batch_size}")
        if (self.ema or self.at) and self.weights.endswith((".pt", ".safetensors")):
            option = f"--ema {self.ema}" if self.ema else f"--at {self.at}"
            raise ValueError(
                f"{option} selects weights of a training run, but --weights {self.weights} is a file; pass the run's "
                f"folder, or omit {option.split()[0]}"
            )
        if negative := [index for index in self.indices if index < 0]:
            raise ValueError(f"--indices {','.join(map(str, negative))} must not be negative")
        return self

    @property
    def search_result(self) -> str | None:
        """Return the URI of the search.json that `from_search` refers to, or None."""
        if self.from_search is None:
            return None
        uri = self.path(self.from_search)
        return uri if uri.endswith(".json") else storage.join(uri, "search.json")

    def starting_from(self, preset: Self) -> Self:
        """Return `preset` with the settings of --recipe, --from-search or, with --indices, the folder's run.json.

        A dry run keeps the settings of the preset if the search has no result yet.
        """
        run = storage.join(self.path(self.output), "run.json")
        if self.indices and storage.exists(run):
            settings = preset.model_dump(exclude_unset=True) | recorded_fields(storage.read_json(run))
            return type(self).model_validate(settings)
        if self.recipe is not None:
            preset = preset.model_copy(update=recommended(self.recipe))
        result = self.search_result
        if result is not None and (not self.dry_run or storage.exists(result)):
            preset = preset.model_copy(update=best_settings(result))
        return preset


def recommended(name: str) -> dict[str, Any]:
    """Return the fields of a generation's config that are published for the model `name` of the zoo.

    Raises:
        ValueError: the zoo has no such model, or no published settings for it.
    """
    entry = zoo.entry(name)
    if not entry.recipe or entry.checkpoint is None or entry.network.kind == "classifier":
        accepted = [other for other, model in zoo.ZOO.items() if model.recipe and model.checkpoint]
        raise ValueError(f"--recipe {name} has no published sampler and guidance; accepted: {', '.join(accepted)}")
    if entry.network.low_res_size:
        raise ValueError(f"--recipe {name} is an upsampler; pass the model whose samples it enlarges")
    recipe = entry.recipe
    return {
        "output": f"{name}/samples",
        "weights": entry.checkpoint,
        "classifier": zoo.entry(recipe.classifier).checkpoint if recipe.classifier else None,
        "sampler": recipe.sampler,
        "guidance": recipe.guidance,
    }


def recorded_fields(run: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a generation's config that are in a folder's run.json.

    Its "config" has hashes where the config has paths. The paths are in its "record".
    """
    config, record = run["config"], run["record"]
    paths = {"weights", "classifier", "upsampler", "recipe", "labels"} & record.keys()
    omitted = {"weights", "classifier", "upsampler", "weak_weights", "labels", "numerics_version", "num_samples"}
    fields = {name: value for name, value in config.items() if name not in omitted}
    fields["guidance"] = fields["guidance"] | {"weak_weights": record.get("weak_weights")}
    return fields | {name: record[name] for name in paths}


class _Setting(BaseModel, extra="forbid"):
    """A setting of a search. Unknown keys are refused, because a generation without them would give other samples."""

    weights: str  # path of the diffusion model
    sampler: SamplerConfig
    guidance: GuidanceConfig


def best_settings(uri: str) -> dict[str, Any]:
    """Return the best settings in a search.json: sampler, guidance, weights and classifier.

    Raises:
        FileNotFoundError: there is no search.json.
        ValueError: the file is not the result of a search, or has a setting that a generation does not have.
    """
    result = storage.read_json(uri)
    try:
        return {"classifier": result["classifier"], **dict(_Setting.model_validate(result["winner"]["setting"]))}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{uri} is not the result of a search that a generation can use: {error}") from error
