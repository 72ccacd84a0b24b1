"""Decode images: encoded bytes to RGB pixels."""

import io
import re
import warnings
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

# Pillow warns of unusual EXIF blocks and palettes. The image can be decoded, and the user can do nothing about it.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Only these decoders of Pillow may run. Others start programs (EPS), or their code is little used and little tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000")
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
)  # fmt: skip
_ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # metadata that may hold orientation
MAX_ASPECT = 100  # longer side / shorter side; the time for a crop grows with it

ExifOrientation = Literal["ignore", "apply"]


class Decoded(NamedTuple):
    """An RGB image, and properties of its file."""

    image: Image.Image
    transparent: bool  # some pixels are not opaque
    rotated: bool  # its EXIF orientation is not upright, whether or not the rotation was applied


def check_background(background: str) -> str:
    """Return `background` if it is valid: drop or a colour.

    Raises:
        ValueError: it is neither.
    """
    _parse_background(background)
    return background


def decode(data: bytes, background: str = "drop", exif_orientation: ExifOrientation = "ignore") -> Image.Image:
    """Return the RGB image in `data`; `decode_and_describe` describes the arguments and errors."""
    return decode_and_describe(data, background, exif_orientation).image


def decode_and_describe(data: bytes, background: str = "drop", exif_orientation: ExifOrientation = "ignore") -> Decoded:
    """Return the RGB image in `data` and properties of its file.

    Grey images are repeated over three channels, palettes are looked up, CMYK is converted without a profile, and
    16-bit grey images keep their upper byte. By default all of this is Pillow's conversion, as in the published code.

    background: drop ignores transparency, so that colours hidden under transparent pixels show, as in the published
        code. A colour (white, black, or R,G,B) is drawn behind the image.
    exif_orientation: apply rotates the image as its EXIF data say. ignore leaves it, as in the published code.

    Raises:
        ValueError: the image cannot be decoded completely, the range of its pixels is unknown, it has more pixels than
            Pillow accepts, or one side is more than a hundred times as long as the other.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_aspect(image)
        image.load()
        rotated = _orientation(image) not in (0, 1)
        if rotated and exif_orientation == "apply":
            image = ImageOps.exif_transpose(image)
        transparent = _is_transparent(image)
        colour = _parse_background(background)
        if transparent and colour is not None:
            backdrop = Image.new("RGBA", image.size, (*colour, 255))
            image = Image.alpha_composite(backdrop, image.convert("RGBA"))
        return Decoded(_to_rgb(image), transparent, rotated)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, the accepted formats") from error
    except Exception as error:  # damaged files make decoders fail in many ways
        # Remove memory addresses, so that equal files give equal messages and therefore equal shards.
        message = re.sub(r" object at 0x[0-9a-f]+", "", str(error))
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{kind}{message}") from error


def _check_aspect(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: one side is more than {MAX_ASPECT} times the other")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no known range: convert them to 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 0 to 8; 0 and 1 are upright."""
    if image.format != "TIFF" and not _ORIENTATION_KEYS & image.info.keys():
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - the image can be decoded although its EXIF data are damaged
        return 1


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    alpha = image if "A" in image.getbands() else image.convert("RGBA")
    return min(alpha.getchannel("A").tobytes(), default=255) < 255


def _parse_background(background: str) -> tuple[int, int, int] | None:
    """Return red, green and blue of a background, or None for drop; raise ValueError if it is neither."""
    if background == "drop":
        return None
    numbers = re.fullmatch(r"(\d{1,3}),(\d{1,3}),(\d{1,3})", background)
    try:
        colour = tuple(map(int, numbers.groups())) if numbers else ImageColor.getrgb(background)
    except ValueError:
        colour = ()
    if len(colour) != 3 or max(colour) > 255:
        raise ValueError(
            f"--background {background} is not a colour; accepted: drop, white, black, or R,G,B from 0 to 255"
        )
    return colour[0], colour[1], colour[2]
