"""The config of the quickstart."""

from typing import ClassVar, Literal

from pydantic import Field

from orchestrator.config import JobConfig, Operational


class QuickstartConfig(JobConfig):
    """The storage of the quickstart and the size of its stages."""

    remedy: ClassVar[str] = "use the values of that config, or choose another --folder"

    storage: Literal["local", "s3"] = "local"  # local = a folder; s3 = a local S3 server that is started for the job
    folder: Operational[str] = "runs/quickstart"  # local folder of report and MLflow file; if local, of all output
    num_workers: Operational[int] = Field(2, ge=1)  # training, sampling and feature workers
    total_images: int = Field(89_600, gt=0)  # length of the diffusion model's training in images
    classifier_total_images: int = Field(32_000, gt=0)  # length of the classifier's training in images
    num_samples: int = Field(1_000, gt=0)  # images to generate with guidance, and again without
    rungs: tuple[int, ...] = (128, 256, 512)  # numbers of samples at which the trials of the search are compared
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)  # guidance scales to try
    num_steps: tuple[int, ...] = (12, 25)  # numbers of steps to try
