"""Images in tar archives, read by their offsets without unpacking."""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.workers import map_items
from orchestrator import storage
from orchestrator.data.sources.folders import flat_source, folder_source
from orchestrator.data.sources.index import (
    IMAGE_NAME,
    Findings,
    Listing,
    Source,
    finding,
    index_table,
    make_source,
    numbered,
    split_folder,
    split_of_each,
)
from orchestrator.data.sources.labels import LabelMap
from orchestrator.progress import progress_line

TAR_NAME = r"(?i)(^|/)[^./][^/]*\.tar$"
COMPRESSED_NAME = r"(?i)\.(tar\.(gz|bz2|xz|zst)|tgz)$"
_PEEK = 64  # members that are looked at to tell one kind of tar from another
_HEADER_BYTES = 64 << 10  # fetched at a time where members are large and only headers are wanted
_SCAN_BYTES = 8 << 20  # where they are images: reading through is faster than a request for each header

Found = TypeVar("Found")


class Piece(NamedTuple):
    """A tar: a whole object, or a member of one."""

    object: str
    begin: int  # bytes of the object
    end: int
    name: str  # the tar's own, without .tar


class Samples(NamedTuple):
    """What a WebDataset tar holds: the images' table with `label` (-1: none), and samples whose labels disagree."""

    table: pa.Table
    mismatches: list[str]


def first_members(listing: Listing) -> list[str]:
    """Names of the first members of the source's first tar; empty where it has no tars."""
    if not (pieces := _tars(listing)):
        return []
    with storage.open_input(storage.join(listing.uri, pieces[0].object), _HEADER_BYTES) as file:
        return [member.name for member in islice(_members(file, pieces[0], listing.uri), _PEEK)]


def tars_source(listing: Listing, num_workers: int) -> Source:
    """One tar for each class, loose or themselves in a tar, as the training images of ILSVRC2012 come; or one tar of a
    tree or of a flat folder.

    Classes are the tars' names in sorted order; a key is <class>/<member>, as in a tree of the unpacked tars. A member
    whose name begins with another class than its tar's is reported.

    Raises:
        ValueError: a tar is cut short, or the only one has neither class folders nor <class>_<anything>.
    """
    tars = _tars(listing)
    pieces = [inner for piece in tars for inner in (_nested(listing.uri, piece) or [piece])]
    if pieces == tars and len(tars) == 1:
        return _packed_source(listing.uri, tars[0])
    tables = _scan_all(partial(_scan_images, listing.uri), pieces, num_workers)
    names = [piece.name.rsplit("/", 1)[-1] for piece in pieces]
    classes, labels = numbered(pa.array(names, pa.string()))
    findings: Findings = {}
    if empty := [name for name, table in zip(names, tables, strict=True) if not len(table)]:
        findings["tars_without_images"] = finding(empty)

    parts = []
    for piece, name, label, table in zip(pieces, names, labels, tables, strict=True):
        keys = pc.binary_join_element_wise(name, table["member"], "/")
        parts.append(_table(piece, keys, np.full(len(table), label), table))
    index = pa.concat_tables(parts)
    prefixes = pc.replace_substring_regex(index["key"], r"^.*/|_[^/]*$", "")
    own = pc.take(pa.array(classes), index["label"])
    other = pc.and_(pc.is_in(prefixes, pa.array(classes)), pc.not_equal(prefixes, own))
    if pc.any(other).as_py():
        findings["images_named_after_another_class"] = finding(index["key"].filter(other).to_pylist())
    return make_source("tars", listing.uri, classes, index, findings)


