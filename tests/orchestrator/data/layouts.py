"""Write the same images in every layout that `prepare_dataset` reads."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from tests.orchestrator.data.test_images import encode

CLASSES = ("ant", "bee", "cat")


class Picture(NamedTuple):
    """One image, its class and its name without an ending."""

    cls: str
    name: str
    data: bytes


def pictures(per_class: int, classes: tuple[str, ...] = CLASSES, seed: int = 3) -> list[Picture]:
    """Return random colour PNGs of several sizes, sorted by class, named <class>_<number>."""
    rng = np.random.default_rng(seed)
    result = []
    for name in classes:
        for i in range(per_class):
            height, width = rng.integers(20, 40, 2)
            data = encode(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            result.append(Picture(name, f"{name}_{i:03d}", data))
    return result


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def targz(members: list[tuple[str, bytes]]) -> bytes:
    return gzip.compress(tar_bytes(members))


def write_tree(uri: str, images: list[Picture]) -> str:
    """Write files <class>/<image>.png."""
    for image in images:
        storage.write_bytes(f"{uri}/{image.cls}/{image.name}.png", image.data)
    return uri


def write_flat(uri: str, images: list[Picture]) -> str:
    """Write files <class>_<number>.png."""
    for image in images:
        storage.write_bytes(f"{uri}/{image.name}.png", image.data)
    return uri


def class_tars(images: list[Picture]) -> list[tuple[str, bytes]]:
    """Return the name and the bytes of one tar for each class."""
    return [
        (f"{cls}.tar", tar_bytes([(f"{i.name}.png", i.data) for i in images if i.cls == cls]))
        for cls in dict.fromkeys(image.cls for image in images)
    ]


def write_tar_of_tars(uri: str, images: list[Picture]) -> str:
    """Write one tar that contains a tar for each class, as ILSVRC2012's training images are published."""
    storage.write_bytes(f"{uri}.tar", tar_bytes(class_tars(images)))
    return f"{uri}.tar"


def write_class_tars(uri: str, images: list[Picture]) -> str:
    """Write a folder with one tar for each class."""
    for name, data in class_tars(images):
        storage.write_bytes(f"{uri}/{name}", data)
    return uri


def write_webdataset(uri: str, images: list[Picture], label: str = "cls", per_tar: int = 100) -> str:
    """Write WebDataset tars, with an image and a label file (`cls` or `json`) for each sample."""
    for begin in range(0, len(images), per_tar):
        members = []
        for image in images[begin : begin + per_tar]:
            number = CLASSES.index(image.cls)
            text = str(number) if label == "cls" else json.dumps({"label": number, "name": image.cls})
            members += [(f"{image.name}.png", image.data), (f"{image.name}.{label}", text.encode())]
        storage.write_bytes(f"{uri}/train-{begin // per_tar:04d}.tar", tar_bytes(members))
    return uri


def write_labelled(uri: str, images: list[Picture]) -> str:
    """Write files with numbers as names, and a CSV of their labels beside the folder."""
    for i, image in enumerate(images):
        storage.write_bytes(f"{uri}/{i:05d}.png", image.data)
    rows = [f"{i:05d}.png,{image.cls}\n" for i, image in enumerate(images)]
    storage.write_bytes(f"{uri}.csv", ("key,label\n" + "".join(rows)).encode())
    return uri


def write_parquet(
    uri: str,
    images: list[Picture],
    rows: int = 32,
    file: str = "train-00000-of-00001.parquet",
    classes: tuple[str, ...] = (),
    label: Callable[[Picture], int] = lambda image: CLASSES.index(image.cls),
) -> str:
    """Write a Parquet file in the public ImageNet layout; `classes` are stored as the Hugging Face library does."""
    values = [{"bytes": image.data, "path": f"{image.name}.png"} for image in images]
    table = pa.table({"image": values, "label": pa.array([label(image) for image in images], pa.int64())})
    if classes:
        features = {"label": {"names": list(classes), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with storage.open_output(f"{uri}/data/{file}") as out:
        pq.write_table(table, out, row_group_size=rows)
    return uri


def cifar10_archive(per_batch: int, seed: int = 0) -> tuple[bytes, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return a small archive of CIFAR-10's binary version, and its images [n, 32, 32, 3] and labels by batch."""
    rng = np.random.default_rng(seed)
    batches, members = {}, []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images = rng.integers(0, 256, (per_batch, 32, 32, 3), dtype=np.uint8)
        labels = rng.permutation(per_batch).astype(np.uint8) % 10
        planes = images.transpose(0, 3, 1, 2).reshape(per_batch, -1)
        members.append((f"cifar-10-batches-bin/{name}.bin", np.concatenate([labels[:, None], planes], 1).tobytes()))
        batches[name] = images, labels
    names = "airplane automobile bird cat deer dog frog horse ship truck".replace(" ", "\n")
    members.append(("cifar-10-batches-bin/batches.meta.txt", (names + "\n\n").encode()))
    return targz(members), batches
