"""Decode one image: encoded bytes -> RGB pixels."""

import io
import re
import warnings
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

# Odd EXIF blocks and palettes: the image can be decoded all the same, and a user can do nothing about the warning.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Only these decoders of Pillow may run. Others start programs (EPS) or have had few readers of their code.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000")
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
)  # fmt: skip
_METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow finds an orientation
MAX_ASPECT = 100  # longer images are refused: the work for a crop grows with the length of the resized image

ExifOrientation = Literal["ignore", "apply"]


class Decoded(NamedTuple):
    """An RGB image, and what was found in its file."""

    image: Image.Image
    transparent: bool  # some pixels are not opaque
    rotated: bool  # its EXIF orientation is not upright


def check_background(background: str) -> str:
    """Return `background` if it is drop or a colour.

    Raises:
        ValueError: it is neither.
    """
    _colour(background)
    return background


def decode(data: bytes, background: str = "drop", exif_orientation: ExifOrientation = "ignore") -> Image.Image:
    """Return the RGB image in `data`. See `decode_and_describe`, which has the same arguments and errors."""
    return decode_and_describe(data, background, exif_orientation).image


def decode_and_describe(data: bytes, background: str = "drop", exif_orientation: ExifOrientation = "ignore") -> Decoded:
    """Return the RGB image in `data` and what was found in its file.

    Grey is repeated, palettes are looked up, CMYK is converted without a profile, and 16-bit grey loses its lower byte.
    By default the rest is the published code's rule, which is Pillow's conversion.

    background: drop ignores transparency, so that the colours hidden under transparent pixels show (the published
        rule). A colour (white, black, or R,G,B) is drawn behind the image.
    exif_orientation: apply rotates the image as its EXIF block says. ignore leaves it (the published rule).

    Raises:
        ValueError: the image cannot be decoded to its end, has pixels whose range is not known, more pixels than
            Pillow accepts, or sides that differ more than a hundredfold.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_aspect(image)
        image.load()
        rotated = _orientation(image) not in (0, 1)
        if rotated and exif_orientation == "apply":
            image = ImageOps.exif_transpose(image)
        transparent = _is_transparent(image)
        colour = _colour(background)
        if transparent and colour is not None:
            behind = Image.new("RGBA", image.size, (*colour, 255))
            image = Image.alpha_composite(behind, image.convert("RGBA"))
        return Decoded(_rgb(image), transparent, rotated)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged files make decoders fail in many ways
        message = re.sub(r" object at 0x[0-9a-f]+", "", str(error))  # equal input gives an equal quarantine
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{kind}{message}") from error


def _check_aspect(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: one side is more than {MAX_ASPECT} times the other")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no known range of brightness: convert them to 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    if image.format != "TIFF" and not _METADATA & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  a damaged EXIF block says nothing, and the image can be decoded all the same
        return 1


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    alpha = image if "A" in image.getbands() else image.convert("RGBA")
    return min(alpha.getchannel("A").tobytes(), default=255) < 255


def _colour(background: str) -> tuple[int, int, int] | None:
    """Return red, green and blue of a background, or None for drop."""
    if background == "drop":
        return None
    try:
        numbers = re.fullmatch(r"(\d{1,3}),(\d{1,3}),(\d{1,3})", background)
        found = tuple(map(int, numbers.groups())) if numbers else ImageColor.getrgb(background)
    except ValueError:
        found = ()
    if len(found) != 3 or max(found) > 255:
        raise ValueError(
            f"--background {background} is no colour; accepted: drop, white, black, or R,G,B from 0 to 255"
        )
    return found[0], found[1], found[2]
