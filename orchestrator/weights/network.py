"""A network on disk: weights with their architecture in a safetensors header, or a released `.pt` file."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models import zoo
from models.diffusion import DiffusionConfig
from models.unet import ARCHITECTURES, Architecture
from orchestrator import storage
from orchestrator.weights.imported import is_imported
from orchestrator.weights.published import check_tensors, decode_state_dict, released_entry
from orchestrator.weights.shapes import Shapes, num_classes_of, shapes_of, with_classes_of

FORMAT_VERSION = 1
BEST = "best.json"  # in a run's folder: the best snapshot of each average, as `jobs/evaluate_run.py` found it
ANY = "any"  # its key for the best of all averages
COPY_BYTES = 16 << 20  # of a file that is being written are in memory


@dataclass(frozen=True)
class Network:
    """A network as its file tells it: weights, architecture, the diffusion that it was trained for, its classes."""

    module: nn.Module
    architecture: Architecture
    diffusion: DiffusionConfig
    classes: tuple[str, ...]
    sha256: str  # of the file

    def towards(self, y: Tensor) -> nn.Module:
        """Return what guides samples of the labels y: the network, whatever they are."""
        return self.module

    @property
    def device(self) -> torch.device:
        """Return the device that its parameters are on."""
        return next(self.module.parameters()).device


def load_network(uri: str, device: torch.device | str = "cpu", recipe: str | None = None) -> Network:
    """Read a network in evaluation mode: a safetensors file, the newest of a training run, or a released `.pt` file.

    A `.pt` file (float32, or float16 which is widened) does not tell its architecture: its name must be that of a
    released one, or `recipe` be the zoo's name for it. Its classes are named by their indices, and the file
    tells how many there are.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or a tensor is missing, extra or misshapen; the message names it.
    """
    if uri.endswith(".pt"):
        return load_published(uri, partial(describe_entry, released_entry(uri, recipe)), device)
    if recipe is not None:
        raise ValueError(f"recipe={recipe!r} is for .pt files; {uri} carries its architecture")
    uri = uri if uri.endswith(".safetensors") else storage.join(uri, "weights", latest_weights(uri))
    data = storage.read_bytes(uri)
    try:
        weights = safetensors.torch.load(data)
        about = json.loads(_metadata(data)["admiral"])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version={about['format_version']} is not {FORMAT_VERSION}")
        architecture = ARCHITECTURES[about["kind"]].model_validate(about["architecture"])
        diffusion = DiffusionConfig.model_validate(about["diffusion"])
        classes = tuple(about["classes"])
    except KeyError as error:
        raise ValueError(f"{uri} is not a weights file of Admiral's: its header has no {error}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{uri} is not a weights file of Admiral's: {error}") from error
    module = _filled(uri, architecture, weights, device)
    return Network(module, architecture, diffusion, classes, hashlib.sha256(data).hexdigest())


def load_published(
    uri: str,
    describe: Callable[[Shapes], tuple[Architecture, DiffusionConfig]],
    device: torch.device | str = "cpu",
) -> Network:
    """Read a `.pt` file as the network that `describe` makes of the names and shapes of its tensors.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or its tensors are not those of that network.
    """
    data = storage.read_bytes(uri)
    weights = decode_state_dict(uri, data)
    architecture, diffusion = describe(shapes_of(weights))
    module = _filled(uri, architecture, weights, device)
    classes = tuple(str(index) for index in range(architecture.num_classes or 0))
    return Network(module, architecture, diffusion, classes, hashlib.sha256(data).hexdigest())


def describe_entry(entry: zoo.Entry, shapes: Shapes) -> tuple[Architecture, DiffusionConfig]:
    """Return a released model's architecture and diffusion, with as many classes as the file has if it has some."""
    conditional = entry.network.num_classes is not None and num_classes_of(shapes) is not None
    return with_classes_of(shapes, entry.network) if conditional else entry.network, entry.diffusion


def _filled(uri: str, architecture: Architecture, weights: dict[str, Tensor], device: torch.device | str) -> nn.Module:
    """The network with these weights as float32, in evaluation mode, on `device`."""
    with torch.device("meta"):  # shapes only: weights that are replaced at once need not be drawn
        module = architecture.build()
    check_tensors(uri, module.state_dict(), weights, architecture)
    module.to_empty(device=device).load_state_dict(weights)
    return module.eval().requires_grad_(False)


def _metadata(data: bytes) -> dict[str, str]:
    """The string metadata in a safetensors header: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def save_weights(
    uri: str,
    weights: dict[str, Tensor],
    architecture: Architecture,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a safetensors file that carries its architecture; an existing one is left as it is.

    `training` is small JSON on where the weights come from, such as the images seen.
    """
    if not storage.exists(uri):
        write_tensors(uri, weights, _about(architecture, diffusion, classes, training))


