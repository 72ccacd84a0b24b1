"""What is measured, against what, by which features."""

from pydantic import Field

from orchestrator.config import JobConfig, Operational
from orchestrator.cost import CostConfig


class EvaluationConfig(JobConfig):
    """What is measured, against what, by which features."""

    samples: str  # a samples folder, an .npz in the published format, a .tar or a folder of images
    reference: str  # a prepared dataset (its training split), or a published reference batch (.npz)
    floor: str | None = None  # held-out real images, measured likewise; None: the dataset's validation split, if any
    output: str  # the evaluation's folder
    extractor: str = "digits"  # inception, dinov2, clip, efficientnet, digits, or your own as package.module.name
    extractor_weights: str | None = (
        None  # of inception, dinov2, clip; None: the released name in the store's extractors/
    )
    image_size: int | None = Field(None, gt=0)  # pixels of the reference's images, and of image files; None: samples'
    num_memorization_samples: int = Field(1_000, ge=0)  # compared with every training image pixel by pixel
    num_workers: Operational[int] = Field(1, ge=0)  # feature workers; 0 = in this process, without Ray
    num_gpus: Operational[float] = Field(0.0, ge=0)  # GPUs for each feature worker
    cost: Operational[CostConfig] = CostConfig()
