"""What a dataset is prepared from, and how."""

from pydantic import Field

from orchestrator.config import JobConfig
from orchestrator.data.sources import Layout


class PrepareConfig(JobConfig):
    """Preparing a dataset."""

    source: str  # URI or path of a folder, a tar or an archive; or digits, scikit-learn's 1,797 scanned digits
    output: str  # the dataset's folder
    name: str  # what reports call the dataset
    layout: Layout = "auto"  # how the source holds its images; auto: told from its names
    labels: str | None = None  # a label map, CSV or JSON, for images whose names do not say their class
    copy_parquet: bool = False  # shuffle Parquet into shards of the dataset's own; False: register it in place
    resolution: int | None = Field(None, gt=0)  # store ADM's centre crops of this size, as PNGs, not whole images
    seed: int = Field(0, ge=0, lt=2**64)  # of the shuffle and of the split
    validation_fraction: float = Field(0.0, ge=0, lt=1)  # share of the training images kept as the split validation
    max_corrupt_fraction: float = Field(0.001, ge=0, le=1)  # stop where a larger share cannot be decoded
    num_workers: int = Field(0, ge=0)  # workers that read and write; 0 = in this process, without Ray

    @property
    def operational(self) -> frozenset[str]:
        """When to stop, which changes no shard."""
        return frozenset({"max_corrupt_fraction"})

    def registers(self, layout: Layout) -> bool:
        """Whether the source stays where it lies.

        Raises:
            ValueError: it would, but what is asked for needs a copy.
        """
        if layout != "parquet" or self.copy_parquet:
            return False
        for name in ("resolution", "validation_fraction"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} needs a copy of source={self.source}: pass --copy-parquet, or no {name}"
                )
        return True
