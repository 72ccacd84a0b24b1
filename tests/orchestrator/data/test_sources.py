"""Every layout gives the same images under the same classes, or one clear error."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import storage
from orchestrator.data.config import PrepareConfig
from orchestrator.data.images import decode
from orchestrator.data.sources import read_source
from orchestrator.data.sources.archives import read_ranges
from orchestrator.data.sources.index import Source, list_source
from orchestrator.data.sources.labels import parse_label_map
from orchestrator.data.sources.staging import staged
from tests.orchestrator.data import layouts
from tests.orchestrator.data.hub import Hub
from tests.orchestrator.data.layouts import CLASSES, pictures, tar_bytes

IMAGES = pictures(40)

LAYOUTS: dict[str, tuple[str, Callable[..., str]]] = {
    "tree": ("class folders", layouts.write_tree),
    "flat": ("files named <class>_<anything>", layouts.write_flat),
    "tar of tars": ("class folders", layouts.write_tar_of_tars),
    "class tars": ("class folders", layouts.write_class_tars),
    "webdataset cls": ("WebDataset", layouts.write_webdataset),
    "webdataset json": ("WebDataset", lambda uri, images: layouts.write_webdataset(uri, images, "json", 10)),
    "label map": ("images with the labels of", layouts.write_labelled),
}


def open_at(uri: str, labels: str | None = None, **options: Any) -> Source:
    config = PrepareConfig(source=uri, output="out", name="opened", labels=labels, **options)
    return read_source(list_source(config), config)


def contents(source: Source, folder: Path | None = None) -> list[tuple[str, bytes]]:
    """Return (class, bytes) of every image, sorted. Images are staged in `folder` if that is necessary."""
    source = source if source.reading.images is None else staged(source, str(folder), 0)
    keys, names, starts, sizes = (source.index[name].to_pylist() for name in ("key", "object", "start", "size"))
    ranges = [storage.Range(name or key, *span) for key, name, *span in zip(keys, names, starts, sizes, strict=True)]
    labels = [source.classes[i] if i >= 0 else "" for i in source.index["label"].to_pylist()]
    return sorted(zip(labels, read_ranges(source.uri, ranges), strict=True))


@pytest.mark.parametrize("storage_kind", ["disk", "s3"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_images(kind: str, storage_kind: str, tmp_path: Path, s3_bucket: str) -> None:
    expected, write = LAYOUTS[kind]
    images = pictures(8)
    uri = write(f"{tmp_path if storage_kind == 'disk' else s3_bucket}/some images", images)
    source = open_at(uri, f"{uri}.csv" if kind == "label map" else None)
    assert source.reading.layout.startswith(expected)
    names = ("0", "1", "2") if kind.startswith("webdataset") else CLASSES
    assert source.classes == names and source.findings == {}
    assert source.index["key"].to_pylist() == sorted(set(source.index["key"].to_pylist()))
    assert contents(source) == sorted((names[CLASSES.index(image.cls)], image.data) for image in images)
    assert set(source.index["split"].to_pylist()) == {"train" if kind.startswith("webdataset") else ""}


def test_cifar10_is_read_from_its_binary_version(tmp_path: Path) -> None:
    data, batches = layouts.cifar10_archive(20)
    storage.write_bytes(str(tmp_path / "in" / "cifar-10-binary.tar.gz"), data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    for number, uri in enumerate(("in", "in/cifar-10-binary.tar.gz", "unpacked", "unpacked/cifar-10-batches-bin")):
        source = open_at(str(tmp_path / uri))
        assert source.classes[:2] == ("airplane", "automobile") and len(source.classes) == 10
        assert source.index["split"].to_pylist() == ["train"] * 100 + ["test"] * 20
        expected = [
            (source.classes[label], image.tobytes())
            for images, labels in batches.values()
            for image, label in zip(images, labels, strict=True)
        ]
        actual = [(name, decode(image).tobytes()) for name, image in contents(source, tmp_path / f"staged-{number}")]
        assert sorted(actual) == sorted(expected)
    storage.write_bytes(str(tmp_path / "cut" / "cifar-10-binary.tar.gz"), data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is not a valid tar\.gz"):
        open_at(str(tmp_path / "cut"))


def test_a_label_map_may_give_splits(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "map.json"), b'{"00000.png": 1, "00001.png": 0}')
    storage.write_bytes(str(tmp_path / "map.csv"), b"key,label,split\n00000.png,x,val\n00001.png,y,train\n")
    layouts.write_labelled(str(tmp_path / "files"), IMAGES[:2])
    assert open_at(str(tmp_path / "files"), str(tmp_path / "map.json")).index["split"].to_pylist() == ["", ""]
    source = open_at(str(tmp_path / "files"), str(tmp_path / "map.csv"))
    assert source.index["split"].to_pylist() == ["validation", "train"] and source.classes == ("x", "y")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("{i.cls}/{i.name}.png", ""),
        ("./sets/mine/{i.cls}/{i.name}.png", ""),
        ("mine/val/{i.cls}/{i.name}.png", "validation"),
        ("mine/{i.name}.png", ""),
    ],
)
def test_one_tar_of_a_tree_or_of_a_flat_folder_is_read(name: str, split: str, tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "all.tar"), tar_bytes([(name.format(i=image), image.data) for image in IMAGES]))
    source = open_at(str(tmp_path / "all.tar"))
    assert source.classes == CLASSES and set(source.index["split"].to_pylist()) == {split}
    assert contents(source) == sorted((image.cls, image.data) for image in IMAGES)


def test_the_layout_unlabelled_ignores_classes(tmp_path: Path) -> None:
    for uri in (layouts.write_flat(str(tmp_path / "a"), IMAGES), layouts.write_class_tars(str(tmp_path / "b"), IMAGES)):
        source = open_at(uri, layout="unlabelled")
        assert source.classes == () and set(source.index["label"].to_pylist()) == {-1} and len(source.index) == 120


def test_links_are_followed(tmp_path: Path) -> None:
    layouts.write_tree(str(tmp_path / "all"), IMAGES)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "ant").symlink_to("../all/ant")
    (tmp_path / "some" / "bee").mkdir()
    (tmp_path / "some" / "bee" / "one.png").symlink_to(tmp_path / "all" / "bee" / "bee_000.png")
    (tmp_path / "some" / "bee" / "loop").symlink_to("..")
    source = open_at(str(tmp_path / "some"))
    assert source.classes == ("ant", "bee") and len(source.index) == 41
    assert contents(source) == sorted((image.cls, image.data) for image in IMAGES[:41])


def test_irregularities_are_reported(tmp_path: Path) -> None:
    data = IMAGES[0].data
    storage.write_bytes(str(tmp_path / "w" / "a.tar"), tar_bytes([
        ("1.png", data), ("1.cls", b"0"), ("1.json", b'{"label": 1}'),
        ("2.png", data), ("2.cls", b"1"), ("2.json", b'{"label": 1}'),
        ("3.png", data), ("3.json", b"{}"), ("._1.png", b"mac"),
    ]))  # fmt: skip
    findings = open_at(str(tmp_path / "w")).findings
    assert findings["labels_that_differ_between_cls_and_json"].examples == ("a/1",)
    assert findings["images_without_label"].examples == ("a/3",)

    storage.write_bytes(str(tmp_path / "t" / "ant.tar"), tar_bytes([("ant_1.png", data), ("bee_2.png", data)]))
    storage.write_bytes(str(tmp_path / "t" / "bee.tar"), tar_bytes([("bee_1.png", data), ("bee_1.png", b"again")]))
    storage.write_bytes(str(tmp_path / "t" / "cat.tar"), tar_bytes([]))
    source = open_at(str(tmp_path / "t"))
    assert source.findings["images_named_after_another_class"].examples == ("ant/bee_2.png",)
    assert source.findings["duplicate_keys"].examples == ("bee/bee_1.png",)
    assert source.findings["archives_without_files"].examples == ("cat",)
    assert contents(source) == [("ant", data), ("ant", data), ("bee", data)]

    layouts.write_tree(str(tmp_path / "e" / "train"), IMAGES)
    (tmp_path / "e" / "train" / "eel").mkdir()
    storage.write_bytes(str(tmp_path / "e" / "train" / "docs" / "readme.txt"), b"")
    storage.write_bytes(str(tmp_path / "e" / "train" / "readme.txt"), b"")
    source = open_at(str(tmp_path / "e"))
    assert source.classes == CLASSES
    assert source.findings["folders_without_images"].examples == ("docs", "eel")

    layouts.write_labelled(str(tmp_path / "f"), IMAGES[:3])
    storage.write_bytes(str(tmp_path / "f.csv"), b"key,label\n00000.png,ant\n00001.png,ant\nmissing.png,bee\n")
    findings = open_at(str(tmp_path / "f"), str(tmp_path / "f.csv")).findings
    assert findings["images_without_label"].examples == ("00002.png",)
    assert findings["labels_without_image"].examples == ("missing.png",)


@pytest.mark.parametrize("cut", [700, 5_000, -600, -1_500])
def test_truncated_tars_are_refused(cut: int, tmp_path: Path) -> None:
    for uri in (
        layouts.write_tar_of_tars(str(tmp_path / "all"), IMAGES[:9]),
        layouts.write_webdataset(str(tmp_path / "w"), IMAGES[:9]) + "/train-0000.tar",
    ):
        data = storage.read_bytes(uri).rstrip(b"\0") + bytes(1024)  # without the padding behind the end mark
        data += bytes(-len(data) % 512)
        storage.write_bytes(uri, data)
        storage.write_bytes(uri, data[:cut])
        with pytest.raises(ValueError, match=r"\.tar.*(is truncated|is not a valid tar)"):
            open_at(uri)


def test_a_damaged_inner_tar_is_named(tmp_path: Path) -> None:
    tars = layouts.class_tars(IMAGES[:60])
    broken = bytearray(tars[1][1])
    broken[broken.index(b"bee_003.png") + 150] ^= 1  # in the checksum of its header
    uri = str(tmp_path / "all.tar")
    storage.write_bytes(uri, tar_bytes([tars[0], ("bee.tar", bytes(broken))]))
    with pytest.raises(ValueError, match=r"all\.tar \(bee\.tar in it\) is truncated or damaged at byte"):
        open_at(uri)


def tar_of_links() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, target in (("cat/1.png", ""), ("dog/1.png", "cat/1.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE if target else tarfile.REGTYPE, target
            tar.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ant_1.png": b"x", "b.png": b"x"}, r"1 images have no class: .* b\.png.*--labels"),
        ({"w/a.tar": tar_bytes([("1.png", b"x"), ("1.json", b'{"label": 1.5}')])}, r"a\.tar: .*1\.json .*label 1\.5"),
        ({"w/a.tar": tar_of_links()}, r"a\.tar: dog/1\.png is a link to cat/1\.png.*--hard-dereference"),
        ({"w/a.tar": b"not a tar"}, r"a\.tar is not a valid tar"),
        ({".DS_Store": b"x", "._a.png": b"x"}, r"holds no images"),
    ],
)
def test_invalid_sources_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, data in files.items():
        storage.write_bytes(str(tmp_path / name), data)
    with pytest.raises(ValueError, match=message):
        open_at(str(tmp_path))


def test_a_gated_source_needs_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfFileSystem

    hub = Hub({"train/all.tar": tar_bytes(layouts.class_tars(IMAGES))}, token="hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests set it
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    HfFileSystem.clear_instance_cache()
    with pytest.raises(PermissionError, match=r"access denied.*hf://datasets/org/set/train"):
        open_at("hf://datasets/org/set/train")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    HfFileSystem.clear_instance_cache()
    for uri in ("hf://datasets/org/set/train", "hf://datasets/org/set/train/all.tar"):
        assert contents(open_at(uri)) == sorted((image.cls, image.data) for image in IMAGES)
    hub.close()
    HfFileSystem.clear_instance_cache()


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path, s3_bucket: str) -> None:
    for uri in (str(tmp_path / "none"), f"{s3_bucket}/none"):
        with pytest.raises(FileNotFoundError, match="none"):
            open_at(uri)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.csv", b"file,colour\na,b\n", r"has the columns file, colour; accepted: rows"),
        ("m.csv", b"key,label\na.png,1\na.png,2\n", r"two labels for a\.png: 1 and 2"),
        ("m.csv", b"key,label,split\na.png,1,fold3\n", r"split 'fold3' of a\.png; accepted: train"),
        ("m.csv", b"key,label\n", r"names no images"),
        ("m.csv", b"key,label\na.png,1\nb.png\n", r"no label for b\.png"),
        ("m.json", b"[1, 2]", r"is not a label map"),
        ("m.json", b'{"labels": [["a", 1.5]]}', r"a has the label 1\.5"),
        ("m.json", b'{"a": 1, "b": "cat"}', r"numbers and names as labels"),
        ("m.json", b"{", r"is not valid JSON"),
    ],
)
def test_invalid_label_maps_are_refused(name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_label_map(name, data)
