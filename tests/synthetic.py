"""Synthetic photographs: JPEGs with ImageNet's sizes in bytes and pixels, and datasets of them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestrator import storage
from orchestrator.data.dataset import SCHEMA, Manifest, Shard

# Most images of ImageNet are 500 pixels wide or high; a fifth have other sizes, up to several megapixels.
_SHAPES = [(500, 375), (375, 500), (500, 333), (333, 500)]
_SHARES = [0.48, 0.14, 0.12, 0.06]
_LARGEST = 2000  # pixels of a side


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """Return JPEGs that are crops of a fractal cloud: about 110 KB on average, half of them 500 x 375 pixels."""
    rng = np.random.default_rng(seed)
    cloud = _cloud(rng)
    return [_photograph(rng, cloud) for _ in range(count)]


def _photograph(rng: np.random.Generator, cloud: np.ndarray) -> bytes:
    choice = int(rng.choice(len(_SHAPES) + 1, p=[*_SHARES, 1 - sum(_SHARES)]))
    if choice < len(_SHAPES):
        width, height = _SHAPES[choice]
    else:
        longer = float(np.clip(np.exp(rng.normal(np.log(520), 0.6)), 100, _LARGEST))
        sides = [int(longer), int(longer / rng.uniform(1, 1.6))]
        width, height = sides if rng.random() < 0.7 else sides[::-1]
    top, left = rng.integers(0, _LARGEST - height + 1), rng.integers(0, _LARGEST - width + 1)
    pixels = cloud[top : top + height, left : left + width].astype(np.float32)
    pixels += rng.standard_normal((height, width, 1), np.float32) * rng.lognormal(2.1, 0.6)  # grain
    file = io.BytesIO()
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(88, 97)))
    return file.getvalue()


def _cloud(rng: np.random.Generator) -> np.ndarray:
    """Return uint8 [_LARGEST, _LARGEST, 3] with the 1/f spectrum of photographs."""
    octaves = np.zeros((_LARGEST, _LARGEST), np.float32)
    tints = np.zeros((_LARGEST, _LARGEST, 3), np.float32)
    for cells in (6, 12, 24, 48, 96, 192, 384, 768, 1500):
        noise = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
        octaves += np.asarray(noise.resize((_LARGEST, _LARGEST), Image.Resampling.BILINEAR)) * (6 / cells) ** 0.5
    for channel in range(3):
        noise = Image.fromarray(rng.standard_normal((40, 40), np.float32))
        tints[..., channel] = np.asarray(noise.resize((_LARGEST, _LARGEST), Image.Resampling.BICUBIC))
    return np.clip(128 + 40 * octaves[..., None] + 20 * tints, 0, 255).astype(np.uint8)


def write_dataset(
    folder: str, images: list[bytes], sizes: list[tuple[int, int]], rows: int, row_group: int = 64, classes: int = 10
) -> Manifest:
    """Write a prepared dataset of `rows` rows in shards of eight equal row groups, which repeats the images."""
    if rows % row_group:
        raise ValueError(f"rows={rows} is not a multiple of row_group={row_group}")
    groups = [range(start, start + row_group) for start in range(0, rows, row_group)]
    shards: list[Shard] = []
    for first in range(0, len(groups), 8):
        path = f"train-{len(shards):05d}.parquet"
        file = io.BytesIO()
        with pq.ParquetWriter(file, SCHEMA, compression="none") as writer:
            for group in groups[first : first + 8]:
                numbers = [row % len(images) for row in group]
                columns = [
                    [f"{row:08d}" for row in group],
                    [row % classes for row in group],
                    [images[i] for i in numbers],
                    [sizes[i][0] for i in numbers],
                    [sizes[i][1] for i in numbers],
                ]
                writer.write_table(pa.table(columns, schema=SCHEMA))
        storage.write_bytes(storage.join(folder, path), file.getvalue())
        counts = tuple(map(len, groups[first : first + 8]))
        shards.append(Shard(path=path, bytes=file.tell(), rows=sum(counts), row_groups=counts))
    manifest = Manifest(
        name="synthetic",
        classes=tuple(f"class {i}" for i in range(classes)),
        splits={"train": tuple(shards)},
        width=(min(width for width, _ in sizes), max(width for width, _ in sizes)),
        height=(min(height for _, height in sizes), max(height for _, height in sizes)),
        quarantined=0,
        folder=storage.resolve(folder),
    )
    storage.write_json(storage.join(folder, "manifest.json"), manifest.model_dump(mode="json"))
    return manifest


def sizes_of(images: list[bytes]) -> list[tuple[int, int]]:
    """Return the width and the height of each image."""
    return [Image.open(io.BytesIO(data)).size for data in images]
