"""What to convert, and into what."""

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from models.diffusion import DiffusionConfig
from models.unet import ARCHITECTURES, Architecture, ClassifierConfig, UNetConfig
from orchestrator.config import JobConfig
from orchestrator.weights.flags import Code, parse_flags
from orchestrator.weights.published import entry_by_file_name, released_entry
from orchestrator.weights.shapes import Shapes, num_classes_of


class ModelOptions(UNetConfig, frozen=True, extra="forbid"):
    """The architecture of a .pt file, if its name, --recipe or --flags do not state it.

    The fields are those of a diffusion model, and of a classifier if there is a pool. They are checked only when the
    architecture is made of them.
    """

    image_size: int = Field(0, ge=0)  # pixels, which the weights do not contain; 0 = --model.* options are not used
    num_classes: int | None = Field(None, gt=0)  # None = as in the file
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] | None = (
        None  # pooling of a classifier; None = not a classifier
    )

    def architecture(self, shapes: Shapes) -> Architecture:
        """Return the architecture, with the number of classes in the file if none is given.

        Raises:
            ValueError: there is no such network; the message names the field.
        """
        fields: dict[str, Any] = self.model_dump()
        if self.num_classes is None and (found := num_classes_of(shapes)):
            fields["num_classes"] = found
        if self.pool is not None and fields["num_classes"] is None:
            del fields["num_classes"]
        kind = ARCHITECTURES[UNetConfig.kind if self.pool is None else ClassifierConfig.kind]
        try:
            return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
        except ValidationError as error:
            raise ValueError(f"--model.*: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

    @model_validator(mode="after")
    def _check_shape(self) -> "ModelOptions":
        return self

    @model_validator(mode="after")
    def _check_decoder_heads(self) -> "ModelOptions":
        return self


class ConversionConfig(JobConfig):
    """What to convert, and into what. A .pt file's architecture comes from its released name or one set of options."""

    weights: str = Field(min_length=1)  # a training run's folder, a .safetensors file or a .pt file
    output: str = Field(min_length=1)  # a .safetensors or .pt file; with format=diffusers a folder
    format: Literal["diffusers"] | None = None  # diffusers = a UNet2DModel folder; None = by the ending of output
    recipe: str | None = None  # for a .pt file: released model that has its architecture
    flags: str | None = None  # for a .pt file: flags of its training, such as "--num_channels 128 ..."
    flags_from: Code | None = None  # code whose defaults complete the flags; None = detected from the flags
    model: ModelOptions = ModelOptions()
    diffusion: DiffusionConfig = DiffusionConfig()  # The diffusion process of the network; only with --model.* options.

    @property
    def uses_model(self) -> bool:
        """Whether --model.* options state the architecture."""
        return self.model != ModelOptions()

    @property
    def described_by(self) -> str:
        """Return the option that states a .pt file's architecture."""
        if self.flags is not None:
            return "--flags"
        if self.uses_model:
            return "--model.* and --diffusion.*"
        return f"--recipe {self.recipe}" if self.recipe else "its released name"

    @model_validator(mode="after")
    def _check_names(self) -> "ConversionConfig":
        is_file = self.output.endswith((".safetensors", ".pt"))
        if self.format is None and not is_file:
            raise ValueError(
                f"output={self.output} ends neither in .safetensors nor in .pt; a folder needs format=diffusers"
            )
        if self.format is not None and is_file:
            raise ValueError(f"output={self.output} names a file, and format=diffusers makes a folder")
        return self

    @model_validator(mode="after")
    def _check_architecture(self) -> "ConversionConfig":
        """Refuse options that contradict each other, and a .pt file of which nothing states the architecture."""
        given = {"--recipe": self.recipe is not None, "--flags": self.flags is not None, "--model.*": self.uses_model}
        options = [option for option, is_given in given.items() if is_given]
        if len(options) > 1:
            raise ValueError(f"{' and '.join(options)} both state the architecture of {self.weights}; give one of them")
        if self.flags_from and self.flags is None:
            raise ValueError(f"--flags-from {self.flags_from} is for --flags, which are not given")
        if self.diffusion != DiffusionConfig() and not self.uses_model:
            raise ValueError("--diffusion.* goes with --model.* only; released names, --recipe and --flags include it")
        if not self.weights.endswith(".pt"):
            if options:
                value = f" {self.recipe}" if self.recipe else ""
                raise ValueError(
                    f"{options[0]}{value} is for .pt files; --weights {self.weights} carries its architecture"
                )
        elif self.flags is not None:
            parse_flags(self.flags, self.flags_from)
        elif self.uses_model:
            self._check_model()
        else:
            self._check_released()
        return self

    def _check_released(self) -> None:
        recipe, named = released_entry(self.weights, self.recipe), entry_by_file_name(self.weights)
        if named and (named.network, named.diffusion) != (recipe.network, recipe.diffusion):
            raise ValueError(
                f"--recipe {self.recipe} contradicts the name of --weights {self.weights}, which was released as "
                "another model; rename the file or leave the option out"
            )

    def _check_model(self) -> None:
        if not self.model.image_size:
            raise ValueError("--model.image-size is missing; the weights do not tell it, so --model.* options need it")
        self.model.architecture({})
        channels, learns = self.model.in_channels, self.diffusion.learns_variance
        if self.model.pool is None and self.model.out_channels != channels * (2 if learns else 1):
            raise ValueError(
                f"--model.out-channels {self.model.out_channels} does not fit --diffusion.variance "
                f"{self.diffusion.variance}: {channels} channels go with fixed_small and fixed_large, {2 * channels} "
                "with learned and learned_range"
            )
