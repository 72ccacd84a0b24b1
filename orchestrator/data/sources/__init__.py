"""Images as people have them. Every layout yields the entries of its images; one module for each family of layouts."""

from typing import Literal, NamedTuple

from orchestrator.data.sources import arrays, parquet
from orchestrator.data.sources.archives import first_members, open_tree, read_ranges
from orchestrator.data.sources.folders import kaggle_files_above, read_names
from orchestrator.data.sources.index import (
    ACCEPTED,
    Findings,
    Listing,
    Reading,
    Source,
    Splits,
    finding,
    list_source,
    make_source,
)
from orchestrator.data.sources.labels import read_label_map
from orchestrator.data.sources.webdataset import is_webdataset, read_webdataset

__all__ = [
    "Choices",
    "Findings",
    "Layout",
    "Listing",
    "Source",
    "detect",
    "finding",
    "first_files",
    "list_source",
    "make_source",
    "open_parquet",
    "read_ranges",
    "read_source",
]

Layout = Literal[
    "auto", "folder", "flat", "unlabelled", "webdataset", "parquet", "cifar", "downsampled", "lsun", "digits"
]

# Objects that tell a layout by their names; what is not here is told by folders and file names.
_BY_OBJECT: tuple[tuple[Layout, str], ...] = (
    ("cifar", arrays.CIFAR),
    ("parquet", parquet.PARQUET),
    ("downsampled", arrays.NPZ),
    ("lsun", arrays.LMDB),
)

_PICKLE = "and a pickle is never opened: "
# Objects that cannot be read, and what to take instead.
_REFUSED = (
    (
        r"(^|/)cifar-10(0)?-python\.tar\.gz$|(^|/)cifar-100?-(batches-py|python)/",
        f"is CIFAR's python version, {_PICKLE}take cifar-10-binary.tar.gz (or 100) from where it came",
    ),
    (
        r"(^|/)(train_data_batch_\d+|val_data)$|(^|/)Imagenet\d+_(train|val)\.zip$",
        f"is downsampled ImageNet's pickled version, {_PICKLE}take Imagenet64_train_part1.npz and the like",
    ),
    (
        r"(^|/)(data_batch_\d|test_batch|batches\.meta)$",
        f"is a part of CIFAR's python version, {_PICKLE}take cifar-10-binary.tar.gz from where it came",
    ),
    (r"(?i)\.(pkl|pickle)$", f"is a pickle, {_PICKLE}write its images as files"),
    (r"(?i)\.(tar\.(gz|bz2|xz|zst)|tgz|7z|rar)$", "is compressed, so its images have no place in it: unpack it"),
    (r"(?i)\.(npy|h5|hdf5|mat|tfrecords?|tfrecord-\S+|rec|beton|mds|arrow)$", "is a format that is not read"),
)


class Choices(NamedTuple):
    """What a user says of a source; None or auto: it is told from the source."""

    layout: Layout = "auto"
    labels: str | None = None  # URI of a label map
    image_column: str | None = None
    label_column: str | None = None
    split: str | None = None


def detect(listing: Listing, choices: Choices) -> Layout:
    """Return the layout that the user names, or the one that objects tell by their names; auto leaves it open.

    Raises:
        ValueError: there is nothing that can be read; the message names what is there and what is accepted.
    """
    told: Layout = "digits" if listing.uri == "digits" else "auto"
    told = next((layout for layout, pattern in _BY_OBJECT if listing.has(pattern)), told)
    layout = told if choices.layout == "auto" else choices.layout
    if choices.labels and layout in ("parquet", "cifar", "downsampled", "lsun", "digits", "webdataset"):
        raise ValueError(f"--labels {choices.labels}: the layout {layout} has labels of its own")
    if layout != "auto":
        return layout
    if not listing.has(_IMAGES):
        for pattern, what in _REFUSED:
            if found := listing.matching(pattern):
                raise ValueError(f"--source {listing.named}: {found[0]} {what}; accepted: {ACCEPTED}")
    return "auto"


_IMAGES = r"(?i)\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|jp2|tar|zip)$"


def open_parquet(listing: Listing, choices: Choices) -> parquet.ParquetSource:
    """Read the footers of a source's Parquet files. Raises what `parquet.open_parquet` does."""
    if not listing.has(parquet.PARQUET):
        raise ValueError(f"--source {listing.named} holds no Parquet files")
    return parquet.open_parquet(listing, choices.image_column, choices.label_column, Splits(choices.split))


def read_source(listing: Listing, choices: Choices, num_workers: int) -> Source:
    """Return the index of a source; its archives are scanned by `num_workers` workers (0: in this process).

    Raises:
        ValueError: the source does not have this layout, cannot be understood, or is damaged.
    """
    return make_source(_read(listing, choices, num_workers), listing)


def _read(listing: Listing, choices: Choices, num_workers: int) -> Reading:
    layout, splits = detect(listing, choices), Splits(choices.split)
    match layout:
        case "digits":
            return arrays.read_digits()
        case "cifar":
            return arrays.read_cifar(listing, splits)
        case "downsampled":
            return arrays.read_npz(listing, splits)
        case "lsun":
            return arrays.read_lmdb(listing, splits)
        case "parquet":
            return open_parquet(listing, choices).reading()
    tree = open_tree(listing, choices.label_column, num_workers)
    if layout == "webdataset" or (layout == "auto" and not choices.labels and is_webdataset(tree)):
        return read_webdataset(tree, splits)
    labels = read_label_map(choices.labels) if choices.labels else None
    return read_names(tree, layout, labels, splits, kaggle_files_above(listing.uri))


def first_files(listing: Listing) -> tuple[str, list[str]]:
    """Return the first archive of a source that is too large to scan, and the names of its first files."""
    tree = first_members(listing)
    return tree.pieces[0].object or "", [file.name for file in tree.files()]
