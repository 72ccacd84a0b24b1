"""The config of an evaluation of a training run."""

from pydantic import Field, model_validator

from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator.config import Operational
from orchestrator.search.config import TrialsConfig


class RunEvaluationConfig(TrialsConfig):
    """The snapshots of a training run to evaluate, and how to sample them."""

    weights: str  # folder of a training run
    ema: Operational[tuple[str, ...]] = ()  # averages of the run, such as ema-0.9999; none = all
    sigma_rel: Operational[tuple[float, ...]] = ()  # lengths of post-hoc averages to evaluate; the run needs power_emas
    objective: tuple[str, ...] = Field(("fd_digits",), min_length=1)  # metrics, the main one first
    sampler: SamplerConfig = SamplerConfig(name="ddim", num_steps=25)
    guidance: Operational[GuidanceConfig] = GuidanceConfig()
    scales: Operational[tuple[float, ...]] = ()  # guidance scales to evaluate; none = only guidance.scale
    num_samples: Operational[int] = Field(2_000, ge=64)  # samples of each snapshot, all with the same labels and noise
    follow: Operational[bool] = False  # wait for new snapshots while the run is being trained

    @property
    def max_samples(self) -> int:
        return self.num_samples

    @property
    def guidances(self) -> tuple[GuidanceConfig, ...]:
        """Return the guidance at each scale."""
        fields = self.guidance.model_dump()
        return tuple(GuidanceConfig(**fields | {"scale": scale}) for scale in self.scales or (self.guidance.scale,))

    @model_validator(mode="after")
    def _check(self) -> "RunEvaluationConfig":
        if self.weights.endswith((".pt", ".safetensors")):
            raise ValueError(f"weights={self.weights} is a file; pass a training run's folder, which has snapshots")
        needs_classifier = any(guidance.kind == "classifier" and guidance.scale for guidance in self.guidances)
        if needs_classifier and self.classifier is None:
            raise ValueError("guidance.kind=classifier with a scale above 0 needs --classifier")
        return self
