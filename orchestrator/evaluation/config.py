"""The config of an evaluation."""

from pydantic import Field

from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig


class EvaluationConfig(JobConfig):
    """Samples, reference and feature network of an evaluation."""

    samples: str  # samples folder, .npz in the published format, .tar or folder of images
    reference: str  # prepared dataset (its training split) or published reference batch (.npz)
    floor: str | None = None  # held-out real images to measure too; None = the dataset's validation split, if any
    output: str  # folder of the evaluation
    extractor: str = "digits"  # inception, dinov2, clip, efficientnet, digits, or your own as package.module.name
    extractor_weights: str | None = None  # weights file of inception, dinov2 or clip; None = the file in extractors/
    image_size: int | None = Field(None, gt=0)  # size of the reference's images in pixels; None = size of the samples
    num_memorization_samples: int = Field(1_000, ge=0)  # samples that are compared with every training image
    num_workers: Operational[int] = Field(1, ge=0)  # feature workers; 0 = in this process, without Ray
    num_gpus: Operational[float] = Field(0.0, ge=0)  # GPUs for each worker
    cost: Operational[CostConfig] = CostConfig()
