"""Images as people have them: what a dataset is prepared from."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from orchestrator import storage

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Source:
    """Encoded images to prepare: their labels are at hand, their bytes are read on demand."""

    classes: tuple[str, ...]
    labels: dict[str, int]  # key -> label, in the order of the keys
    read: Callable[[str], bytes]


def digits_source() -> Source:
    """scikit-learn's 1,797 scanned digits as greyscale PNGs of 8x8 pixels, with the full range of grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    keys = [f"digit-{index:04d}" for index in range(len(digits.target))]
    pixels = dict(zip(keys, np.round(digits.images * (255 / 16)).astype(np.uint8), strict=True))

    def read(key: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels[key]).save(file, "PNG")
        return file.getvalue()

    labels = dict(zip(keys, map(int, digits.target), strict=True))
    return Source(tuple(map(str, digits.target_names)), labels, read)


def folder_source(uri: str) -> Source:
    """A tree <class>/<image>, classes in the order of their sorted names; a key is the path beneath `uri`.

    Raises:
        ValueError: there are no images, or some that lie in no class folder.
    """
    names = [name for name in storage.list_names(uri, recursive=True) if name.lower().endswith(IMAGE_ENDINGS)]
    if not names:
        raise ValueError(f"source={uri} holds no images ({', '.join(IMAGE_ENDINGS)})")
    if stray := [name for name in names if "/" not in name]:
        raise ValueError(f"source={uri}: {len(stray)} images lie in no class folder, {stray[0]} among them")
    classes = sorted({name.split("/", 1)[0] for name in names})
    number = {name: label for label, name in enumerate(classes)}
    labels = {name: number[name.split("/", 1)[0]] for name in names}
    return Source(tuple(classes), labels, lambda key: storage.read_bytes(storage.join(uri, key)))
