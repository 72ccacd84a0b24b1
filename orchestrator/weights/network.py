"""Networks on disk: safetensors files with their architecture in the header, and released `.pt` files."""

import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
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
from models.unet import ARCHITECTURES, Architecture, halve_weights
from orchestrator import storage
from orchestrator.weights.imported import is_imported
from orchestrator.weights.published import check_tensors, decode_state_dict, released_entry
from orchestrator.weights.shapes import Shapes, num_classes_of, shapes_of, with_classes_of

FORMAT_VERSION = 1
BEST = "best.json"  # in a run's folder: the best snapshot of each average, written by `jobs/evaluate_run.py`
ANY = "any"  # key in best.json for the best snapshot of all averages
SNAPSHOT = re.compile(r"images-(?P<images>\d+)-(?P<kind>.+)\.safetensors")  # file name of a snapshot in weights/
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
COPY_BYTES = 16 << 20  # bytes that are copied at a time to write a file


@dataclass(frozen=True)
class Network:
    """A network from a file, with its architecture, its diffusion process and the names of its classes."""

    module: nn.Module
    architecture: Architecture
    diffusion: DiffusionConfig
    classes: tuple[str, ...]
    sha256: str  # of the file's bytes

    def towards(self, y: Tensor) -> nn.Module:
        """Return the function that guides samples towards the labels y: the network itself."""
        return self.module

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return next(self.module.parameters()).device


def load_network(uri: str, device: torch.device | str = "cpu", recipe: str | None = None) -> Network:
    """Load a network in evaluation mode from a safetensors file, a training run (its newest file) or a `.pt` file.

    A `.pt` file does not contain its architecture. Therefore it must have the name of a released file, or `recipe` must
    be the name of a zoo entry. Its classes are named by their indices. Float16 weights are converted to float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid, or a tensor is missing, unexpected or has another shape.
    """
    if uri.endswith(".pt"):
        return load_published(uri, partial(describe_entry, released_entry(uri, recipe)), device)
    if recipe is not None:
        raise ValueError(f"recipe={recipe!r} is for .pt files; {uri} contains its architecture")
    uri = weights_file(uri, str)
    data = storage.read_bytes(uri)
    with _name_file_in_errors(uri):
        weights = safetensors.torch.load(data)
        header = _read_header(io.BytesIO(data))
        architecture, diffusion = parse_header(header)
        classes = tuple(header["classes"])
    module = _build_network(uri, architecture, weights, device)
    return Network(module, architecture, diffusion, classes, hashlib.sha256(data).hexdigest())


def parse_header(header: dict[str, Any]) -> tuple[Architecture, DiffusionConfig]:
    """Return the architecture and diffusion in the header of a weights file, as `weights_about` returns it.

    Raises:
        ValueError: the header has another format.
    """
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={header['format_version']} is not supported; {FORMAT_VERSION} is expected")
    architecture = ARCHITECTURES[header["kind"]].model_validate(header["architecture"])
    return architecture, DiffusionConfig.model_validate(header["diffusion"])


def load_published(
    uri: str,
    describe: Callable[[Shapes], tuple[Architecture, DiffusionConfig]],
    device: torch.device | str = "cpu",
) -> Network:
    """Load a `.pt` file as the network that `describe` returns for the names and shapes of its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid, or its tensors do not fit that network.
    """
    data = storage.read_bytes(uri)
    weights = decode_state_dict(uri, data)
    architecture, diffusion = describe(shapes_of(weights))
    module = _build_network(uri, architecture, weights, device)
    classes = tuple(str(index) for index in range(architecture.num_classes or 0))
    return Network(module, architecture, diffusion, classes, hashlib.sha256(data).hexdigest())


def describe_entry(entry: zoo.Entry, shapes: Shapes) -> tuple[Architecture, DiffusionConfig]:
    """Return the architecture and diffusion of a zoo entry.

    If the entry and the tensors of the file have classes, their number is that of the file.
    """
    architecture: Architecture = entry.network
    if architecture.num_classes is not None and num_classes_of(shapes) is not None:
        architecture = with_classes_of(shapes, architecture)
    return architecture, entry.diffusion


def _build_network(
    uri: str, architecture: Architecture, weights: dict[str, Tensor], device: torch.device | str
) -> nn.Module:
    """Return the network with these weights as float32 on `device`, in evaluation mode and without gradients.

    Raises:
        ValueError: a tensor is missing, unexpected or has another shape.
    """
    with torch.device("meta"):  # do not initialise weights that are replaced at once
        module = architecture.build()
    check_tensors(uri, module.state_dict(), weights, architecture)
    module.to_empty(device=device).load_state_dict(weights)
    return module.eval().requires_grad_(False)


def _read_header(file: Any) -> dict[str, Any]:
    """Read what `weights_header` wrote. A safetensors file begins with the length of its JSON header in 8 bytes."""
    length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:  # a file of another format; reading so many bytes would need as much memory
        raise ValueError("it does not begin with a header of safetensors")
    metadata = json.loads(file.read(length)).get("__metadata__", {})
    return json.loads(metadata["admiral"])


