"""Where the quickstart happens, and how long it takes."""

from typing import Literal

from pydantic import Field

from orchestrator.config import JobConfig


class QuickstartConfig(JobConfig):
    """Where it happens, and how long it takes."""

    storage: Literal["local", "s3"] = "local"  # a folder, or s3:// on a local server that is started for this
    folder: str = "runs/quickstart"  # local folder of the page, the tracking file and (storage=local) everything else
    num_workers: int = Field(2, ge=1)  # training, sampling and feature workers
    total_images: int = Field(89_600, gt=0)  # length of the diffusion model's training
    classifier_total_images: int = Field(32_000, gt=0)  # length of the classifier's training
    num_samples: int = Field(1_000, gt=0)  # images to generate, guided and again unguided
    rungs: tuple[int, ...] = (128, 256, 512)  # images at which the trials of the search are compared
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)  # guidance scales to try
    num_steps: tuple[int, ...] = (12, 25)  # chain lengths to try