def encode_weights(
    weights: dict[str, Tensor],
    architecture: Architecture,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
) -> bytes:
    """The bytes of such a file."""
    return safetensors.torch.save(_saveable(weights), metadata=_about(architecture, diffusion, classes))


def _about(
    architecture: Architecture,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
    training: dict[str, Any] | None = None,
) -> dict[str, str]:
    """What a weights file says of itself, in the header."""
    about = {
        "format_version": FORMAT_VERSION,
        "kind": architecture.kind,
        "architecture": architecture.model_dump(mode="json"),
        "diffusion": diffusion.model_dump(mode="json"),
        "classes": list(classes),
        "training": training or {},
    }
    return {"admiral": json.dumps(about)}


def weights_about(uri: str) -> dict[str, Any]:
    """What a weights file says of itself, without reading its tensors.

    Raises:
        ValueError: it is not a weights file of Admiral's.
    """
    with storage.open_input(uri) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return json.loads(json.loads(file.read(length))["__metadata__"]["admiral"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{uri} is not a weights file of Admiral's: its header has no {error}") from error


def weights_file(
    path: str,
    locate: Callable[[str], str],
    noted: str | None = None,
    kind: str | None = None,
    at: str | None = None,
) -> str:
    """Return the file that `path`, relative or not, names: itself, or of a training run the weights of `kind`.

    `at` says which of them, see `weights_at`; None means the newest. `noted` is the file that an earlier attempt at the
    same job took. If it is of this run it is returned again, so that weights that were written since do not change the
    job. `locate` makes a URI of a path.
    """
    if path.endswith((".pt", ".safetensors")) or is_imported(path):
        return path
    folder = storage.join(path, "weights")
    if noted and noted.startswith(f"{folder}/"):
        return noted
    return storage.join(folder, weights_at(locate(path), at, kind) if at else latest_weights(locate(path), kind))


def latest_weights(run: str, kind: str | None = None) -> str:
    """Return the name, in a training run's weights/, of its newest weights; of `kind`, or of the last kind by name.

    kind: "ema-0.9999", "raw".

    Raises:
        FileNotFoundError: the run has no weights.
        ValueError: it has none of this kind.
    """
    folder = storage.join(run, "weights")
    names = sorted(name for name in storage.list_names(folder) if name.endswith(".safetensors"))
    if not names:
        raise FileNotFoundError(f"{run}: no weights there; has the training finished?")
    if kind is None:
        return names[-1]
    kinds = {name.removesuffix(".safetensors").split("-", 2)[-1]: name for name in names}  # the newest of each
    if kind not in kinds:
        raise ValueError(f"{run} has no weights {kind!r}; it has {', '.join(kinds)}")
    return kinds[kind]


def weights_at(run: str, at: str, kind: str | None = None) -> str:
    """Return the name, in a training run's weights/, of its weights of `kind` at a moment of the training.

    at: a number of images; or "best", which `jobs/evaluate_run.py` has found, of `kind` or of all.

    Raises:
        FileNotFoundError: the run was not evaluated, so that no snapshot is known as the best.
        ValueError: there is no such snapshot.
    """
    if at == "best":
        uri = storage.join(run, BEST)
        if not storage.exists(uri):
            raise FileNotFoundError(f"--at best: {run} was not evaluated yet; run jobs/evaluate_run.py first")
        best: dict[str, str] = storage.read_json(uri)
        if (kind or ANY) not in best:
            raise ValueError(f"--at best: no weights {kind!r} were evaluated, only {', '.join(best.keys() - {ANY})}")
        return best[kind or ANY]
    names = storage.list_names(storage.join(run, "weights"))
    found = sorted(name for name in names if re.match(rf"images-0*{re.escape(at)}-{re.escape(kind or '')}", name))
    if not found:
        moments = sorted({int(name.split("-")[1]) for name in names if name.startswith("images-")})
        raise ValueError(f"--at {at}: {run} has no such weights; it has some at {', '.join(map(str, moments))} images")
    return found[-1]


def write_tensors(uri: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file; return its SHA-256.

    The library writes a local temporary file straight from the tensors' memory, and that file is streamed to `uri`. So
    a file of any size takes COPY_BYTES of memory, and as much local disk space as it has bytes.
    """
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="admiral-") as folder:
        local = Path(folder, "tensors.safetensors")
        safetensors.torch.save_file(_saveable(tensors), local, metadata)
        with local.open("rb") as file, storage.open_output(uri) as output:
            while part := file.read(COPY_BYTES):
                digest.update(part)
                output.write(part)
    return digest.hexdigest()


def _saveable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as the library takes them; those that already are so are not copied."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
