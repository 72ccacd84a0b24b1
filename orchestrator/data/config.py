"""What a dataset is prepared from, and how."""

from pydantic import Field, field_validator

from orchestrator.config import JobConfig, Operational
from orchestrator.data.images import ExifOrientation, check_background
from orchestrator.data.sources import Choices, Layout


class PrepareConfig(JobConfig):
    """Preparing a dataset."""

    source: str  # URI or path of a folder or an archive; or digits, scikit-learn's 1,797 scanned digits
    output: str  # the dataset's folder
    name: str  # what reports call the dataset
    layout: Layout = "auto"  # how the source holds its images; auto: told from its files
    labels: str | None = None  # a label map, CSV or JSON, for images whose names do not say their class
    image_column: str | None = None  # of Parquet: encoded images; None: told from its columns
    label_column: str | None = None  # of Parquet, or a field of WebDataset's .json: labels; None: told from the names
    split: str | None = None  # splits of names that tell none: extra=train,holdout=out; or none: names tell no splits
    accept_classes: Operational[bool] = False  # read the source even if its classes or splits look suspicious
    background: str = "drop"  # behind transparent images: white, black, R,G,B; drop: ignore transparency, as published
    exif_orientation: ExifOrientation = "ignore"  # apply: rotate images as their EXIF block says; ignore: as published
    copy_parquet: bool = False  # shuffle Parquet into shards of the dataset's own; False: register it in place
    resolution: int | None = Field(None, gt=0)  # store ADM's centre crops of this size, as PNGs, not whole images
    seed: int = Field(0, ge=0, lt=2**64)  # of the shuffle and of the split
    validation_fraction: float = Field(0.0, ge=0, lt=1)  # share of the training images kept as the split validation
    max_corrupt_fraction: Operational[float] = Field(0.001, ge=0, le=1)  # stop where a larger share cannot be decoded
    num_workers: Operational[int] = Field(0, ge=0)  # workers that read and write; 0 = in this process, without Ray

    _check_background = field_validator("background")(check_background)

    @property
    def choices(self) -> Choices:
        """Return what the user says of the source."""
        labels = self.path(self.labels) if self.labels else None
        return Choices(self.layout, labels, self.image_column, self.label_column, self.split)

    def check_registering(self) -> None:
        """Raise ValueError if what is asked for needs a copy of the source."""
        for name in ("resolution", "validation_fraction"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} needs a copy of source={self.source}: pass --copy-parquet, or no {name}"
                )