def _packed_source(uri: str, piece: Piece) -> Source:
    """What folder_source or flat_source says of the unpacked tar; a folder around all of it does not count."""
    [table] = _scan_all(partial(_scan_images, uri), [piece], num_workers=0)
    names = table["member"].combine_chunks()
    folders = pc.unique(pc.replace_substring_regex(names, r"(^|/)[^/]*$", "")).to_pylist()
    around = [part for part in os.path.commonpath(folders or [""]).split("/") if part]
    while around and split_folder(around[-1]):
        around.pop()
    inner = pc.utf8_slice_codeunits(names, sum(len(part) + 1 for part in around))
    unpacked = Listing(storage.join(uri, piece.object), inner, table["size"].to_numpy())
    in_folders = pc.any(pc.match_substring(inner, "/")).as_py()
    source = folder_source(unpacked) if in_folders else flat_source(unpacked)
    keys, labels, splits = (source.index[name].combine_chunks() for name in ("key", "label", "split"))
    index = _table(piece, keys, labels.to_numpy(), table.take(pc.index_in(keys, inner)), splits)
    return make_source("tars", uri, source.classes, index, source.findings)


def labelled_tars_source(listing: Listing, labels: LabelMap, num_workers: int) -> Source:
    """Images in tars that a label map names, by <tar>/<member> or by their file name alone."""
    index, findings = labels.apply(_all_images(listing, num_workers))
    return make_source("tars", listing.uri, labels.classes, index, findings)


def unlabelled_tars_source(listing: Listing, num_workers: int) -> Source:
    """Images of no class in tars."""
    return make_source("tars", listing.uri, (), _all_images(listing, num_workers))


def webdataset_source(listing: Listing, num_workers: int) -> Source:
    """WebDataset tars: members of one name up to its first dot are one sample, an image and its .cls or .json.

    A .cls holds the label, a .json an object with `label` or `cls`. A key is <tar>/<name of the sample>. Splits are
    those that the tars' names speak of.

    Raises:
        ValueError: a tar is cut short, or a label is no integer.
    """
    pieces = _tars(listing)
    splits = split_of_each([piece.name for piece in pieces])
    found = _scan_all(partial(_scan_samples, listing.uri), pieces, num_workers)
    parts, findings = [], {}
    for piece, samples in zip(pieces, found, strict=True):
        keys = pc.binary_join_element_wise(piece.name, samples.table["member"], "/")
        split = pa.array(np.full(len(keys), splits[piece.name], object), pa.string())
        parts.append(_table(piece, keys, samples.table["label"].to_numpy(), samples.table, split))
    index = pa.concat_tables(parts)
    labels = index["label"].to_numpy()
    if (labels < 0).all():
        return make_source("webdataset", listing.uri, (), index)
    if (labels < 0).any():
        findings["images_without_label"] = finding(index["key"].filter(pa.array(labels < 0)).to_pylist())
        index = index.filter(pa.array(labels >= 0))
    if mismatches := [case for samples in found for case in samples.mismatches]:
        findings["labels_that_differ_between_cls_and_json"] = finding(mismatches)
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    return make_source("webdataset", listing.uri, classes, index, findings)


def _all_images(listing: Listing, num_workers: int) -> pa.Table:
    """The index of all images in all tars, without labels."""
    pieces = _tars(listing)
    tables = _scan_all(partial(_scan_images, listing.uri), pieces, num_workers)
    parts = []
    for piece, table in zip(pieces, tables, strict=True):
        keys = pc.binary_join_element_wise(piece.name, table["member"], "/")
        parts.append(_table(piece, keys, np.full(len(table), -1), table))
    return pa.concat_tables(parts)


def _tars(listing: Listing) -> list[Piece]:
    tars = listing.matching(TAR_NAME)
    names = tars.names.to_pylist()
    return [
        Piece(name, 0, int(size), re.sub(r"(?i)\.tar$", "", name)) for name, size in zip(names, tars.sizes, strict=True)
    ]


def _table(
    piece: Piece, keys: pa.Array, labels: np.ndarray, table: pa.Table, splits: pa.StringArray | None = None
) -> pa.Table:
    """A piece's part of the index."""
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    objects = pa.array(np.full(len(table), piece.object, object), pa.string())
    return index_table(keys, labels, objects, table["start"].to_numpy(), table["size"].to_numpy(), splits)


# ------------------------------------------------------------------------------------------------- scanning


