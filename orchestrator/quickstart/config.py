"""The config of the quickstart."""

from typing import Literal

from pydantic import Field

from orchestrator.config import JobConfig


class QuickstartConfig(JobConfig):
    """The storage of the quickstart and the size of its stages."""

    storage: Literal["local", "s3"] = "local"  # local = the folder; s3 = a temporary local S3 server
    folder: str = "runs/quickstart"  # local folder for the report, the MLflow file and, if storage is local, the rest
    num_workers: int = Field(2, ge=1)  # workers for training, sampling and features
    total_images: int = Field(89_600, gt=0)  # images for the training of the diffusion model
    classifier_total_images: int = Field(32_000, gt=0)  # images for the training of the classifier
    num_samples: int = Field(1_000, gt=0)  # images to generate with guidance, and again without
    rungs: tuple[int, ...] = (128, 256, 512)  # n at which trials of the search are compared
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)  # guidance scales to try
    num_steps: tuple[int, ...] = (12, 25)  # numbers of sampling steps to try