@contextlib.contextmanager
def _name_file_in_errors(uri: str) -> Iterator[None]:
    """Turn errors about the content of a weights file into a ValueError that names the file."""
    try:
        yield
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        reason = f"its header has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{uri} is not a weights file of Admiral: {reason}") from error


def save_weights(
    uri: str,
    weights: dict[str, Tensor],
    architecture: Architecture,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a safetensors file with the architecture in its header, unless the file exists.

    training: how the weights were trained, such as the number of images seen; values that JSON can express.
    """
    if not storage.exists(uri):
        write_tensors(uri, weights, weights_header(architecture, diffusion, classes, training))


def weights_header(
    architecture: Architecture,
    diffusion: DiffusionConfig,
    classes: tuple[str, ...],
    training: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return the metadata of a weights file for safetensors; the parameters are those of `save_weights`."""
    header = {
        "format_version": FORMAT_VERSION,
        "kind": architecture.kind,
        "architecture": architecture.model_dump(mode="json"),
        "diffusion": diffusion.model_dump(mode="json"),
        "classes": list(classes),
        "training": training or {},
    }
    return {"admiral": json.dumps(header)}


def lay_out(network: Network, device: torch.device, dtype: str = "float32") -> Network:
    """Convert a network in place for fast sampling, and return it: channels_last on a GPU, and weights in `dtype`."""
    if device.type == "cuda":  # on CPUs, channels_last makes GroupNorm slower
        network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype != "float32":
        halve_weights(network.module, getattr(torch, dtype))
    return network


def weights_about(uri: str) -> dict[str, Any]:
    """Return the header of a weights file without reading its tensors; `weights_header` has its keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a weights file of Admiral.
    """
    with storage.open_input(uri) as file, _name_file_in_errors(uri):
        return _read_header(file)


def weights_file(
    path: str,
    locate: Callable[[str], str],
    recorded: str | None = None,
    kind: str | None = None,
    at: str | None = None,
) -> str:
    """Return the weights file that `path` names: the path itself, or a file of the training run at this path.

    locate: returns the URI of a path.
    recorded: the file that an earlier attempt at the same job used. It is returned again if it belongs to this run, so
        that newer weights do not change the job.
    kind: "ema-0.9999" or "raw"; None = the last kind by name.
    at: a number of images, or "best" for the best snapshot of `kind`, or of all kinds, according to
        `jobs/evaluate_run.py`; None = the newest.

    Raises:
        FileNotFoundError: the run has no weights, or `at` is "best" and the run was not evaluated.
        ValueError: the run has no weights of this kind or no such snapshot.
    """
    if path.endswith((".pt", ".safetensors")) or is_imported(path):
        return path
    folder = storage.join(path, "weights")
    if recorded and recorded.startswith(f"{folder}/"):
        return recorded
    run = locate(path)
    return storage.join(folder, _best_snapshot(run, kind) if at == "best" else _last_snapshot(run, kind, at))


def _last_snapshot(run: str, kind: str | None, at: str | None) -> str:
    """Return the name of the last file in weights/ that has this kind and this number of images, if they are given.

    Names are such as images-000000000512-ema-0.9999.safetensors.
    """
    matches = map(SNAPSHOT.fullmatch, storage.list_names(storage.join(run, "weights")))
    snapshots = [(match[0], match["kind"], str(int(match["images"]))) for match in matches if match]
    if not snapshots:
        raise FileNotFoundError(f"{run} has no weights; a training writes them at its end, or with --snapshot-every")
    _, kinds, images = zip(*snapshots, strict=True)
    if kind not in (None, *kinds):
        raise ValueError(f"{run} has no weights {kind!r}; it has {', '.join(dict.fromkeys(kinds))}")
    matching = [name for name, k, i in snapshots if kind in (None, k) and at in (None, i)]
    if not matching:
        raise ValueError(
            f"--at {at}: {run} has no such snapshot; it has snapshots at {', '.join(dict.fromkeys(images))} images"
        )
    return matching[-1]


def _best_snapshot(run: str, kind: str | None) -> str:
    """Return the name of the best snapshot of `kind`, or of all kinds."""
    uri = storage.join(run, BEST)
    if not storage.exists(uri):
        raise FileNotFoundError(f"--at best: {run} was not evaluated yet; run jobs/evaluate_run.py first")
    best: dict[str, str] = storage.read_json(uri)
    if (kind or ANY) not in best:
        evaluated = ", ".join(sorted(best.keys() - {ANY}))
        raise ValueError(f"--at best: no weights {kind!r} of {run} were evaluated; accepted: {evaluated}")
    return best[kind or ANY]


def write_tensors(uri: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file and return its SHA-256.

    The library writes a temporary local file directly from the memory of the tensors, and that file is streamed to
    `uri`. Writing needs COPY_BYTES of memory, and local disk space for the whole file.
    """
    # The library requires contiguous tensors. Those that are contiguous and on the CPU are not copied.
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="admiral-") as folder:
        local = Path(folder, "tensors.safetensors")
        safetensors.torch.save_file(on_cpu, local, metadata)
        with local.open("rb") as file, storage.open_output(uri) as output:
            while chunk := file.read(COPY_BYTES):
                digest.update(chunk)
                output.write(chunk)
    return digest.hexdigest()
