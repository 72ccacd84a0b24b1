"""The interpretation of a source, which is printed before anything is written, and stored in the report."""

from collections import Counter
from collections.abc import Mapping
from itertools import islice

import numpy as np
from pydantic import BaseModel

from orchestrator import storage
from orchestrator.data.dataset import Manifest
from orchestrator.data.images import ExifOrientation, decode_and_describe
from orchestrator.data.sources.archives import read_ranges
from orchestrator.data.sources.index import INDEX, Finding, Findings, Source
from orchestrator.data.sources.parquet import ParquetSource
from orchestrator.data.suspicions import suspicions

FIRST_CLASSES = 5  # classes that are printed
SAMPLE = 64  # images that are decoded


class Sample(BaseModel, frozen=True, extra="forbid"):
    """Counts over the images that were decoded, which are spread evenly over the source if possible."""

    images: int
    transparent: int = 0
    rotated: int = 0  # by their EXIF orientation
    undecodable: int = 0


class Understanding(BaseModel, frozen=True, extra="forbid"):
    """The interpretation of a source."""

    source: str
    layout: str
    splits: dict[str, int]  # number of images in each
    num_classes: int
    first_classes: dict[str, int | None]  # number of images in each; None: not counted
    label_files: dict[str, str]  # label files beside the images, and how they are used
    left_out: dict[str, int]  # number of files that are not used, by kind
    findings: Findings
    guesses: tuple[str, ...]  # choices that were made by names, for the user to check
    sample: Sample
    suspicions: dict[str, str]  # name of each suspicion -> its message

    def text(self, background: str, exif_orientation: ExifOrientation) -> str:
        """Return the lines for the terminal. The arguments are those of `orchestrator.data.images.decode`."""
        splits = ", ".join(f"{split} {count:,} images" for split, count in self.splits.items())
        classes = "none: the images have no labels"
        if self.num_classes:
            first = [name if count is None else f"{name} ({count:,})" for name, count in self.first_classes.items()]
            more = ", ..." if self.num_classes > len(first) else ""
            classes = f"{self.num_classes:,}: {', '.join(first)}{more}"
        lines = [("source", f"{self.source}: {self.layout}"), ("splits", splits), ("classes", classes)]
        lines += [("chosen", guess) for guess in self.guesses]
        lines += [("beside", f"{name} is {use}") for name, use in self.label_files.items()]
        if self.left_out:
            lines.append(("left out", ", ".join(f"{kind}: {count:,}" for kind, count in self.left_out.items())))
        lines += [("found", finding_text(kind, finding)) for kind, finding in self.findings.items()]
        sample = self.sample
        transparency = "transparency ignored" if background == "drop" else f"drawn on {background}"
        rotation = "rotated" if exif_orientation == "apply" else "not rotated"
        lines.append(
            ("images", f"of {sample.images} sampled, {sample.transparent} are transparent ({transparency}), "
             f"{sample.rotated} have an EXIF rotation ({rotation}), {sample.undecodable} cannot be decoded")
        )  # fmt: skip
        return "\n".join(f"{name:9} {text}" for name, text in lines)


def finding_text(kind: str, finding: Finding) -> str:
    """Return the kind, the count and the examples of a finding as text."""
    examples = f" ({', '.join(finding.examples)})" if finding.examples else ""
    return f"{kind.replace('_', ' ')}: {finding.count:,}{examples}"


def understand(source: Source) -> Understanding:
    """Return the interpretation of a source. This decodes some of its images."""
    splits = {split: int(class_counts.sum()) for split, class_counts in source.counts().items()}
    # Without classes, `total` has one element and this dict is empty.
    counts = {name: int(count) for name, count in zip(source.classes, source.total(), strict=False) if count}
    return _understanding(source, splits, dict(islice(counts.items(), FIRST_CLASSES)), _read_sample(source))


def understand_registered(source: ParquetSource, manifest: Manifest, findings: Findings) -> Understanding:
    """Return the interpretation of Parquet files. This decodes the first images of the first file."""
    reading, listing = source.reading(), source.listing
    assert reading.images is not None
    uncounted = Source(listing, reading, listing.uri, manifest.classes, INDEX.empty_table(), findings)
    splits = {split: manifest.num_samples(split) for split in manifest.splits}
    images = list(islice(reading.images(next(iter(source.footers.values())).uri), SAMPLE))
    return _understanding(uncounted, splits, dict.fromkeys(manifest.classes[:FIRST_CLASSES]), images)


def _understanding(
    source: Source, splits: dict[str, int], first_classes: Mapping[str, int | None], images: list[bytes]
) -> Understanding:
    reading = source.reading
    return Understanding(
        source=source.listing.source,
        layout=reading.layout,
        splits=splits,
        num_classes=len(source.classes),
        first_classes=dict(first_classes),
        label_files=reading.companions,
        left_out=reading.left_out,
        findings=source.findings,
        guesses=reading.guesses,
        sample=_decode_sample(images),
        suspicions=suspicions(source),
    )


def _decode_sample(images: list[bytes]) -> Sample:
    """Decode images and count those with each property."""
    counts = Counter[str]()
    for data in images:
        try:
            decoded = decode_and_describe(data)
        except ValueError:
            counts["undecodable"] += 1
            continue
        counts["transparent"] += decoded.transparent
        counts["rotated"] += decoded.rotated
    return Sample(images=len(images), **counts)


def _read_sample(source: Source) -> list[bytes]:
    """Return the encoded bytes of up to SAMPLE images of the index.

    They are spread evenly over the index, or are the first images of one object if its images must be read in order.
    """
    index = source.index
    if source.reading.images is not None:
        return list(islice(source.reading.images(storage.join(source.uri, index["object"][0].as_py())), SAMPLE))
    rows = index.take(np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(int))).to_pylist()
    ranges = [storage.Range(row["object"] or row["key"], row["start"], row["size"]) for row in rows]
    return read_ranges(source.uri, ranges)
