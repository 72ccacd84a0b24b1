"""Image files as samples: problems are found by names and headers, before features are extracted."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator import storage
from orchestrator.data.dataset import Manifest
from orchestrator.evaluation.files import ListedFile, list_images
from orchestrator.evaluation.inputs import open_images
from orchestrator.pictures import png

PADDED = [f"{index:06d}.png" for index in range(20)]
UNPADDED = [f"{index}.png" for index in range(1, 21)]


def manifest(**changes: object) -> Manifest:
    settings: dict = {"name": "x", "classes": ("cat", "dog"), "splits": {}, "width": None, "height": None}
    return Manifest(quarantined=0, **settings | changes)


def write(uri: str, names: Iterable[str], sizes: dict[str, int] | None = None) -> str:
    """Write an image for each name to a folder or, if `uri` ends in .tar, to a tar; `sizes` has widths other than 6."""
    images = {name: png(np.full((6, (sizes or {}).get(name, 6), 3), i, np.uint8)) for i, name in enumerate(names)}
    if not uri.endswith(".tar"):
        for name, data in images.items():
            storage.write_bytes(f"{uri}/{name}", data)
        return uri
    with tarfile.open(uri, "w") as archive:
        for name, data in images.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return uri


@pytest.mark.parametrize(
    ("names", "key_words"),
    [
        (PADDED, []),
        ([f"{a}{i}.png" for i in (1, 10, 2) for a in "abcdefgh"], []),  # several patterns: sorted by name
        (UNPADDED, ["not padded", "2.png comes before 10.png"]),
        ([f"made/{name}" for name in UNPADDED], ["not padded", "made/2.png"]),
        ([*PADDED, "._000000.png", ".DS_Store", ".cache/1.png"], ["3 hidden", ".DS_Store"]),
        ([*PADDED, "a.txt", "b.TXT", "c.heic", "LICENSE"], ["ending", ".heic 1", "none 1"]),
    ],
)
def test_unusual_names_are_reported(names: list[str], key_words: list[str]) -> None:
    listing = list_images(map(ListedFile, names))
    assert not listing.unusual and len(listing.warnings) == bool(key_words)
    for word in key_words:
        assert word in listing.warnings[0]


def test_names_of_one_pattern_are_sorted_by_their_numbers() -> None:
    assert [file.name for file in list_images(map(ListedFile, UNPADDED[::-1])).files] == UNPADDED
    mixed = ["b1.png", "a10.png", "a2.png", "c.png"]
    assert [file.name for file in list_images(map(ListedFile, mixed)).files] == sorted(mixed)


@pytest.mark.parametrize("form", ["images", "images.tar"])
@pytest.mark.parametrize("unusual", ["grid.png", "0_grid.png", "preview_000.png"])
def test_a_grid_among_samples_is_refused_and_an_unusual_name_reported(form: str, unusual: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{unusual} \(60x6\) looks like a grid.*6x6.*remove"):
        open_images(write(f"{tmp_path}/grid-{form}", [*PADDED, unusual], {unusual: 60}))
    images = open_images(write(f"{tmp_path}/{form}", [*PADDED, unusual]))
    assert images.count == 21 and len(images.warnings) == 1
    assert unusual in images.warnings[0] and "remove" in images.warnings[0]


def test_a_different_size_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = write(str(tmp_path), PADDED, {PADDED[17]: 9})
    with pytest.raises(ValueError, match=rf"{PADDED[17]} has 9x6 pixels, .* 6x6; pass --image-size"):
        open_images(uri)
    assert open_images(uri, image_size=4).read(15, 20)[0].shape == (5, 4, 4, 3)
    storage.write_bytes(f"{uri}/{PADDED[17]}", b"nothing")
    with pytest.raises(ValueError, match=rf"{PADDED[17]} is not an intact image"):
        open_images(uri)


def test_few_headers_of_a_remote_folder_are_read(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.evaluation.files.REMOTE_SIZES", 3)
    with pytest.raises(ValueError, match="looks like a grid"):
        open_images(write(f"{s3_bucket}/grid", [*PADDED, "grid.png"], {"grid.png": 60}))
    images = open_images(write(f"{s3_bucket}/late", PADDED, {PADDED[17]: 9}))
    with pytest.raises(ValueError, match="--image-size"):
        images.read(15, 20)


def test_some_folders_named_after_classes_are_reported(tmp_path: Path) -> None:
    uri = write(str(tmp_path), ["cat/0.png", "dog/1.png", "dgo/2.png"])
    (warning,) = open_images(uri, manifest()).warnings
    assert "'cat'" in warning and "'dgo'" in warning
    assert open_images(uri, manifest(classes=())).warnings == ()


def test_files_are_decoded_as_the_reference_is(tmp_path: Path) -> None:
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("0.png", "1.png"):
        image.save(tmp_path / name, exif=exif)
    published = open_images(str(tmp_path), manifest())
    pixels = published.read(0, 2)[0]
    assert pixels.shape == (2, 4, 6, 3) and pixels.max() == 0
    own = open_images(str(tmp_path), manifest(background="white", exif_orientation="apply"))
    pixels = own.read(0, 2)[0]
    assert pixels.shape == (2, 6, 4, 3) and pixels.min() == 255
    assert own.identity != published.identity == open_images(str(tmp_path)).identity
