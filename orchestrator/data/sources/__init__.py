"""Readers of the layouts of images. Each module reads a family of layouts, and yields one entry for each image."""

from orchestrator import storage
from orchestrator.data.config import Layout, PrepareConfig
from orchestrator.data.sources import arrays, parquet
from orchestrator.data.sources.archives import open_tree
from orchestrator.data.sources.folders import TreeReader
from orchestrator.data.sources.index import ACCEPTED, Listing, Reading, Source, Splits, make_source
from orchestrator.data.sources.labels import parse_label_map
from orchestrator.data.sources.webdataset import is_webdataset, read_webdataset

# Layouts that the name of one object reveals. The others follow from folders and file names.
_BY_OBJECT: tuple[tuple[Layout, str], ...] = (
    ("cifar", arrays.CIFAR),
    ("parquet", parquet.PARQUET),
    ("downsampled", arrays.NPZ),
    ("lsun", arrays.LMDB),
)

_IMAGES = r"(?i)\.(jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|avif|jp2|tar|zip)$"  # single images, or archives of them
_NO_COLUMN = "only Parquet and WebDataset are read with it; omit it, and call the column of a label map `label`"
_PICKLE = "and a pickle is never opened: "
# Objects that are not read: a pattern of their names, then why, and what to use instead.
_REFUSED = (
    (
        r"(^|/)cifar-10(0)?-python\.tar\.gz$|(^|/)cifar-100?-(batches-py|python)/",
        f"is CIFAR's Python version, {_PICKLE}download cifar-10-binary.tar.gz (or cifar-100) from the same page",
    ),
    (
        r"(^|/)(train_data_batch_\d+|val_data)$|(^|/)Imagenet\d+_(train|val)\.zip$",
        f"is downsampled ImageNet as pickles, {_PICKLE}use its .npz files, such as Imagenet64_train_part1.npz",
    ),
    (
        r"(^|/)(data_batch_\d|test_batch|batches\.meta)$",
        f"is a part of CIFAR's Python version, {_PICKLE}download cifar-10-binary.tar.gz from the same page",
    ),
    (r"(?i)\.(pkl|pickle)$", f"is a pickle, {_PICKLE}save its images as files"),
    (r"(?i)\.(tar\.(gz|bz2|xz|zst)|tgz|7z|rar)$", "is compressed, so single images cannot be read from it: unpack it"),
    (r"(?i)\.(npy|h5|hdf5|mat|tfrecords?|tfrecord-\S+|rec|beton|mds|arrow)$", "is a format that is not read"),
)


def detect(listing: Listing, config: PrepareConfig) -> Layout:
    """Return the user's layout, or the one that the names of objects reveal, or auto if they reveal none.

    Raises:
        ValueError: nothing can be read, or the layout does not use --labels or --label-column.
    """
    layout: Layout = config.layout
    if layout == "auto" and listing.uri == "digits":
        layout = "digits"
    elif layout == "auto":
        layout = next((by_object for by_object, pattern in _BY_OBJECT if listing.has(pattern)), "auto")
    if config.labels and layout in ("parquet", "cifar", "downsampled", "lsun", "digits", "webdataset"):
        raise ValueError(f"--labels {config.labels}: the layout {layout} has its own labels; omit --labels")
    if config.label_column and layout not in ("auto", "parquet", "webdataset"):
        raise ValueError(f"--label-column {config.label_column}: {_NO_COLUMN}")
    if layout != "auto":
        return layout
    if not listing.has(_IMAGES):
        for pattern, reason in _REFUSED:
            if matches := listing.matching(pattern):
                raise ValueError(f"--source {listing.source}: {matches[0]} {reason}; accepted: {ACCEPTED}")
    return "auto"


def read_source(listing: Listing, config: PrepareConfig) -> Source:
    """Return a source with the index of its images.

    Raises:
        ValueError: the source does not have the layout of the config, cannot be interpreted, or is damaged.
    """
    return make_source(_read(listing, config), listing)


def _read(listing: Listing, config: PrepareConfig) -> Reading:
    layout, splits = detect(listing, config), Splits(config.split)
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
            return parquet.open_parquet(listing, config).reading()
    tree = open_tree(listing, config.label_column, config.num_workers)
    if layout == "webdataset" or (layout == "auto" and not config.labels and is_webdataset(tree)):
        return read_webdataset(tree, splits)
    if config.label_column:
        raise ValueError(f"--label-column {config.label_column}: {_NO_COLUMN}")
    labels = None
    if config.labels:
        uri = config.path(config.labels)
        labels = parse_label_map(uri, storage.read_bytes(uri))
    return TreeReader(tree, layout, splits).read(labels)
