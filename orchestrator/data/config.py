"""The config for preparing a dataset."""

from pydantic import Field, field_validator

from orchestrator.config import JobConfig, Operational
from orchestrator.data.images import ExifOrientation, check_background
from orchestrator.data.sources import Choices, Layout


class PrepareConfig(JobConfig):
    """Preparing a dataset."""

    source: str  # URI or path of a folder or an archive, or digits for scikit-learn's 1,797 scanned digits
    output: str  # folder of the dataset
    name: str  # name of the dataset in reports
    layout: Layout = "auto"  # layout of the source; auto: determined from its files
    labels: str | None = None  # label map (CSV or JSON), for images whose names do not contain their class
    image_column: str | None = None  # Parquet column with encoded images; None: determined from the columns
    label_column: str | None = None  # Parquet column, or field of WebDataset's .json, with labels; None: found by name
    split: str | None = None  # splits that names mean, such as extra=train,holdout=out; none: no name means a split
    accept_classes: Operational[bool] = False  # use the source even if its classes or splits look suspicious
    background: str = "drop"  # colour behind transparent images: white, black or R,G,B; drop: ignore transparency (ADM)
    exif_orientation: ExifOrientation = "ignore"  # apply: rotate images as their EXIF data say; ignore: do not (ADM)
    copy_parquet: bool = False  # copy Parquet into shuffled shards; False: register the files in place
    resolution: int | None = Field(None, gt=0)  # store ADM's centre crops of this size as PNGs; None: original images
    seed: int = Field(0, ge=0, lt=2**64)  # seed of the shuffle and of the validation split
    validation_fraction: float = Field(0.0, ge=0, lt=1)  # share of the training images for the validation split
    max_corrupt_fraction: Operational[float] = Field(0.001, ge=0, le=1)  # stop if a larger share cannot be decoded
    num_workers: Operational[int] = Field(0, ge=0)  # workers that read and write; 0 = in this process, without Ray

    _check_background = field_validator("background")(check_background)

    @property
    def choices(self) -> Choices:
        """Return the options about the source."""
        labels = self.path(self.labels) if self.labels else None
        return Choices(self.layout, labels, self.image_column, self.label_column, self.split)

    def check_registering(self) -> None:
        """Raise ValueError if an option needs a copy of the source."""
        for name in ("resolution", "validation_fraction"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} needs a copy of source={self.source}: pass --copy-parquet, or omit {name}"
                )
