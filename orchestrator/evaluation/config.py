"""The config of an evaluation."""

from pydantic import Field

from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig


class EvaluationConfig(JobConfig):
    """Samples, reference and feature network of an evaluation."""

    samples: str  # a samples folder, an .npz in the published format, a .tar or a folder of images
    reference: str  # a prepared dataset (its training split), or a published reference batch (.npz)
    floor: str | None = None  # held-out real images to evaluate too; None = the dataset's validation split, if any
    output: str  # folder of the evaluation
    extractor: str = "digits"  # inception, dinov2, clip, efficientnet, digits, or your own as package.module.name
    extractor_weights: str | None = (
        None  # weights of inception, dinov2 or clip; None = the published file name in extractors/ of the store
    )
    image_size: int | None = Field(None, gt=0)  # size of reference images and image files; None = that of the samples
    num_memorization_samples: int = Field(1_000, ge=0)  # samples whose pixels are compared with all training images
    num_workers: Operational[int] = Field(1, ge=0)  # workers; 0 = in this process, without Ray
    num_gpus: Operational[float] = Field(0.0, ge=0)  # GPUs for each worker
    cost: Operational[CostConfig] = CostConfig()
