"""Images as people have them: what a dataset is prepared from, one module for each family of layouts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import pyarrow.compute as pc

from orchestrator import storage
from orchestrator.data.sources import arrays, folders, tars
from orchestrator.data.sources.index import Finding, Findings, Listing, Source, finding, list_source
from orchestrator.data.sources.labels import LabelMap, read_label_map
from orchestrator.data.sources.registration import PARQUET_NAME

__all__ = [
    "UNLABELLED",
    "Finding",
    "Findings",
    "LabelMap",
    "Layout",
    "Listing",
    "Source",
    "detect",
    "finding",
    "list_source",
    "open_reader",
    "open_source",
    "read_label_map",
]

Layout = Literal["auto", "folder", "flat", "unlabelled", "tars", "webdataset", "parquet", "cifar10", "digits"]

UNLABELLED: tuple[Layout, ...] = ("folder", "flat", "unlabelled", "tars")  # a label map may say more than names do

_WANTED = (
    "a tree <class>/<image> (folder), files <class>_<anything> (flat), a tar for each class or the ILSVRC2012 tar of "
    "tars (tars), tars with .cls or .json beside each image (webdataset), Parquet with image.bytes and label "
    "(parquet), or cifar-10-binary.tar.gz (cifar10); or pass a label map (labels=FILE), or layout=unlabelled"
)

# What does not lie as byte ranges of objects has a reader of its own.
_READERS: dict[str, Callable[[str], Callable[[Sequence[storage.Range]], list[bytes]]]] = {
    "digits": arrays.digits_reader,
    "cifar10": arrays.cifar10_reader,
}


def detect(listing: Listing, labelled: bool = False) -> Layout:
    """The layout of a source, told from its names and from the first members of its first tar.

    Raises:
        ValueError: nothing fits; the message says what would.
    """
    if len(listing.matching(arrays.CIFAR10_NAME).names):
        return "cifar10"
    if len(listing.matching(arrays.CIFAR10_PICKLES).names):
        raise ValueError(
            f"source={listing.uri} is CIFAR-10's python version, which holds pickles, and nothing from outside is "
            "unpickled: take cifar-10-binary.tar.gz from where it came"
        )
    if len(listing.matching(PARQUET_NAME).names):
        return "parquet"
    if members := tars.first_members(listing):
        if not labelled and any(name.endswith((".cls", ".json")) for name in members):
            return "webdataset"
        return "tars"
    if len(found := listing.matching(tars.COMPRESSED_NAME).names):
        raise ValueError(
            f"source={listing.uri}: {found[0]} is compressed, so its images have no place in it: unpack it"
        )
    images = listing.matching(folders.IMAGE_NAME).names
    if len(images):
        return "folder" if pc.any(pc.match_substring(images, "/")).as_py() else "flat"
    raise ValueError(f"source={listing.uri} holds no images in a layout that is known: wanted {_WANTED}")


def open_source(layout: Layout, listing: Listing, labels: LabelMap | None, num_workers: int) -> Source:
    """The index of a source; tars are scanned by `num_workers` workers (0: in this process).

    `labels` takes the place of the labels that names would give, of one of the layouts UNLABELLED.

    Raises:
        ValueError: the source does not have this layout, or is damaged.
    """
    in_tars = bool(len(listing.matching(tars.TAR_NAME).names))
    if labels and in_tars:
        return tars.labelled_tars_source(listing, labels, num_workers)
    if labels:
        return folders.labelled_source(listing, labels)
    if layout == "digits":
        return arrays.digits_source()
    if layout == "cifar10":
        return arrays.cifar10_source(listing)
    if layout == "unlabelled" and in_tars:
        return tars.unlabelled_tars_source(listing, num_workers)
    if layout == "tars":
        return tars.tars_source(listing, num_workers)
    if layout == "webdataset":
        return tars.webdataset_source(listing, num_workers)
    by_names = {"folder": folders.folder_source, "flat": folders.flat_source, "unlabelled": folders.unlabelled_source}
    return by_names[layout](listing)


def open_reader(layout: str, uri: str) -> Callable[[Sequence[storage.Range]], list[bytes]]:
    """What reads the images that a source's index places."""
    return _READERS[layout](uri) if layout in _READERS else partial(storage.read_ranges, uri)
