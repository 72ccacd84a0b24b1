"""The files of a source: loose files, and members of tar and zip archives, which are read by their offsets."""

import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cluster.workers import map_items
from orchestrator import storage
from orchestrator.data.images import IMAGE_ENDINGS
from orchestrator.data.sources.index import Listing
from orchestrator.progress import progress_line

ARCHIVES = r"(?i)\.(tar|zip)$"  # names of archives
_HEADER_BYTES = 64 << 10  # fetched at a time to read only the headers of large members
_SCAN_BYTES = 8 << 20  # fetched at a time if members are images: reading all is faster than a request for each header
_MAX_SIDECAR_BYTES = 1 << 20  # larger .cls and .json files have no labels
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # precedes each member of a zip
_BATCH_FILES = 1 << 14  # files that are Python objects at the same time
_MAX_IMAGE_BYTES = 1 << 30  # of an image that is unpacked from a zip; longer data are truncated
_HIDDEN = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"}  # folders that operating systems create

MEMBERS = pa.schema(
    [
        pa.field("name", pa.large_string()),
        pa.field("start", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("sidecar", pa.string()),  # label of a .cls or .json, see `_parse_sidecar`; null for other files
    ]
)


class File(NamedTuple):
    """One file of a tree: a whole object, or a member of an archive."""

    name: str  # in the tree
    object: str | None  # the object with its bytes, relative to the source; None: the object of its own name
    start: int  # of its bytes in the object
    size: int
    sidecar: str | None  # as in MEMBERS


class Archive(NamedTuple):
    """An archive: a whole object, or a tar within a tar. Loose files belong to an archive without a name."""

    object: str | None = None  # name relative to the source
    uri: str = ""
    begin: int = 0  # the archive is bytes [begin, end) of the object
    end: int = 0
    stem: str = ""  # the archive's name without its extension
    prefix: str = ""  # begins the names of its files in the tree


class Tree(NamedTuple):
    """All files of a source by name, as if each archive were an unpacked folder of its name."""

    listing: Listing
    members: dict[Archive, pa.Table]  # a table with schema MEMBERS for each archive
    left_out: dict[str, int]  # number of archives that were not opened, by a description

    def files(self, archive: Archive | None = None) -> Iterator[File]:
        """Yield the files of one archive, or all files. Only some of them are Python objects at the same time."""
        for source in self.members if archive is None else [archive]:
            for batch in self.members[source].to_batches(max_chunksize=_BATCH_FILES):
                for name, start, size, sidecar in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    yield File(source.prefix + name, source.object, start or 0, size, sidecar)


def is_hidden(name: str) -> bool:
    """Return whether a file or a folder above it is hidden, or belongs to an operating system."""
    return name[0] == "." or "/." in name or any(part in _HIDDEN for part in name.split("/"))


def is_image(name: str) -> bool:
    """Return whether the name has the extension of an image that can be decoded."""
    return name.lower().endswith(IMAGE_ENDINGS)


def open_tree(listing: Listing, label_key: str | None, num_workers: int) -> Tree:
    """Return the tree of a source. `num_workers` workers (0: this process) scan its archives.

    If there are loose images, the archives beside them are not opened.

    label_key: the field with the label in the .json beside an image; None = label or cls.

    Raises:
        ValueError: an archive is damaged.
    """
    archives = [name for name in listing.matching(ARCHIVES) if not is_hidden(name)]
    left_out: dict[str, int] = {}
    if archives and any(is_image(name) and not is_hidden(name) for name in listing.names.to_pylist()):
        left_out = {f"archive {archives[0]}" if len(archives) == 1 else "archives": len(archives)}
        archives = []
    loose, sizes = listing.names, pa.array(listing.sizes)
    if archives:
        is_loose = pc.invert(pc.match_substring_regex(loose, ARCHIVES))
        loose, sizes = loose.filter(is_loose), sizes.filter(is_loose)
    nulls = pa.nulls(len(loose))
    members = {Archive(): pa.table([loose, nulls, sizes, nulls], names=MEMBERS.names)}
    if archives:
        members |= _scan_all(listing, archives, label_key, num_workers)
    return Tree(listing, members, left_out)


def _scan_all(listing: Listing, names: list[str], label_key: str | None, num_workers: int) -> dict[Archive, pa.Table]:
    """Return the files of each archive, sorted by the names of the files."""
    archives = [archive for name in names for archive in _archives(listing, name, len(names) == 1)]
    scan = partial(_scan, label_key)
    scanned: dict[Archive, pa.Table] = {}
    with progress_line(len(archives), "archives", "scanning") as progress:
        for archive, members in map_items(lambda: scan, archives, num_workers):
            scanned[archive] = members
            progress.update_to(len(scanned))
    return {archive: scanned[archive] for archive in sorted(archives, key=lambda archive: archive.prefix)}


# ----------------------------------------------------------------------------------------------------------- scanning


def _archives(listing: Listing, name: str, is_only: bool) -> list[Archive]:
    """Return the archive, or the tars in it.

    is_only: the source has no other archive, so the archive's name is not a folder around its files.
    """
    stem, uri = re.sub(ARCHIVES, "", name), storage.join(listing.uri, name)
    prefix = "" if is_only else f"{stem}/"
    outer = Archive(name, uri, 0, listing.size(name), stem, prefix)
    if name.lower().endswith(".zip"):
        return [outer]
    nested = []
    with storage.open_input(uri, _HEADER_BYTES) as file:
        for member in _tar_members(file, outer):
            if is_image(member.name):
                return [outer]
            member_name = _clean(member.name)
            if member_name.lower().endswith(".tar") and not is_hidden(member_name):
                inner_stem, begin = prefix + member_name[: -len(".tar")], member.offset_data
                nested.append(Archive(name, uri, begin, begin + member.size, inner_stem, f"{inner_stem}/"))
    return nested or [outer]


def _scan(label_key: str | None, archive: Archive) -> pa.Table:
    """Return the files of an archive, sorted by name."""
    with storage.open_input(archive.uri, _SCAN_BYTES) as file:
        is_zip = archive.uri.lower().endswith(".zip")
        rows = sorted(_zip_rows(file, archive) if is_zip else _tar_rows(file, archive, label_key))
    return pa.Table.from_pylist([dict(zip(MEMBERS.names, row, strict=True)) for row in rows], MEMBERS)


def _tar_rows(file: BinaryIO, archive: Archive, label_key: str | None) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield the files of a tar as rows of MEMBERS."""
    endings = (".cls", ".json") if label_key in (None, "cls") else (".json",)
    for member in _tar_members(file, archive):
        sidecar = None
        if member.name.lower().endswith(endings) and member.size <= _MAX_SIDECAR_BYTES:
            file.seek(member.offset_data)
            sidecar = _parse_sidecar(member.name, file.read(member.size), label_key)
        yield _clean(member.name), member.offset_data, member.size, sidecar


def _zip_rows(file: BinaryIO, archive: Archive) -> Iterator[tuple[str, int, int, None]]:
    """Yield the files of a zip as rows of MEMBERS. Their bytes include the local header, which `_unzip` needs.

    Raises:
        ValueError: the zip is damaged, or a file cannot be unpacked from its local header.
    """
    try:
        with zipfile.ZipFile(file) as opened:
            members = sorted(opened.infolist(), key=lambda member: member.header_offset)
            ends = [member.header_offset for member in members[1:]] + [opened.start_dir]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError, struct.error, EOFError) as error:
        raise ValueError(f"{archive.uri} is not a valid zip archive: {error}") from error
    for member, end in zip(members, ends, strict=True):
        if member.is_dir():
            continue
        is_encrypted = member.flag_bits & 1
        # The local header of a streamed file has no size, and only compressed data mark their own end.
        has_no_size = member.flag_bits & 8 and member.compress_type == zipfile.ZIP_STORED
        if is_encrypted or has_no_size or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{archive.uri}: {member.filename} is encrypted, streamed without its size, or compressed "
                "by another method than deflate; zip it again, or unpack it"
            )
        yield _clean(member.filename), member.header_offset, end - member.header_offset, None


def _clean(name: str) -> str:
    """Return a member's name with slashes, and without ./ or / at its beginning. If it is not UTF-8, it is Latin-1."""
    if re.search("[\udc80-\udcff]", name):  # how tarfile represents other bytes
        name = name.encode("utf-8", "surrogateescape").decode("latin-1")
    return re.sub(r"^(\./)+|^/+", "", name.replace("\\", "/")) or name


def _tar_members(file: BinaryIO, archive: Archive) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar, and skip their contents.

    Raises:
        ValueError: it is not a tar, or it is truncated, or an image in it is a link.
    """
    described = archive.uri + (f" ({archive.stem}.tar in it)" if archive.begin else "")
    file.seek(archive.begin)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps all of them in memory
                if member.offset_data + member.size > archive.end:
                    raise ValueError(f"{described} is truncated: {member.name} ends after its last byte; copy it again")
                if is_image(member.name) and (member.issym() or member.islnk()):
                    raise ValueError(
                        f"{described}: {member.name} is a link to {member.linkname} and is not read; unpack the tar, "
                        "or write it again with --dereference --hard-dereference"
                    )
                if member.isreg():
                    yield member
            end = tar.offset  # of the block of zeros that follows the last member
    except tarfile.TarError as error:
        raise ValueError(f"{described} is not a valid tar archive: {error}") from error
    file.seek(end)
    # Zeros up to the next multiple of RECORDSIZE follow the last member. What follows them is another tar.
    padding = file.read(min(archive.end - end, tarfile.RECORDSIZE + tarfile.BLOCKSIZE))
    if len(padding) < tarfile.BLOCKSIZE or padding.strip(b"\0"):
        raise ValueError(
            f"{described} is truncated or damaged at byte {end - archive.begin}, or another tar follows there; copy it "
            "again, or unpack it with --ignore-zeros"
        )


def _parse_sidecar(name: str, data: bytes, label_key: str | None) -> str:
    """Return the label in a .cls or .json as JSON: {"label": LABEL}, or {"keys": [FIELD, ...]} if it has no label."""
    if name.lower().endswith(".cls"):
        text = data.decode("utf-8", "replace").strip()
        return json.dumps({"label": int(text) if re.fullmatch(r"-?\d+", text) else text})
    try:
        fields = json.loads(data)
    except ValueError:
        return json.dumps({"keys": ["(no valid JSON)"]})
    fields = fields if isinstance(fields, dict) else {}
    for key in (label_key,) if label_key else ("label", "cls"):
        if key in fields:
            return json.dumps({"label": fields[key]})
    return json.dumps({"keys": sorted(map(str, fields))})


# ------------------------------------------------------------------------------------------------------------ reading


def read_ranges(uri: str, ranges: Sequence[storage.Range]) -> list[bytes]:
    """Return the contents of files; those in zips are unpacked. Raises what `storage.read_ranges` raises."""
    contents = zip(ranges, storage.read_ranges(uri, ranges), strict=True)
    return [_unzip(data) if byte_range.name.lower().endswith(".zip") else data for byte_range, data in contents]


def _unzip(data: bytes) -> bytes:
    """Unpack a member of a zip from its local header on. If it is damaged, return no bytes, which are not an image."""
    try:
        _, _, _, method, _, _, _, _, size, name_length, extra_length = _LOCAL_HEADER.unpack_from(data)
        content = data[_LOCAL_HEADER.size + name_length + extra_length :]
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, _MAX_IMAGE_BYTES)
        return content[:size]  # in zip64, `size` is 2^32 - 1, and all bytes up to the next member are returned
    except (zlib.error, struct.error):
        return b""
