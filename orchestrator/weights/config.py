"""What to convert, and into what."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config import JobConfig
from orchestrator.weights.published import released_entry


class ConversionConfig(JobConfig):
    """What to convert, and into what."""

    weights: str = Field(min_length=1)  # a training run's folder, a .safetensors file or a .pt file
    output: str = Field(min_length=1)  # a .safetensors or .pt file, or with format=diffusers a folder
    format: Literal["diffusers"] | None = None  # diffusers = a UNet2DModel folder; None = the output's ending says
    recipe: str | None = None  # the zoo's name for a .pt source whose file is not called as released

    @model_validator(mode="after")
    def _check_names(self) -> "ConversionConfig":
        is_file = self.output.endswith((".safetensors", ".pt"))
        if self.format is None and not is_file:
            raise ValueError(
                f"output={self.output} ends neither in .safetensors nor in .pt; a folder needs format=diffusers"
            )
        if self.format is not None and is_file:
            raise ValueError(f"output={self.output} names a file, and format=diffusers makes a folder")
        if self.weights.endswith(".pt"):
            released_entry(self.weights, self.recipe)
        elif self.recipe is not None:
            raise ValueError(
                f"recipe={self.recipe!r} is for .pt files; weights={self.weights} carries its architecture"
            )
        return self
