"""What was understood of a source: for the terminal before anything is written, and for the report."""

from itertools import islice
from typing import Any

import numpy as np
from pydantic import BaseModel

from orchestrator import storage
from orchestrator.data.dataset import Manifest
from orchestrator.data.images import ExifOrientation, decode_and_describe
from orchestrator.data.sources import Findings, Listing, Source, first_files, read_ranges
from orchestrator.data.sources.index import INDEX
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
        for kind, found in self.findings.items():
            lines.append(("found", finding_text(kind, found)))
        looked = self.sample
        behind = "transparency ignored" if background == "drop" else f"drawn on {background}"
        turned = "rotated" if exif_orientation == "apply" else "not rotated"
        lines.append(
            ("images", f"of {looked.images} looked at, {looked.transparent} are transparent ({behind}), "
             f"{looked.rotated} have an EXIF rotation ({turned}), {looked.undecodable} cannot be decoded")
        )  # fmt: skip
        return "\n".join(f"{name:9} {words}" for name, words in lines)

    def refuse_suspicious(self) -> None:
        """Raise ValueError with all suspicions, if there are any."""
        if self.suspicions:
            raise ValueError(f"--source {self.source} looks suspicious: {'; '.join(self.suspicions.values())}")


def finding_text(kind: str, found: Any) -> str:
    """Return a finding as text: its kind, count and examples."""
    examples = f" ({', '.join(found.examples)})" if found.examples else ""
    return f"{kind.replace('_', ' ')}: {found.count:,}{examples}"


def understand(source: Source, default_split: str = "train") -> Understanding:
    """Return what was understood of a source. This reads some of its images."""
    counts = source.counts()
    total = source.total()
    named = [(name, int(total[label])) for label, name in enumerate(source.classes) if total[label]]
    splits = {split or default_split: 0 for split in counts}
    for split, found in counts.items():
        splits[split or default_split] += int(found.sum())
    return Understanding(
        source=source.reading.named,
        layout=source.reading.layout,
        splits=splits,
        num_classes=len(source.classes),
        first_classes=dict(islice(named, FIRST_CLASSES)),
        label_files=source.reading.companions,
        left_out=source.reading.left_out,
        findings=source.findings,
        guesses=source.reading.guesses,
        sample=_look_at(_some_images(source)),
        suspicions=suspicions(source),
    )


def understand_registered(source: ParquetSource, manifest: Manifest, findings: Findings) -> Understanding:
    """Return what was understood of Parquet files. This reads their footers and the first images of the first file."""
    reading, listing = source.reading(), source.listing
    assert reading.images is not None
    uncounted = Source(reading, "", 0, manifest.classes, INDEX.empty_table(), findings)
    first = storage.join(listing.uri, next(iter(source.footers)))
    return Understanding(
        source=listing.named,
        layout=reading.layout,
        splits={split: manifest.num_samples(split) for split in manifest.splits},
        num_classes=len(manifest.classes),
        first_classes=dict.fromkeys(manifest.classes[:FIRST_CLASSES]),
        label_files={},
        left_out={},
        findings=findings,
        guesses=source.guessed,
        sample=_look_at(list(islice(reading.images(first), SAMPLE))),
        suspicions=suspicions(uncounted),
    )


def describe_first_files(listing: Listing) -> str:
    """Return a line about a source whose archives are too large for a dry run to scan."""
    archive, names = first_files(listing)
    return f"{'source':9} {listing.named}: archives; {archive} begins with {', '.join(names[:FIRST_CLASSES])}"


def _look_at(images: list[bytes]) -> Sample:
    """Decode images and count those with each property."""
    found = {"transparent": 0, "rotated": 0, "undecodable": 0}
    for data in images:
        try:
            decoded = decode_and_describe(data)
        except ValueError:
            found["undecodable"] += 1
            continue
        found["transparent"] += decoded.transparent
        found["rotated"] += decoded.rotated
    return Sample(images=len(images), **found)


def _some_images(source: Source) -> list[bytes]:
    """Return the encoded bytes of up to SAMPLE images, or the first of one object if images are read in order."""
    reading, index = source.reading, source.index
    if reading.images is not None:
        uri = storage.join(reading.uri, index["object"][0].as_py())
        return list(islice(reading.images(uri), SAMPLE))
    rows = index.take(np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(int))).to_pylist()
    return read_ranges(
        reading.uri, [storage.Range(row["object"] or row["key"], row["start"], row["size"]) for row in rows]
    )
