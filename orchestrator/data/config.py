"""The config for preparing a dataset."""

from typing import Literal

from pydantic import Field, field_validator

from orchestrator.config import JobConfig, Operational
from orchestrator.data.images import ExifOrientation, check_background

Layout = Literal[
    "auto", "folder", "flat", "unlabelled", "webdataset", "parquet", "cifar", "downsampled", "lsun", "digits"
]


class PrepareConfig(JobConfig):
    """The source of a dataset, its interpretation, and how the images are stored."""

    source: str  # folder or archive, as path or URI; digits = scikit-learn's 1,797 scanned digits
    output: str  # folder of the dataset
    name: str  # name of the dataset in reports
    layout: Layout = "auto"  # how the source stores its images; auto = detected from its files
    labels: str | None = None  # CSV or JSON file with the label of each image, if names do not contain the class
    image_column: str | None = None  # Parquet column with encoded images; None = detected
    label_column: str | None = None  # Parquet column or field of WebDataset's .json with labels; None = detected
    split: str | None = None  # splits by name, such as extra=train,holdout=out; none = names do not contain splits
    accept_classes: Operational[bool] = False  # read the source even if its classes or splits look suspicious
    background: str = "drop"  # colour behind transparency: white, black, R,G,B; drop = ignore alpha, as published
    exif_orientation: ExifOrientation = "ignore"  # apply = rotate according to EXIF; ignore = do not, as published
    copy_parquet: bool = False  # shuffle Parquet into new shards; False = register it in place
    resolution: int | None = Field(None, gt=0)  # store ADM's centre crops of this size as PNG; None = whole images
    seed: int = Field(0, ge=0, lt=2**64)  # determines the shuffle and the validation split
    validation_fraction: float = Field(0.0, ge=0, lt=1)  # fraction of the training images for a validation split
    max_corrupt_fraction: Operational[float] = Field(0.001, ge=0, le=1)  # stop if a larger fraction cannot be decoded
    num_workers: Operational[int] = Field(0, ge=0)  # workers that read and write; 0 = in this process, without Ray

    _check_background = field_validator("background")(check_background)
