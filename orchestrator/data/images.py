"""One image: encoded bytes -> RGB pixels."""

import io
import struct
import warnings
import zlib

from PIL import Image

# Odd EXIF blocks and palettes: the image decodes all the same, and a user can do nothing about it.
warnings.filterwarnings("ignore", module=r"PIL\.")

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # of files that are taken for images


def decode(data: bytes) -> Image.Image:
    """Encoded bytes -> RGB image, by the published code's rule: Pillow's conversion.

    Grey is repeated, palettes are looked up, CMYK is converted without a profile, alpha is dropped, the EXIF
    orientation is not applied.

    Raises:
        ValueError: they cannot be decoded to the end.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"more pixels than Pillow takes: {error}") from error
