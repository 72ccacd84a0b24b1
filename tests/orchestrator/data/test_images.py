"""Every image becomes RGB or one clear error."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from orchestrator.data import images


def encode(pixels: np.ndarray, form: str = "PNG", mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, form)
    return file.getvalue()


def test_every_mode_becomes_rgb() -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    grey, alpha = colour[..., 0], np.dstack([colour, colour[..., 0]])
    np.testing.assert_array_equal(np.asarray(images.decode(encode(grey))), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(np.asarray(images.decode(encode(alpha))), colour)  # alpha is dropped
    for data in (encode(colour, mode="P"), encode(colour, "JPEG", "CMYK"), encode(colour, "WEBP"), encode(grey, "GIF")):
        assert np.asarray(images.decode(data)).shape == (12, 10, 3)


@pytest.mark.parametrize("cut", [0, 10, 60, 200])
def test_truncated_images_raise_one_clear_error(cut: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "TIFF"):
        with pytest.raises(ValueError, match=r"it is none of JPEG|: |truncated|incomplete"):
            images.decode(encode(pixels, form)[:cut])


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for data in (encode(ramp), encode(ramp, "TIFF"), encode(ramp.astype(">u2"), "TIFF")):
        np.testing.assert_array_equal(np.asarray(images.decode(data)), np.repeat((ramp >> 8)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("pixels", "message"), [(np.int32, "32-bit integer pixels"), (np.float32, "floating-point pixels")]
)
def test_pixels_of_unknown_range_are_refused(pixels: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.decode(encode(np.arange(64, dtype=pixels).reshape(8, 8), "TIFF"))


TRANSPARENT_PIXEL = {"drop": (9, 8, 7), "white": (255, 255, 255), "black": (0, 0, 0), "10,20,30": (10, 20, 30)}


@pytest.mark.parametrize("background", TRANSPARENT_PIXEL)
def test_transparent_pixels_get_the_background(background: str) -> None:
    """Pixel 0 is opaque, pixel 1 is transparent and has a hidden colour, and pixel 2 is half transparent."""
    pixels = np.array([[[200, 100, 50, 255], [9, 8, 7, 0], [255, 0, 0, 128]]], np.uint8)
    colour = np.array(TRANSPARENT_PIXEL[background])
    half = (255, 0, 0) if background == "drop" else np.round((128 * np.array([255, 0, 0]) + 127 * colour) / 255)
    for form in ("PNG", "TIFF"):
        decoded = images.decode_and_describe(encode(pixels, form), background)
        assert decoded.transparent
        row = np.asarray(decoded.image)[0].astype(int)
        assert row[0].tolist() == [200, 100, 50] and tuple(row[1]) == TRANSPARENT_PIXEL[background]
        assert np.abs(row[2] - half).max() <= 1
    palette = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(palette, "PNG", transparency=0)
    if background != "drop":
        assert images.decode(palette.getvalue(), background).getpixel((0, 0)) == TRANSPARENT_PIXEL[background]
    opaque = images.decode_and_describe(
        encode(np.dstack([pixels[..., :3], np.full((1, 3), 255, np.uint8)])), background
    )
    assert not opaque.transparent


@pytest.mark.parametrize("background", ["grass", "1,2", "300,0,0", "", "#12345678"])
def test_a_background_that_is_no_colour_is_refused(background: str) -> None:
    with pytest.raises(ValueError, match=r"--background .*accepted: drop, white, black, or R,G,B"):
        images.check_background(background)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_ignored_or_applied(orientation: int) -> None:
    """By default it is ignored, as in the published code; `apply` gives Pillow's transposition."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    ignored = images.decode_and_describe(file.getvalue())
    np.testing.assert_array_equal(np.asarray(ignored.image), pixels)
    assert ignored.rotated == (orientation != 1)
    applied = images.decode(file.getvalue(), exif_orientation="apply")
    np.testing.assert_array_equal(np.asarray(applied), np.asarray(ImageOps.exif_transpose(Image.open(file))))


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"BLP2" + bytes(200),
        b"DDS |" + bytes(200),
        b"P6 2 2 255 " + bytes(12),
        b"GIMP" * 40,
        b"8BPS" + bytes(99),
    ],
)
def test_files_of_other_formats_are_not_decoded(data: bytes) -> None:
    with pytest.raises(ValueError, match="it is none of JPEG, PNG"):
        images.decode(data)


def test_long_images_are_refused_before_they_are_decoded() -> None:
    for shape in ((1, 100_000), (100_000, 1), (2, 201)):
        with pytest.raises(ValueError, match=f"{shape[1]} x {shape[0]} pixels"):
            images.decode(encode(np.zeros(shape, np.uint8)))
    assert images.decode(encode(np.zeros((2, 200), np.uint8))).size == (200, 2)


def test_damaged_images_raise_a_reproducible_value_error() -> None:
    """Damaged files of every format decode to an image, or raise the same ValueError each time, without addresses."""
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"):
        intact = encode(pixels, form)
        for _ in range(150):
            data = bytearray(intact[: int(rng.integers(1, len(intact) + 1))])
            for position in rng.integers(0, len(data), int(rng.integers(0, 8))):
                data[position] = int(rng.integers(256))
            reasons = set()
            for _ in range(2):
                try:
                    images.decode_and_describe(bytes(data), "white", "apply")
                except ValueError as error:
                    reasons.add(str(error))
            assert len(reasons) <= 1 and not any("0x" in reason for reason in reasons)
