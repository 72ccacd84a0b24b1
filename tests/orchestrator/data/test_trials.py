"""Layouts of users: each is read correctly, or refused with the option that decides how to read it (promise P15)."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import storage
from orchestrator.data.config import PrepareConfig
from orchestrator.data.images import decode
from orchestrator.data.job import plan, prepare
from tests.orchestrator.data.layouts import tar_bytes, targz
from tests.orchestrator.data.test_images import encode
from tests.orchestrator.digits import table

WNIDS = ("n01443537", "n01629819", "n02017213")


def picture(number: int, size: int = 12) -> bytes:
    return encode(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


class Pictures:
    """Returns a different picture in every call."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bytes:
        self.number += 1
        return picture(self.number)


def folders(new: Pictures, names: list[str], per: int, ending: str = ".png", pattern: str = "{i}") -> dict[str, bytes]:
    return {f"{name}/{pattern.format(i=i, name=name)}{ending}": new() for name in names for i in range(per)}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------- the inputs


def tiny_imagenet() -> dict[str, bytes]:
    new = Pictures()
    files = {f"train/{w}/images/{w}_{i}.JPEG": new() for w in WNIDS for i in range(4)}
    files |= {f"train/{w}/{w}_boxes.txt": b"0 0 1 1\n" for w in WNIDS}
    files |= {f"val/images/val_{i}.JPEG": new() for i in range(6)}
    rows = "".join(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62\n" for i in range(6))
    files |= {f"test/images/test_{i}.JPEG": new() for i in range(5)}
    return files | {
        "val/val_annotations.txt": rows.encode(), "wnids.txt": "\n".join(WNIDS).encode(),
        "words.txt": b"n01443537\tgoldfish\n",
    }  # fmt: skip


def kaggle() -> dict[str, bytes]:
    new = Pictures()
    base = "ILSVRC/Data/CLS-LOC"
    files = {f"{base}/train/{w}/{w}_{i}.JPEG": new() for w in WNIDS for i in range(4)}
    files |= {f"{base}/val/ILSVRC2012_val_{i:08d}.JPEG": new() for i in range(1, 7)}
    files |= {f"{base}/test/ILSVRC2012_test_{i:08d}.JPEG": new() for i in range(1, 4)}
    files |= {f"ILSVRC/Annotations/CLS-LOC/train/{w}/{w}_0.xml": b"<x/>" for w in WNIDS}
    val = "".join(f"ILSVRC2012_val_{i:08d},{WNIDS[i % 3]} 85 1 499 272 {WNIDS[0]} 1 2 3 4\n" for i in range(6, 0, -1))
    train = "".join(f"{w}_{i},{w} 1 2 3 4\n" for w in WNIDS for i in range(4))
    head = "ImageId,PredictionString\n"
    return files | {
        "LOC_val_solution.csv": (head + val).encode(), "LOC_train_solution.csv": (head + train).encode(),
        "LOC_synset_mapping.txt": b"n01443537 goldfish, Carassius auratus\n", "LOC_sample_submission.csv": b"ImageId\n",
    }  # fmt: skip


def edm(labels: bool = True) -> dict[str, bytes]:
    new = Pictures()
    files = {f"{i // 5:05d}/img{i:08d}.png": new() for i in range(15)}
    pairs = [[name, i % 3 + 5] for i, name in enumerate(files)]
    files["dataset.json"] = json.dumps({"labels": pairs if labels else None}).encode()
    return files


def imagenet_val(truth: str) -> dict[str, bytes]:
    new = Pictures()
    files = {f"ILSVRC2012_val_{i:08d}.JPEG": new() for i in range(1, 11)}
    if truth == "ground truth":
        return files | {
            "ILSVRC2012_validation_ground_truth.txt": b"490\n361\n171\n822\n297\n490\n361\n171\n822\n1000\n"
        }
    rows = "".join(f"ILSVRC2012_val_{i:08d},{WNIDS[i % 3]} 1 2 3 4\n" for i in range(1, 11))
    return files | {"LOC_val_solution.csv": f"ImageId,PredictionString\n{rows}".encode()}


def val_tar() -> dict[str, bytes]:
    files = imagenet_val("ground truth")
    truth = files.pop("ILSVRC2012_validation_ground_truth.txt")
    return {
        "ILSVRC2012_img_val.tar": tar_bytes(list(files.items())), "ILSVRC2012_validation_ground_truth.txt": truth
    }  # fmt: skip


def cifar100(root: str) -> dict[str, bytes]:
    rng, files = np.random.default_rng(0), {}
    for name, count in (("train", 200), ("test", 100)):
        fine = np.arange(count, dtype=np.uint8) % 100
        records = np.concatenate(
            [np.stack([fine // 5, fine], 1), rng.integers(0, 256, (count, 3072), dtype=np.uint8)], 1
        )
        files[f"{root}{name}.bin"] = records.tobytes()
    names = "\n".join(["apple", "train", *(f"fine{i}" for i in range(98))])
    return files | {f"{root}fine_label_names.txt": names.encode(), f"{root}coarse_label_names.txt": b"a\nb\n"}


def downsampled(side: int, savez: Callable[..., None]) -> dict[str, bytes]:
    rng, files = np.random.default_rng(0), {}
    for name, count in (("train_part1", 12), ("train_part2", 9), ("val", 6)):
        file = io.BytesIO()
        labels = np.arange(count) % 3 + 1
        data = rng.integers(0, 256, (count, 3 * side**2), dtype=np.uint8)
        savez(file, data=data, labels=labels, mean=np.zeros(3 * side**2))
        files[f"Imagenet{side}_{name}.npz"] = file.getvalue()
    return files


def parquet(columns: dict[str, Any], metadata: dict[str, Any] | None = None) -> bytes:
    file = io.BytesIO()
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    pq.write_table(table, file, row_group_size=8)
    return file.getvalue()


def encoded(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": picture(first + i), "path": f"{i}.png"} for i in range(count)]


def svhn() -> dict[str, bytes]:
    sizes = (("train", 20), ("test", 10), ("extra", 30))
    return {
        f"data/{name}-00000-of-00001.parquet": parquet(
            {"image": encoded(count, 100 * i), "label": [j % 10 for j in range(count)]}
        )
        for i, (name, count) in enumerate(sizes)
    }


def webdataset(label: Callable[[int], dict[str, Any]], shard: str = "train-{:04d}.tar") -> dict[str, bytes]:
    new = Pictures()
    members = [
        [(f"{s:02d}{i:02d}.{end}", data) for i in range(6) for end, data in (
            ("jpg", new()), ("json", json.dumps(label(i)).encode()), ("txt", b"a caption"))]
        for s in range(2)
    ]  # fmt: skip
    return {shard.format(s): tar_bytes(samples) for s, samples in enumerate(members)}


def labelled(text: bytes, name: str = "map.txt", count: int = 6) -> dict[str, bytes]:
    return {f"pictures/{i:03d}.png": picture(i) for i in range(count)} | {name: text}


def rows(separator: str, header: str = "", labels: tuple[str, ...] = ("cat", "dog")) -> bytes:
    lines = [f"{i:03d}.png{separator}{labels[i % len(labels)]}" for i in range(6)]
    return ("\n".join([header, *lines] if header else lines) + "\n").encode()


class Trial(NamedTuple):
    """Files, options, and the expected result: the number of images by split and class, or a part of the error."""

    files: dict[str, bytes]
    expected: dict[str, dict[str, int]] | str
    options: dict[str, Any] = {}  # noqa: RUF012
    source: str = ""  # within the files' folder


def even(names: Sequence[str], count: int) -> dict[str, int]:
    """Return the expected numbers of images if every class has `count`."""
    return dict.fromkeys(names, count)


PETS = ["cat", "dog"]
DOWNSAMPLED = list(downsampled(8, np.savez).values())
HARD = {
    f"data/{name}-00000.parquet": parquet({"image": encoded(8, 8 * i), "label": [j % 2 for j in range(8)]})
    for i, name in enumerate(("train", "test_hard"))
}
NEW = Pictures()
SPLITS = folders(NEW, ["train/cat", "train/dog"], 5) | folders(NEW, ["val/cat", "val/dog"], 2)
FLAT_SPLITS = folders(NEW, ["train_32x32", "valid_32x32"], 4)
FFHQ = {f"images1024x1024/{i // 4 * 1000:05d}/{i // 4 * 1000 + i % 4:05d}.png": NEW() for i in range(12)}
TWO_LABELS = {"img": encoded(12), "fine_label": [i % 4 for i in range(12)], "coarse_label": [i % 2 for i in range(12)]}
TWO_IMAGES = {"photo": [picture(i) for i in range(8)], "thumb": [b"x"] * 8, "y": [i % 2 for i in range(8)]}
RECORDS = [{"file_name": f"{i:03d}.png", "label": PETS[i % 2]} for i in range(6)]
TINY = {"train": even(WNIDS, 4), "validation": even(WNIDS, 2)}
EDM = {"train": {"0": 0} | {str(i): 5 for i in (5, 6, 7)}}
ILSVRC_IDS = {"train": {"490": 2, "361": 2, "171": 2, "822": 2, "297": 1, "1000": 1}}
SUSPICIOUS_NUMBERS = "look like numbered folders.*00000.*--layout unlabelled"

TRIALS: dict[str, Trial] = {
    "tiny-imagenet": Trial(tiny_imagenet(), TINY),
    "tiny-imagenet in its zip": Trial({"t.zip": zipped({f"tiny/{k}": v for k, v in tiny_imagenet().items()})}, TINY),
    "tiny-imagenet in a stored zip, named": Trial(
        {"t.zip": zipped({f"tiny/{k}": v for k, v in tiny_imagenet().items()}, zipfile.ZIP_STORED)}, TINY, {}, "t.zip"
    ),
    "kaggle": Trial(kaggle(), TINY),
    "kaggle from ILSVRC": Trial(kaggle(), TINY, {}, "ILSVRC"),
    "kaggle from Data": Trial(kaggle(), TINY, {}, "ILSVRC/Data"),
    "kaggle from CLS-LOC": Trial(kaggle(), TINY, {}, "ILSVRC/Data/CLS-LOC"),
    "kaggle, the validation images": Trial(kaggle(), {"train": even(WNIDS, 2)}, {}, "ILSVRC/Data/CLS-LOC/val"),
    "kaggle, the training images": Trial(kaggle(), {"train": even(WNIDS, 4)}, {}, "ILSVRC/Data/CLS-LOC/train"),
    "validation images with ground truth": Trial(imagenet_val("ground truth"), ILSVRC_IDS),
    "validation images with solutions": Trial(
        imagenet_val("csv"), {"train": {"n01443537": 3, "n01629819": 4, "n02017213": 3}}
    ),
    "validation tar with ground truth": Trial(val_tar(), ILSVRC_IDS),
    "ground truth named": Trial(
        imagenet_val("ground truth"), ILSVRC_IDS, {"labels": "ILSVRC2012_validation_ground_truth.txt"}
    ),
    "ground truth that is too short": Trial(
        labelled(b"1\n2\n"), "has 2 numbers, but there are 6 images", {"labels": "map.txt"}
    ),
    "edm folder of few classes": Trial(edm(), "most class numbers have no images: 0, 1, 2"),
    "edm folder": Trial(edm(), EDM, {"accept_classes": True}),
    "edm zip": Trial({"edm.zip": zipped(edm())}, EDM, {"accept_classes": True}, "edm.zip"),
    "edm zip, stored": Trial({"e.zip": zipped(edm(), zipfile.ZIP_STORED)}, EDM, {"accept_classes": True}, "e.zip"),
    "edm folder, labels null": Trial(edm(False), {"train": {"": 15}}),
    "edm without its json": Trial({k: v for k, v in edm().items() if k[0] == "0"}, SUSPICIOUS_NUMBERS),
    "ffhq": Trial(FFHQ, SUSPICIOUS_NUMBERS),
    "ffhq, unlabelled": Trial(FFHQ, {"train": {"": 12}}, {"layout": "unlabelled"}),
    "a class that training lacks": Trial(SPLITS | folders(NEW, ["val/dgo"], 2), "training split lacks: dgo"),
    "a stray image beside splits": Trial(SPLITS | {"a.png": NEW()}, "1 images lie beside class folders.*a.png"),
    "a stray folder beside splits": Trial(
        SPLITS | folders(NEW, ["extra/cat"], 3), "look like splits.*(extra|train).*--split"
    ),
    "a stray folder, with its option": Trial(
        SPLITS | folders(NEW, ["extra/cat"], 3), {"train": {"cat": 8, "dog": 5}, "validation": even(PETS, 2)},
        {"split": "extra=train"},
    ),
    "a stray folder, left out": Trial(
        SPLITS | folders(NEW, ["extra/cat"], 3), {"train": even(PETS, 5), "validation": even(PETS, 2)},
        {"split": "extra=out"},
    ),
    "an option that names no folder": Trial(
        SPLITS, "--split vla=out: vla names no images", {"split": "vla=out"}
    ),
    "training images without labels": Trial(
        {f"train/{i}.png": NEW() for i in range(4)}
        | {f"val/{i}.png": NEW() for i in range(6)}
        | {"val/val_annotations.txt": "".join(f"{i}.png\t{PETS[i % 2]}\t0\n" for i in range(6)).encode()},
        "all training images or most images have no label: train/0.png.*--accept-classes",
    ),
    "flat names that begin with an underscore": Trial(
        {f"{name}_{i}.png": NEW() for name in ("", "a") for i in range(4)}, "4 images have no class.*_0.png"
    ),
    "splits within a wrapping folder": Trial(
        {f"my set/v2/{k}": v for k, v in SPLITS.items()}, {"train": even(PETS, 5), "validation": even(PETS, 2)}
    ),
    "splits beneath classes": Trial(
        folders(NEW, ["cat/train", "dog/train"], 4) | folders(NEW, ["cat/test", "dog/test"], 2),
        {"train": even(PETS, 4), "test": even(PETS, 2)},
    ),
    "splits beneath some classes": Trial(
        folders(NEW, ["cat/train", "cat/test", "dog/all"], 4), "look like splits.*(test|train)"
    ),
    "downsampled PNGs in split folders": Trial(FLAT_SPLITS, "8 images have no class.*--layout unlabelled"),
    "downsampled PNGs in split folders, unlabelled": Trial(
        FLAT_SPLITS, {"train": {"": 4}, "validation": {"": 4}}, {"layout": "unlabelled"}
    ),
    "one class": Trial(folders(NEW, ["train/cat"], 9), "one class: cat.*--accept-classes"),
    "one class, accepted": Trial(folders(NEW, ["train/cat"], 9), {"train": {"cat": 9}}, {"accept_classes": True}),
    "flat names that are no classes": Trial(
        {f"IMG_{i:04d}.jpg": NEW() for i in range(8)}, "one class: IMG.*--layout unlabelled"
    ),
    "flat names of several words": Trial(
        {f"{name}_{i}.jpg": NEW() for name in ("american_bulldog", "american_pit_bull", "beagle") for i in range(5)},
        "before the first _.*american_bulldog",
    ),
    "flat names with numbers": Trial(
        {f"{name}_img_{i}.jpg": NEW() for name in PETS for i in range(5)}, {"train": even(PETS, 5)}
    ),
    "flat names within class folders, with its option": Trial(
        {f"{folder}/{name}_{i}.jpg": NEW() for folder in "ab" for name in PETS for i in range(3)},
        {"train": even(PETS, 6)}, {"layout": "flat"},
    ),
    "class folders that are none, with its option": Trial(
        {f"{i}.png": NEW() for i in range(4)}, "no class folders", {"layout": "folder"}
    ),
    "a class called images": Trial(folders(NEW, ["cat", "pictures2", "masks"], 4), "names of classes: masks.*--labels"),
    "folders of kinds of images": Trial(
        folders(NEW, ["pets/cat", "pets/dog", "wild/fox"], 4), "further folders.*pets/cat"
    ),
    "names that differ in case": Trial(folders(NEW, ["cat", "dog", "Cat "], 4), "case or spaces: cat"),
    "a class for every image": Trial({f"{i:03d}_a.png": NEW() for i in range(20)}, "(numbered|one image)"),
    "hidden folders and copies of systems": Trial(
        folders(NEW, ["cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat", "dog/@eaDir"], 4), {"train": even(PETS, 4)}
    ),
    "a label file that is not used": Trial(
        folders(NEW, ["a0", "a1"], 4) | {"labels.csv": b"image,label\n0.png,fox\n"},
        "labels.csv .*--labels",
    ),
    "annotations that agree with folders": Trial(
        folders(NEW, ["val/cat", "val/dog"], 4) | {"val/val_annotations.txt": b"0.png\tcat\t1\n1.png\tdog\t1\n"},
        {"validation": even(PETS, 4)},
    ),
    "an archive beside images": Trial(
        folders(NEW, ["cat", "dog"], 4) | {"backup.zip": zipped({"cat/x.png": NEW()})}, {"train": even(PETS, 4)}
    ),
    "endings of all kinds": Trial(
        folders(NEW, ["cat"], 4, ".JPE") | folders(NEW, ["dog"], 4, ".jfif") | folders(NEW, ["fox"], 3, ".heic"),
        {"train": even(PETS, 4)},
    ),
    "svhn": Trial(svhn(), "look like splits.*extra.*--split"),
    "svhn, with its option": Trial(
        svhn(), {"train": {str(i): 5 for i in range(10)}, "test": {str(i): 1 for i in range(10)}},
        {"split": "extra=train", "copy_parquet": True},
    ),
    "svhn, one split left out": Trial(
        svhn(), {"train": {str(i): 2 for i in range(10)}, "test": {str(i): 1 for i in range(10)}},
        {"split": "extra=out", "copy_parquet": True},
    ),
    "parquet of more classes in the files that are left out": Trial(
        HARD | {"data/extra.parquet": parquet({"image": encoded(8), "label": list(range(8))})},
        {"train": even("01", 4), "test": even("01", 4)}, {"split": "extra=out", "copy_parquet": True},
    ),
    "parquet, an option of two words": Trial(
        HARD, {"train": even("01", 4)}, {"split": "test_hard=out", "copy_parquet": True}
    ),
    "parquet, an option that names no file": Trial(HARD, "extra names no images", {"split": "extra=out"}),
    "parquet, one file without rows": Trial(
        HARD | {"data/train-00001.parquet": parquet({
            "image": pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array([], pa.int64())})},
        {"train": even("01", 4), "test": even("01", 4)}, {"copy_parquet": True},
    ),
    "parquet of cifar10": Trial(
        {"train.parquet": parquet({"img": encoded(12), "label": [i % 3 for i in range(12)]},
                                  {"label": {"names": ["ant", "bee", "cow"]}})},
        {"train": even(("ant", "bee", "cow"), 4)}, {"copy_parquet": True},
    ),
    "parquet of cifar100": Trial(
        {"a.parquet": parquet(TWO_LABELS)}, {"train": {str(i): 3 for i in range(4)}}, {"copy_parquet": True}
    ),
    "parquet, the coarse labels": Trial(
        {"a.parquet": parquet(TWO_LABELS)}, {"train": {"0": 6, "1": 6}},
        {"copy_parquet": True, "label_column": "coarse_label"},
    ),
    "parquet of faces": Trial(
        {"a.parquet": parquet({"image": encoded(9)})}, {"train": {"": 9}}, {"copy_parquet": True}
    ),
    "parquet of names and of numbers": Trial(
        HARD | {"data/train-1.parquet": parquet({"image": encoded(8), "label": PETS * 4})},
        "some files have class names and others numbers", {"accept_classes": True},
    ),
    "parquet of a name that its metadata lack": Trial(
        {"train.parquet": parquet({"image": encoded(8), "label": PETS * 4}, {"label": {"names": ["cat", "cow"]}})},
        "dog is not one of the classes", {"copy_parquet": True},
    ),
    "parquet of plain bytes and names": Trial(
        {"a.parquet": parquet({"image": [picture(i) for i in range(8)], "label": [PETS[i % 2] for i in range(8)]})},
        {"train": even(PETS, 4)}, {"copy_parquet": True},
    ),
    "parquet of another column": Trial(
        {"a.parquet": parquet(TWO_IMAGES)}, "several of its columns.*photo.*thumb.*--image-column",
    ),
    "parquet of another column, with its option": Trial(
        {"a.parquet": parquet(TWO_IMAGES)}, {"train": {"0": 4, "1": 4}},
        {"copy_parquet": True, "image_column": "photo", "label_column": "y"},
    ),
    "parquet of paths": Trial(
        {"a.parquet": parquet({"image": [{"path": "1.png"}] * 4, "label": [0, 1, 0, 1]})}, "a.parquet: .*paths.*bytes"
    ),
    "parquet of empty bytes": Trial(
        {"a.parquet": parquet({"image": pa.array([{"path": "1.png", "bytes": None}] * 4, pa.struct(
            [("bytes", pa.binary()), ("path", pa.string())])), "label": [0, 1, 0, 1]})}, "a.parquet: .*paths.*bytes"
    ),
    "webdataset without a label": Trial(
        webdataset(lambda i: {"class_id": i}), "no sample has a label.*class_id.*--label-column"
    ),
    "webdataset, with its label option": Trial(
        webdataset(lambda i: {"class_id": i % 2}), {"train": {"0": 6, "1": 6}}, {"label_column": "class_id"}
    ),
    "webdataset with numbers beside the names of splits": Trial(
        {f"{split}{i}.tar": list(webdataset(lambda i: {"label": i % 2}).values())[i]
         for i, split in enumerate(("train", "val"))},
        {"train": even("01", 3), "validation": even("01", 3)},
    ),
    "webdataset of which the first tar has no labels": Trial(
        webdataset(lambda i: {"label": PETS[i % 2]}) | {"test.tar": tar_bytes([("00.jpg", NEW()), ("01.jpg", NEW())])},
        {"train": even(PETS, 6)},
    ),
    "webdataset, with its label option beside other labels": Trial(
        {"train.tar": tar_bytes([(f"{i}.{ending}", data) for i in range(6) for ending, data in (
            ("png", NEW()), ("cls", b"%d" % i), ("json", b'{"pet": %d}' % (i % 2)))])},
        {"train": even("01", 3)}, {"label_column": "pet"},
    ),
    "class folders with an option of parquet": Trial(
        SPLITS, "--label-column pet: only Parquet", {"label_column": "pet"}
    ),
    "map with an option of parquet": Trial(
        labelled(rows(",", "key,pet")), "--label-column pet: only Parquet.*label map",
        {"labels": "map.txt", "label_column": "pet"},
    ),
    "cifar-100 with an option of parquet": Trial(
        cifar100(""), "--label-column coarse: only Parquet", {"label_column": "coarse"}
    ),
    "tar of names in Latin-1": Trial(
        {"a.tar": tar_bytes([(f"{name}/{i}.png", NEW()) for name in ("r\udce9", "the") for i in range(4)])},
        {"train": even(("ré", "the"), 4)},
    ),
    "file names that are not UTF-8": Trial(
        folders(NEW, ["cat", "r\udce9"], 4), r"the file name 'r\\udce9/\d.png' is not UTF-8; rename it"
    ),
    "webdataset of some samples without a label": Trial(
        {f"{name}.tar": tar_bytes([(f"{i}.{ending}", data) for i in range(6) for ending, data in (
            ("png", NEW()), (kind, labels[i % 3]))]) for name, kind, labels in (
                ("train", "cls", (b"cat", b"", b"dog")),
                ("test", "cls", (b"-1",) * 3),
                ("val", "json", (b'{"label": null}',) * 3))},
        {"train": even(PETS, 2)},
    ),
    "a tar behind a tar": Trial(
        {"a.tar": tar_bytes(list(folders(NEW, PETS, 2).items())) + tar_bytes(list(folders(NEW, ["fox"], 2).items()))},
        "a.tar is truncated.*another tar follows.*--ignore-zeros",
    ),
    "webdataset of names": Trial(webdataset(lambda i: {"label": PETS[i % 2]}), {"train": even(PETS, 6)}),
    "webdataset of floats": Trial(webdataset(lambda i: {"label": i / 2}), "label 0.5; accepted: an integer or a name"),
    "webdataset with a label map": Trial(
        webdataset(lambda i: {}) | {"map.csv": b"key,label\n" + b"".join(
            f"{s:02d}{i:02d},{PETS[i % 2]}\n".encode() for s in range(2) for i in range(6))},
        {"train": even(PETS, 6)}, {"labels": "map.csv"},
    ),
    "map of tabs": Trial(labelled(rows("\t")), {"train": even(PETS, 3)}, {"labels": "map.txt"}),
    "map of semicolons": Trial(labelled(rows(";", "file;class")), {"train": even(PETS, 3)}, {"labels": "map.txt"}),
    "map of spaces": Trial(labelled(rows(" ")), {"train": even(PETS, 3)}, {"labels": "map.txt"}),
    "map in Latin-1": Trial(
        labelled(rows(",", "key,label", ("chât", "chien")).decode().encode("latin-1")),
        {"train": even(("chien", "chât"), 3)}, {"labels": "map.txt"},
    ),
    "map without endings": Trial(
        labelled(rows(",", "id,label").replace(b".png", b"")), {"train": even(PETS, 3)}, {"labels": "map.txt"}
    ),
    "map of whole floats": Trial(
        labelled(rows(",", "key,label", ("0.0", "1.0"))), {"train": {"0": 3, "1": 3}}, {"labels": "map.txt"}
    ),
    "map of floats": Trial(
        labelled(rows(",", "key,label", ("0.5", "1.0"))), "map.txt: 000.png has the label 0.5", {"labels": "map.txt"}
    ),
    "map of huge numbers": Trial(
        labelled(rows(",", "key,label", ("3", "300000000"))), "labels are 3 to 300000000.*large gaps",
        {"labels": "map.txt"},
    ),
    "map of numbers from 1": Trial(
        labelled(rows(",", "key,label", ("1", "2"))), {"train": {"0": 0, "1": 3, "2": 3}}, {"labels": "map.txt"}
    ),
    "map of JSON lines": Trial(
        labelled("\n".join(map(json.dumps, RECORDS)).encode(), "metadata.jsonl"),
        {"train": even(PETS, 3)}, {"labels": "metadata.jsonl"},
    ),
    "map for a tar": Trial(
        {"val.tar": tar_bytes([(f"./{i:03d}.png", NEW()) for i in range(6)]),
         "map.json": json.dumps({"labels": [[f"{i:03d}.png", i % 2] for i in range(6)]}).encode()},
        {"train": {"0": 3, "1": 3}}, {"labels": "map.json"}, "val.tar",
    ),
    "map of a file name that several images share": Trial(
        folders(NEW, ["a", "b"], 2) | {"map.csv": b"key,label\n0.png,0\n1.png,1\n"},
        "has the name 0.png, but a/0.png and b/0.png", {"labels": "map.csv"},
    ),
    "map of a file name that images in and above a folder share": Trial(
        folders(NEW, ["b"], 2) | {"0.png": NEW(), "map.csv": b"key,label\n0.png,0\n1.png,1\n"},
        "has the name 0.png, but 0.png and b/0.png", {"labels": "map.csv"},
    ),
    "map of a path that two images have": Trial(
        {"a/0.png": NEW(), "a/0.jpg": NEW(), "map.csv": b"key,label\na/0,0\n"},
        "has the name a/0, but", {"labels": "map.csv"},
    ),
    "map of other images": Trial(
        labelled(b"key,label\nother/000.png,0\nother/001.png,1\n"), "names none of the images.*other/000.png.*pictures",
        {"labels": "map.txt"},
    ),
    "map with an open quotation mark": Trial(
        labelled(rows(",", "key,label", ('"cat', "dog"))), "map.txt has invalid quotation marks", {"labels": "map.txt"}
    ),
    "a label file with an open quotation mark": Trial(
        folders(NEW, PETS, 4) | {"labels.csv": b'image,label\n0.png,"' + b"x" * 200_000},
        "labels.csv may contain labels",
    ),
    "map of numbers in order, for numbers as names": Trial(
        {f"{i}.png": NEW() for i in range(12)} | {"map.txt": b"0\n1\n" * 6}, "11.png precedes 2.png",
        {"labels": "map.txt"},
    ),
    "map of numbers in order, for padded names": Trial(
        {f"a{i:02d}.png": NEW() for i in range(12)} | {"b1.png": NEW(), "map.txt": b"0\n1\n" * 6 + b"1\n"},
        {"train": {"0": 6, "1": 7}}, {"labels": "map.txt"},
    ),
    "map of paths": Trial(
        folders(NEW, ["a", "b"], 1) | {"map.csv": b"key,label\na/0.png,0\nb/0.png,1\n"},
        {"train": {"0": 1, "1": 1}}, {"labels": "map.csv"},
    ),
    "map of few": Trial(labelled(rows(","), count=20), "most images have no label", {"labels": "map.txt"}),
    "cifar-100 archive": Trial(
        {"cifar-100-binary.tar.gz": targz(list(cifar100("cifar-100-binary/").items()))},
        {"train": {"apple": 2, "train": 2, "fine97": 2}, "test": {"apple": 1, "train": 1}},
    ),
    "cifar-100 unpacked": Trial(
        cifar100("cifar-100-binary/"), {"train": {"apple": 2, "train": 2, "fine97": 2}, "test": {"apple": 1}}
    ),
    "cifar-10 and cifar-100 unpacked": Trial(
        cifar100("cifar-100-binary/") | {"cifar-10-batches-bin/data_batch_1.bin": bytes([3]) + bytes(3072)},
        "has CIFAR-10 and CIFAR-100",
    ),
    "cifar-100 without its test images": Trial(cifar100(""), {"train": {"apple": 2}}, {"split": "test=out"}),
    "cifar-10's pickles": Trial({"cifar-10-python.tar.gz": b"\x1f\x8b"}, "pickle.*cifar-10-binary"),
    "cifar-100's pickles": Trial({"cifar-100-python.tar.gz": b"\x1f\x8b"}, "pickle.*cifar-100?-binary"),
    "cifar-100's pickles, unpacked": Trial({"cifar-100-python/train": b"\x80\x04"}, "pickle.*cifar-10-binary"),
    "cifar-10 unpacked": Trial(
        {f"cifar-10-batches-bin/{n}": d for n, d in [("data_batch_1.bin", bytes([3]) + bytes(3072)),
         ("test_batch.bin", bytes([3]) + bytes(3072)), ("batches.meta.txt", b"a\nb\nc\ncat\n")]},
        {"train": {"cat": 1}, "test": {"cat": 1}}, {"accept_classes": True},
    ),
    "downsampled imagenet": Trial(
        downsampled(8, np.savez), {"train": {"0": 7, "1": 7, "2": 7}, "validation": {"0": 2, "1": 2, "2": 2}}
    ),
    "downsampled imagenet in folders": Trial(
        {f"{name}/a.npz": data for name, data in zip(("train", "test", "val"), DOWNSAMPLED, strict=True)},
        {"train": even("012", 4), "test": even("012", 3), "validation": even("012", 2)},
    ),
    "downsampled imagenet, one file without a split": Trial(
        {f"{name}.npz": data for name, data in zip(("train", "more", "val"), DOWNSAMPLED, strict=True)},
        "look like splits.*more.npz.*--split",
    ),
    "downsampled imagenet, damaged": Trial(
        {name: data.replace(data[1000:1010], b"0123456789") for name, data in downsampled(8, np.savez).items()},
        "is not a valid .npz file: Bad CRC",
    ),
    "downsampled imagenet, compressed": Trial(downsampled(8, np.savez_compressed), {"train": {"0": 7, "1": 7, "2": 7}}),
    "downsampled imagenet's pickles": Trial({"train_data_batch_1": b"\x80\x04"}, "pickle.*npz"),
    "an npz of something else": Trial(
        {"a.npz": zipped({"x.npy": b""})}, "a.npz contains x.npy; accepted"
    ),
    "a compressed tar": Trial({"train.tar.gz": b"x"}, "train.tar.gz is compressed.*unpack"),
    "arrays": Trial({"a.npy": b"x"}, "a.npy is a format that is not read; accepted: class folders"),
    "nothing": Trial({"readme.md": b"x"}, "holds no images, but files that end in .md; accepted"),
}  # fmt: skip


def config(root: Path, trial: Trial) -> PrepareConfig:
    options = dict(trial.options)
    if "labels" in options:
        options["labels"] = str(root / "in" / options["labels"])
    source = str(root / "in" / trial.source).rstrip("/")
    return PrepareConfig(store=str(root), source=source, output="out", name="trial", **options)


@pytest.mark.parametrize("name", TRIALS)
def test_layouts_are_read_correctly_or_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = TRIALS[name]
    write(tmp_path / "in", trial.files)
    trial_config = config(tmp_path, trial)
    if isinstance(trial.expected, str):
        for work in (plan, prepare):
            with pytest.raises(ValueError, match=trial.expected):
                work(trial_config)
        assert not (tmp_path / "out").exists(), "a refused source leaves nothing"
        return
    plan(trial_config)
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
    dry = capsys.readouterr().out
    manifest = prepare(trial_config)
    assert capsys.readouterr().out.startswith(dry.strip()[:40]), "both print what was understood"
    assert "=out" not in trial.options.get("split", "") or manifest.splits.keys() == trial.expected.keys()
    for split, expected in trial.expected.items():
        labels = np.array(table(manifest, split)["label"])
        counts = {name: int((labels == label).sum()) for label, name in enumerate(manifest.classes)}
        counts = counts if manifest.classes else {"": len(labels)}
        assert {name: counts[name] for name in expected} == expected
        assert len(expected) >= len(manifest.classes) or sum(expected.values()) <= len(labels)
    report = storage.read_json(str(tmp_path / "out" / "report.json"))["understanding"]
    assert report["splits"] == {split: manifest.num_samples(split) for split in manifest.splits}
    assert report["num_classes"] == len(manifest.classes)


def test_the_detected_layout_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", tiny_imagenet() | {"train/notes.docx": b"", "train/.DS_Store": b""})
    prepare(config(tmp_path, Trial({}, "")))
    text = capsys.readouterr().out
    for phrase in (
        "class folders", "train 12 images, validation 6 images", "3: n01443537 (6), n01629819 (6), n02017213 (6)",
        "val_annotations.txt is used for the labels of validation images", "wnids.txt is not used",
        "words.txt is not used", "files that end in .txt: 6", "files that end in .docx: 1", "hidden files: 1",
        "test images without labels: 5", "0 are transparent",
    ):  # fmt: skip
        assert phrase in text


def test_every_image_of_a_zip_is_its_own_bytes(tmp_path: Path) -> None:
    files = folders(Pictures(), PETS, 6)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write(tmp_path / f"in{method}", {"a.zip": zipped(files, method)})
        trial = PrepareConfig(store=str(tmp_path), source=f"in{method}", output=f"out{method}", name="zip")
        rows = table(prepare(trial), "train")
        assert dict(zip(rows["key"], rows["image"], strict=True)) == files


def test_pixels_of_downsampled_imagenet_are_unchanged(tmp_path: Path) -> None:
    files = downsampled(8, np.savez)
    write(tmp_path / "in", files)
    rows = table(prepare(config(tmp_path, Trial({}, ""))), "train")
    for key, data in zip(rows["key"], rows["image"], strict=True):
        name, row = key.split("/")
        planes = np.load(io.BytesIO(files[f"{name}.npz"]))["data"][int(row)]
        np.testing.assert_array_equal(np.asarray(decode(data)), planes.reshape(3, 8, 8).transpose(1, 2, 0))


def lsun(path: Path, images: list[bytes]) -> None:
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for i, data in enumerate(images):
            transaction.put(f"{i:040x}".encode(), data)


def test_lsun_databases_are_read(tmp_path: Path) -> None:
    new = Pictures()
    images = {name: [new() for _ in range(5)] for name in ("bedroom_train", "bedroom_val", "cat_train")}
    for name, pictures in images.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        lsun(tmp_path / "in" / f"{name}_lmdb", pictures)
    manifest = prepare(config(tmp_path, Trial({}, "", {"accept_classes": True})))
    assert manifest.classes == ("bedroom", "cat") and manifest.num_samples("validation") == 5
    rows = table(manifest, "train")
    assert sorted(rows["image"]) == sorted(images["bedroom_train"] + images["cat_train"])
    single = PrepareConfig(store=str(tmp_path), source="in/bedroom_train_lmdb", output="alone", name="bedrooms")
    manifest = prepare(single)
    assert manifest.classes == () and sorted(table(manifest, "train")["image"]) == sorted(images["bedroom_train"])


def test_links_between_folders_show_each_image_once(tmp_path: Path) -> None:
    write(tmp_path / "in", folders(Pictures(), PETS, 3))
    os.symlink("../dog", tmp_path / "in" / "cat" / "more")
    os.symlink("../cat", tmp_path / "in" / "dog" / "more")
    os.symlink(tmp_path / "in", tmp_path / "in" / "dog" / "all")
    manifest = prepare(config(tmp_path, Trial({}, "")))
    assert manifest.classes == ("cat", "dog") and manifest.num_samples("train") == 6


def test_every_suspicion_counts_the_cases_that_it_does_not_name(tmp_path: Path) -> None:
    new = Pictures()
    nested = {f"{name}/{i}/{i}.png": new() for name in PETS for i in range(4)}
    unlabelled = {f"{i}.png": new() for i in range(20)}
    for files, options, expected in (
        (nested, {}, "outermost one is used as the class: cat/0, cat/1, cat/2, cat/3, dog/0 and 3 more"),
        (unlabelled | {"map.csv": b"key,label\n0.png,cat\n1.png,dog\n"}, {"labels": "map.csv"},
         "most images have no label: .* and 13 more"),
    ):  # fmt: skip
        folder = f"in{len(files)}"
        write(tmp_path / folder, files)
        labels = f"{folder}/{options['labels']}" if options else None
        source = PrepareConfig(store=str(tmp_path), source=folder, output="out", name="suspicious", labels=labels)
        with pytest.raises(ValueError, match=expected):
            plan(source)


def test_a_map_of_numbers_in_order_counts_the_images_of_all_splits(tmp_path: Path) -> None:
    """The numbers belong to the images in the order of their names, however many splits they are in."""
    new = Pictures()
    files = {f"{split}/{i}.png": new() for split in ("train", "val") for i in range(4)}
    write(tmp_path / "in", files | {"map.txt": b"0\n1\n0\n1\n2\n2\n2\n2\n"})
    manifest = prepare(
        PrepareConfig(store=str(tmp_path), source="in", output="out", name="ordered", labels="in/map.txt",
                      accept_classes=True)
    )  # fmt: skip
    assert sorted(table(manifest, "train")["label"]) == [0, 0, 1, 1]
    assert sorted(table(manifest, "validation")["label"]) == [2, 2, 2, 2]


def test_equal_names_within_two_tars_hide_no_image(tmp_path: Path) -> None:
    new = Pictures()

    def outer_tar() -> bytes:
        samples = [(f"{i}.{ending}", data) for i in range(4) for ending, data in (("png", new()), ("cls", b"%d" % i))]
        return tar_bytes([("0000.tar", tar_bytes(samples))])

    write(tmp_path / "in", {"a.tar": outer_tar(), "b.tar": outer_tar()})
    manifest = prepare(config(tmp_path, Trial({}, "", {"accept_classes": True})))
    assert manifest.num_samples("train") == 8
