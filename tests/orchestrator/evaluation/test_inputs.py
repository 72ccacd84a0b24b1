"""All forms of the same images give the same pixels for each index; invalid inputs raise one clear error."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from orchestrator import storage
from orchestrator.data.job import prepare
from orchestrator.evaluation.inputs import ImageSet, check_ending, image_size_of, open_images, split_images
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.job import generate
from orchestrator.pictures import png
from tests.orchestrator.digits import digits
from tests.orchestrator.evaluation.test_files import manifest
from tests.orchestrator.networks import UNET, save_network

COUNT = 1100  # more than two blocks


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng([60]).integers(0, 256, (COUNT, 6, 6, 3), dtype=np.uint8)


def write(form: str, folder: str, images: np.ndarray) -> str:
    """Write the images below `folder` in one of the forms, and return the URI."""
    buffer = io.BytesIO()
    names = [f"{index:06d}.png" for index in range(len(images))]
    if form == "folder":
        Path(folder, "images").mkdir()
        for name, image in zip(names, images, strict=True):
            Path(folder, "images", name).write_bytes(png(image))
        return storage.join(folder, "images")
    if form == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, image in reversed(list(zip(names, images, strict=True))):
                member = tarfile.TarInfo(f"made/{name}")
                member.size = len(data := png(image))
                archive.addfile(member, io.BytesIO(data))
    elif form == "stored.npz":
        np.savez(buffer, images, np.arange(len(images)) % 10)
    elif form == "deflated.npz":
        np.savez_compressed(buffer, images, np.arange(len(images)) % 10)
    elif form == "fortran.npz":
        np.savez(buffer, np.asfortranarray(images))
    storage.write_bytes(uri := storage.join(folder, f"made.{form}"), buffer.getvalue())
    return uri


@pytest.mark.parametrize("form", ["folder", "tar", "stored.npz", "deflated.npz", "fortran.npz"])
def test_every_form_gives_the_same_pixels(form: str, images: np.ndarray, tmp_path: Path) -> None:
    image_set = open_images(write(form, str(tmp_path), images))
    assert image_set.count == COUNT and image_size_of(image_set) == 6
    read = pickle.loads(pickle.dumps(image_set)).read  # noqa: S301 - as it is sent to a worker
    for begin, end in ((0, 3), (512, 1024), (1024, COUNT), (100, 900), (5, 6)):  # also backwards
        pixels, labels = read(begin, end)
        np.testing.assert_array_equal(pixels, images[begin:end])
        expected = np.arange(begin, end) % 10 if form in ("stored.npz", "deflated.npz") else np.full(end - begin, -1)
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("form", ["tar", "stored.npz", "deflated.npz"])
def test_object_storage_serves_ranges(form: str, images: np.ndarray, s3_bucket: str) -> None:
    image_set = open_images(write(form, s3_bucket, images[:600]))
    np.testing.assert_array_equal(image_set.read(500, 600)[0], images[500:600])


def test_a_compressed_batch_is_read_once_from_its_start(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_set = open_images(write("deflated.npz", str(tmp_path), images))
    opened: list[str] = []
    open_input = storage.open_input

    def recording_open(uri: str) -> BinaryIO:
        opened.append(uri)
        return open_input(uri)

    monkeypatch.setattr(storage, "open_input", recording_open)
    parts = [image_set.read(begin, min(begin + 100, COUNT))[0] for begin in range(0, COUNT, 100)]
    np.testing.assert_array_equal(np.concatenate(parts), images)
    assert len(opened) == 1


def test_other_images_have_another_identity(images: np.ndarray, tmp_path: Path) -> None:
    def saved_and_opened(name: str, pixels: np.ndarray) -> ImageSet:
        np.savez(tmp_path / name, pixels)
        return open_images(str(tmp_path / name))

    assert saved_and_opened("a.npz", images[:9]).identity == saved_and_opened("b.npz", images[:9]).identity
    assert saved_and_opened("c.npz", images[1:10]).identity != saved_and_opened("a.npz", images[:9]).identity


def test_new_images_or_labels_under_the_same_names_have_another_identity(images: np.ndarray, tmp_path: Path) -> None:
    """Features and finished evaluations are found by the identity, and features are stored with their labels."""

    def identities(pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> list[str]:
        np.savez(tmp_path / "made.npz", images[:4], labels)
        for index in range(4):
            storage.write_bytes(f"{tmp_path}/made/cats/{index}.png", png(pixels[index]))
        reference = manifest(classes=classes)
        return [open_images(f"{tmp_path}/{name}", reference).identity for name in ("made.npz", "made")]

    first = identities(images, np.arange(4), ("cats", "dogs"))
    assert identities(images, np.arange(4), ("cats", "dogs")) == first
    assert identities(images // 8, np.arange(4)[::-1], ("cats", "dogs"))[0] != first[0]
    assert identities(images // 8, np.arange(4), ("cats", "dogs"))[1] != first[1]
    assert identities(images, np.arange(4), ("dogs", "cats"))[1] != first[1]


def test_folders_named_after_classes_give_labels(images: np.ndarray, tmp_path: Path) -> None:
    for index in range(6):
        storage.write_bytes(
            f"{tmp_path}/cats/{index}.png" if index % 2 else f"{tmp_path}/dogs/{index}.png", png(images[index])
        )
    image_set = open_images(str(tmp_path), manifest(classes=("dogs", "cats", "birds")))
    assert image_set.read(0, 6)[1].tolist() == [1, 1, 1, 0, 0, 0] and image_set.classes == ("dogs", "cats", "birds")
    without = open_images(str(tmp_path), manifest(classes=("dogs", "birds")))
    assert without.read(0, 6)[1].tolist() == [-1] * 6 and without.classes == ()


def test_inputs_that_cannot_be_measured_raise_one_error(images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none has no finished samples"):
        open_images(str(tmp_path / "none"))
    data = Path(write("tar", str(tmp_path), images[:20])).read_bytes()
    (tmp_path / "short.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"short\.tar is not a valid tar"):
        open_images(str(tmp_path / "short.tar"))
    (tmp_path / "text.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"text\.tar is not a valid tar"):
        open_images(str(tmp_path / "text.tar"))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="statistics but no images"):
        open_images(str(tmp_path / "statistics.npz"))
    storage.write_bytes(f"{tmp_path}/broken/a.png", png(images[0])[:60])
    with pytest.raises(ValueError, match=r"a\.png is not an intact image"):
        open_images(f"{tmp_path}/broken")
    np.savez(tmp_path / "oblong.npz", images[:2, :4])
    with pytest.raises(ValueError, match="6x4 pixels"):
        image_size_of(open_images(str(tmp_path / "oblong.npz")))


@pytest.mark.parametrize(
    ("name", "for_samples", "for_reference"),
    [
        ("a.pkl", "pickle.*never opened.*savez.*images", "pickle.*never opened.*savez.*mu=.*sigma="),
        ("a.PICKLE", "never opened", "never opened"),
        ("a.npy", "arr_0.*savez", "arr_0.*savez"),
        ("a.pt", "weights.*generate_samples", "weights.*dataset"),
        ("a.safetensors", "weights", "weights"),
        ("a.parquet", "Parquet.*folder", "Parquet.*prepare_dataset"),
        ("a.tar.gz", "compressed.*tar", "archive.*prepare_dataset"),
        ("a.zip", "compressed", "archive"),
        ("a.tar", None, "archive.*prepare_dataset"),
        ("a.png", "single image.*folder", "single image.*dataset"),
        ("a.npz", None, None),
        ("a.folder", None, None),
    ],
)
def test_unusable_files_are_refused_by_ending(name: str, for_samples: str | None, for_reference: str | None) -> None:
    for role, message in (("samples", for_samples), ("reference", for_reference)):
        if message is None:
            check_ending(f"/some/{name}", role)  # type: ignore[arg-type]
            continue
        with pytest.raises(ValueError, match=f"/some/{name} .*{message}") as error:
            check_ending(f"/some/{name}", role)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_samples_have_the_names_of_their_classes(tmp_path: Path) -> None:
    save_network(str(tmp_path), "unet.safetensors", UNET)
    settings = {"weights": "unet.safetensors", "output": "samples", "num_samples": 2, "num_workers": 0}
    folder = generate(GenerationConfig(store=str(tmp_path), **settings))
    assert open_images(folder).classes == tuple(str(label) for label in range(10))
    run = storage.read_json(f"{folder}/run.json")
    del run["record"]["classes"]  # older folders have none
    storage.write_json(f"{folder}/run.json", run)
    assert open_images(folder).classes == () and open_images(folder).count == 2


def test_upsampling_of_a_dataset_is_reported(tmp_path: Path) -> None:
    folder = prepare(digits(str(tmp_path))).folder
    assert split_images(folder, "train", 8).warnings == ()
    (warning,) = split_images(folder, "train", 16).warnings
    assert "upsampled to 16" in warning and "8" in warning


def test_a_dataset_is_a_reference_and_no_samples(tmp_path: Path) -> None:
    manifest = prepare(digits(str(tmp_path)))
    with pytest.raises(ValueError, match="is a dataset, not samples"):
        open_images(manifest.folder)
    split = split_images(manifest.folder, "validation", 8)
    assert split.count == manifest.num_samples("validation") and split.read(0, 5)[0].shape == (5, 8, 8, 3)
    assert split.identity != split_images(manifest.folder, "train", 8).identity
