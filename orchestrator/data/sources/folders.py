"""Images that are objects of their own: trees, flat folders, and what a label map names."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.data.images import IMAGE_ENDINGS
from orchestrator.data.sources.index import (
    IMAGE_NAME,
    Listing,
    Source,
    component,
    finding,
    index_table,
    make_source,
    numbered,
    split_folder,
    split_of_each,
)
from orchestrator.data.sources.labels import LabelMap


def folder_source(listing: Listing) -> Source:
    """A tree <class>/<image> or <split>/<class>/<image>, classes in the order of their sorted names.

    A key is the path beneath the source.

    Raises:
        ValueError: there are no images, or some that lie in no class folder.
    """
    images = _images(listing)
    first = component(images.names, 0)
    splits = split_of_each(pc.unique(first).to_pylist(), split_folder)
    depth = 1 if all(splits.values()) else 0
    stray = pc.equal(component(images.names, depth + 1), "")
    if pc.any(stray).as_py():
        names = images.names.filter(stray)
        raise ValueError(f"source={listing.uri}: {len(names)} images lie in no class folder, {names[0]} among them")
    classes, labels = numbered(component(images.names, depth))
    deep = listing.names.filter(pc.greater(pc.count_substring(listing.names, "/"), depth))
    others = sorted(set(pc.unique(component(deep, depth)).to_pylist()) - set(classes))
    findings = {"folders_without_images": finding(others)} if others else {}
    return make_source("folder", listing.uri, classes, _table(images, labels, _looked_up(first, splits)), findings)


def flat_source(listing: Listing) -> Source:
    """Files named <class>_<anything>, as the published code reads them; classes in the order of their sorted names.

    Raises:
        ValueError: there are no images, or some without "_" in their name.
    """
    images = _images(listing)
    names = pc.replace_substring_regex(images.names, r"^.*/", "")
    plain = pc.invert(pc.match_substring(names, "_"))
    if pc.any(plain).as_py():
        odd = images.names.filter(plain)
        raise ValueError(
            f"source={listing.uri}: {len(odd)} images have no class and _ before the rest of their name, {odd[0]} "
            "among them; pass a label map (labels=FILE), or layout=unlabelled where there are no classes"
        )
    classes, labels = numbered(pc.replace_substring_regex(names, r"_.*$", ""))
    return make_source("flat", listing.uri, classes, _table(images, labels))


def unlabelled_source(listing: Listing) -> Source:
    """Images of no class, wherever they lie beneath the source."""
    images = _images(listing)
    return make_source("unlabelled", listing.uri, (), _table(images, np.full(len(images.names), -1)))


def labelled_source(listing: Listing, labels: LabelMap) -> Source:
    """Images that a label map names, by their path beneath the source or by their file name alone."""
    images = _images(listing)
    index, findings = labels.apply(_table(images, np.full(len(images.names), -1)))
    return make_source("folder", listing.uri, labels.classes, index, findings)


def _images(listing: Listing) -> Listing:
    images = listing.matching(IMAGE_NAME)
    if not len(images.names):
        raise ValueError(f"source={listing.uri} holds no images ({', '.join(IMAGE_ENDINGS)})")
    return images


def _table(images: Listing, labels: np.ndarray, splits: pa.StringArray | None = None) -> pa.Table:
    """An image is its whole object."""
    return index_table(images.names, labels, images.names, np.zeros(len(labels), np.int64), images.sizes, splits)


def _looked_up(names: pa.StringArray, values: dict[str, str]) -> pa.StringArray:
    encoded = names.dictionary_encode()
    return pa.array([values[name] for name in encoded.dictionary.to_pylist()], pa.string()).take(encoded.indices)
