"""What was understood of a source: for the terminal before anything is written, and for the report."""

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

FIRST_CLASSES = 5  # number of classes that are printed
SAMPLE = 64  # number of images that are decoded


class Sample(BaseModel, frozen=True, extra="forbid"):
    """Counts over some images, which are spread evenly over the source."""

    images: int
    transparent: int = 0
    rotated: int = 0  # by their EXIF orientation
    undecodable: int = 0


class Understanding(BaseModel, frozen=True, extra="forbid"):
    """The interpretation of a source."""

    source: str
    layout: str
    splits: dict[str, int]  # images of each
    num_classes: int
    first_classes: dict[str, int | None]  # number of images of each; None: not counted
    label_files: dict[str, str]  # known files beside the images, and how they are used
    left_out: dict[str, int]  # number of files that are no images, by kind
    findings: Findings
    guesses: tuple[str, ...]  # choices that were made by names
    sample: Sample
    suspicions: dict[str, str]

    def text(self, background: str, exif_orientation: ExifOrientation) -> str:
        """Return the lines for the terminal."""
        splits = ", ".join(f"{split} {count:,} images" for split, count in self.splits.items())
        first = ", ".join(
            name if count is None else f"{name} ({count:,})" for name, count in self.first_classes.items()
        )
        more = ", ..." if self.num_classes > len(self.first_classes) else ""
        lines = [
            ("source", f"{self.source}: {self.layout}"),
            ("splits", splits),
            (
                "classes",
                f"{self.num_classes:,}: {first}{more}" if self.num_classes else "none: the images have no labels",
            ),
            *(("chosen", guess) for guess in self.guesses),
            *(("beside", f"{name} is {use}") for name, use in self.label_files.items()),
        ]
        if self.left_out:
            lines.append(("left out", ", ".join(f"{what}: {count:,}" for what, count in self.left_out.items())))
        for kind, finding in self.findings.items():
            lines.append(("found", finding_text(kind, finding)))
        sample = self.sample
        behind = "transparency ignored" if background == "drop" else f"drawn on {background}"
        turned = "rotated" if exif_orientation == "apply" else "not rotated"
        lines.append(
            ("images", f"of {sample.images} looked at, {sample.transparent} are transparent ({behind}), "
             f"{sample.rotated} have an EXIF rotation ({turned}), {sample.undecodable} cannot be decoded")
        )  # fmt: skip
        return "\n".join(f"{name:9} {text}" for name, text in lines)


def finding_text(kind: str, finding: Finding) -> str:
    """Return a finding as text: its kind, count and examples."""
    examples = f" ({', '.join(finding.examples)})" if finding.examples else ""
    return f"{kind.replace('_', ' ')}: {finding.count:,}{examples}"


def understand(source: Source) -> Understanding:
    """Return what was understood of a source. This reads some of its images."""
    total, splits = source.total(), Counter[str]()
    for split, class_counts in source.counts().items():
        splits[split or "train"] += int(class_counts.sum())
    named = {name: int(count) for name, count in zip(source.classes, total, strict=False) if count}
    return _understanding(source, dict(splits), dict(islice(named.items(), FIRST_CLASSES)), _some_images(source))


def understand_registered(source: ParquetSource, manifest: Manifest, findings: Findings) -> Understanding:
    """Return what was understood of Parquet files. This reads their footers and the first images of the first file."""
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
        source=source.listing.named,
        layout=reading.layout,
        splits=splits,
        num_classes=len(source.classes),
        first_classes=dict(first_classes),
        label_files=reading.companions,
        left_out=reading.left_out,
        findings=source.findings,
        guesses=reading.guesses,
        sample=_look_at(images),
        suspicions=suspicions(source),
    )


def _look_at(images: list[bytes]) -> Sample:
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


def _some_images(source: Source) -> list[bytes]:
    """Return the encoded bytes of up to SAMPLE images, or the first of one object if images are read in order."""
    index = source.index
    if source.reading.images is not None:
        return list(islice(source.reading.images(storage.join(source.uri, index["object"][0].as_py())), SAMPLE))
    rows = index.take(np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(int))).to_pylist()
    return read_ranges(
        source.uri, [storage.Range(row["object"] or row["key"], row["start"], row["size"]) for row in rows]
    )
