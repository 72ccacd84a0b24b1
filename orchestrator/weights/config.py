"""The config of a conversion of weights."""

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from models.diffusion import DiffusionConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig
from orchestrator.config import JobConfig
from orchestrator.weights.flags import Code, parse_flags
from orchestrator.weights.published import released_entry
from orchestrator.weights.shapes import Shapes, num_classes_of


class ModelOptions(UNetConfig, frozen=True, extra="forbid"):
    """The architecture of a .pt file, if neither its name nor --recipe nor --flags defines it.

    The fields are those of a diffusion model, or of a classifier if `pool` is set. They are checked when `architecture`
    is called.
    """

    image_size: int = Field(0, ge=0)  # pixels, which the weights do not contain; 0 = --model.* options are not used
    num_classes: int | None = Field(None, gt=0)  # None = as in the file
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] | None = (
        None  # pooling of a classifier; None = not a classifier
    )

    def architecture(self, shapes: Shapes) -> Architecture:
        """Return the architecture, with the number of classes of the file if `num_classes` is None.

        Raises:
            ValueError: the fields define no valid network; the message names the field.
        """
        fields = self.model_dump(exclude_none=True)
        if num_classes := num_classes_of(shapes):
            fields.setdefault("num_classes", num_classes)
        kind: type[Architecture] = UNetConfig if self.pool is None else ClassifierConfig
        try:
            return kind.model_validate({name: value for name, value in fields.items() if name in kind.model_fields})
        except ValidationError as error:
            raise ValueError(f"--model.*: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

    # This replaces the validator of the base class, because image_size is 0 if the options are not used.
    @model_validator(mode="after")
    def _check_shape(self) -> "ModelOptions":
        return self


class ConversionConfig(JobConfig):
    """The weights to convert, and the output. A .pt file's architecture comes from its name or one set of options."""

    weights: str = Field(min_length=1)  # a training run's folder, a .safetensors file or a .pt file
    output: str = Field(min_length=1)  # a .safetensors or .pt file; with format=diffusers a folder
    format: Literal["diffusers"] | None = None  # diffusers = a UNet2DModel folder; None = by the extension of output
    recipe: str | None = None  # for a .pt file: released model with the same architecture
    flags: str | None = None  # for a .pt file: flags of its training, such as "--num_channels 128 ..."
    flags_from: Code | None = None  # code whose defaults apply to omitted flags; None = detected from the flags
    model: ModelOptions = ModelOptions()
    diffusion: DiffusionConfig = DiffusionConfig()  # The diffusion process of the network; only with --model.* options.

    @property
    def uses_model(self) -> bool:
        """Whether --model.* options define the architecture."""
        return self.model != ModelOptions()

    @property
    def described_by(self) -> str:
        """Return the option that defines the architecture of a .pt file, or "its released name"."""
        if self.flags is not None:
            return "--flags"
        if self.uses_model:
            return "--model.* and --diffusion.*"
        return f"--recipe {self.recipe}" if self.recipe else "its released name"

    @model_validator(mode="after")
    def _check_output(self) -> "ConversionConfig":
        is_file = self.output.endswith((".safetensors", ".pt"))
        if self.format is None and not is_file:
            raise ValueError(
                f"--output {self.output} must end in .safetensors or .pt; for a folder add --format diffusers"
            )
        if self.format is not None and is_file:
            raise ValueError(f"--output {self.output} is a file, but --format diffusers writes a folder; pass a folder")
        return self

    @model_validator(mode="after")
    def _check_architecture(self) -> "ConversionConfig":
        """Refuse options that contradict each other, and a .pt file whose architecture is not defined."""
        options = [] if self.recipe is None else [f"--recipe {self.recipe}"]
        options += [] if self.flags is None else ["--flags"]
        options += ["--model.*"] if self.uses_model else []
        if len(options) > 1:
            raise ValueError(
                f"{' and '.join(options)} both define the architecture of {self.weights}; pass one of them"
            )
        if self.flags_from and self.flags is None:
            raise ValueError(f"--flags-from {self.flags_from} needs --flags; pass --flags, or omit --flags-from")
        if self.diffusion != DiffusionConfig() and not self.uses_model:
            raise ValueError(
                "--diffusion.* needs --model.*; released names, --recipe and --flags define the diffusion process as "
                "well, so omit --diffusion.*"
            )
        if options and not self.weights.endswith(".pt"):
            raise ValueError(
                f"{options[0]} is for .pt files; --weights {self.weights} contains its architecture, so omit the option"
            )
        if self.flags is not None:
            parse_flags(self.flags, self.flags_from)
        elif self.uses_model:
            self._check_model()
        elif self.weights.endswith(".pt"):
            released_entry(self.weights, self.recipe)
        return self

    def _check_model(self) -> None:
        """Check that the --model.* options define a network, as far as that is possible without its weights."""
        if not self.model.image_size:
            raise ValueError(
                "--model.image-size is missing; the weights do not determine it, so pass it with the other --model.* "
                "options"
            )
        self.model.architecture({})
        channels = self.model.in_channels
        expected = 2 * channels if self.diffusion.learns_variance else channels
        if self.model.pool is None and self.model.out_channels != expected:
            raise ValueError(
                f"--model.out-channels {self.model.out_channels} does not fit --diffusion.variance "
                f"{self.diffusion.variance}; fixed_small and fixed_large need {channels} channels, learned and "
                f"learned_range {2 * channels}"
            )