def _scan_all(scan: Callable[[Piece], Found], pieces: list[Piece], num_workers: int) -> list[Found]:
    """What scanning each piece finds, by a pool of workers."""
    found: dict[Piece, Found] = {}
    with progress_line(len(pieces), "tars", "scanning") as progress:
        for piece, result in map_items(lambda: scan, pieces, num_workers):
            found[piece] = result
            progress.update_to(len(found))
    return [found[piece] for piece in pieces]


def _nested(uri: str, piece: Piece) -> list[Piece]:
    """The tars that a tar holds; none where it holds images."""
    nested = []
    with storage.open_input(storage.join(uri, piece.object), _HEADER_BYTES) as file:
        for member in _members(file, piece, uri):
            if not re.search(TAR_NAME, member.name):
                if re.search(IMAGE_NAME, member.name):
                    return []
                continue
            begin = member.offset_data
            nested.append(Piece(piece.object, begin, begin + member.size, re.sub(r"(?i)\.tar$", "", member.name)))
    return nested


def _scan_images(uri: str, piece: Piece) -> pa.Table:
    """Names and places of the images in a tar."""
    members, starts, sizes = [], [], []
    with storage.open_input(storage.join(uri, piece.object), _SCAN_BYTES) as file:
        for member in _members(file, piece, uri):
            if re.search(IMAGE_NAME, member.name):
                members.append(member.name.removeprefix("./"))
                starts.append(member.offset_data)
                sizes.append(member.size)
    return _places(members, starts, sizes)


def _scan_samples(uri: str, piece: Piece) -> Samples:
    """The images of a WebDataset tar with their labels."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int]] = {".cls": {}, ".json": {}}
    with storage.open_input(storage.join(uri, piece.object), _SCAN_BYTES) as file:
        for member in _members(file, piece, uri):
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            stem, dot, ending = name.partition(".")
            sample = f"{folder}/{stem}" if folder else stem
            if re.search(IMAGE_NAME, member.name):
                images[sample] = member.offset_data, member.size
            elif dot + ending in labels:
                file.seek(member.offset_data)
                label = _label(
                    file.read(member.size), dot + ending, f"{storage.join(uri, piece.object)}: {member.name}"
                )
                if label is not None:
                    labels[dot + ending][sample] = label
    both = labels[".json"] | labels[".cls"]
    table = _places(list(images), [start for start, _ in images.values()], [size for _, size in images.values()])
    column = pa.array([both.get(sample, -1) for sample in images], pa.int64())
    differing = [f"{piece.name}/{key}" for key in images if labels[".json"].get(key, both.get(key)) != both.get(key)]
    return Samples(table.append_column("label", column), differing)


def _label(data: bytes, form: str, where: str) -> int | None:
    """The integer in a .cls, or under `label` or `cls` in a .json; None where a .json has neither."""
    try:
        if form == ".cls":
            return int(data)
        fields = json.loads(data)
        found = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
        return None if found is None else int(found)
    except ValueError as error:
        raise ValueError(f"{where} holds no integer label: {error}") from error


def _places(members: list[str], starts: list[int], sizes: list[int]) -> pa.Table:
    columns = [pa.array(members, pa.string()), pa.array(starts, pa.int64()), pa.array(sizes, pa.int64())]
    return pa.table(dict(zip(("member", "start", "size"), columns, strict=True)))


def _members(file: BinaryIO, piece: Piece, uri: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, hopping from header to header.

    Raises:
        ValueError: it is no tar, or is cut short.
    """
    where = f"{storage.join(uri, piece.object)}" + (f" ({piece.name}.tar in it)" if piece.begin else "")
    file.seek(piece.begin)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                if member.offset_data + member.size > piece.end:
                    raise ValueError(f"{where} is cut short: {member.name} ends behind it")
                if member.isreg():
                    yield member
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{where} is no sound tar: {error}") from error
    file.seek(end)
    if end + tarfile.BLOCKSIZE > piece.end or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError(f"{where} is cut short or damaged at byte {end - piece.begin}: its end mark is missing")
