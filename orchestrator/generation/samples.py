"""A folder of samples: run.json, shards of consecutive indices, and manifest.json, which is written last.

A shard is a Parquet file with the columns `index`, `label`, `image` (PNG) and `sha256` (of the raw pixels, uint8
[H, W, 3] in C order). The digest of a shard is the SHA-256 of its rows' concatenated SHA-256s.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.config import differences
from orchestrator.data.images import decode
from orchestrator.pictures import png

FORMAT_VERSION = 1
DECODERS = 4  # threads that decode images


class Samples(NamedTuple):
    """Consecutive samples: index int64 [n], label int64 [n] (-1 = none), images uint8 [n, H, W, 3]."""

    indices: np.ndarray
    labels: np.ndarray
    images: np.ndarray


class Shard(NamedTuple):
    """The indices [begin, end) of the samples in one file."""

    begin: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.begin:06d}-{self.end:06d}.parquet"

    def uri(self, folder: str) -> str:
        """Return the URI of the shard in a folder of samples."""
        return storage.join(folder, "shards", self.name)


class DamagedShard(ValueError):
    """The file of a shard is damaged, incomplete, or that of another shard."""


def shards_of(num_samples: int, size: int, existing: Iterable[Shard] = ()) -> Iterator[Shard]:
    """Yield the shards of a finished folder in index order: the existing ones, and new ones of at most `size` samples.

    The last shard of a folder that was finished with fewer samples stays, although it may have fewer than `size`.
    """
    begin = 0
    for shard in [*sorted(existing), Shard(num_samples, num_samples)]:
        while begin < shard.begin:
            end = min((begin // size + 1) * size, shard.begin)
            yield Shard(begin, end)
            begin = end
        if shard.end > shard.begin:
            yield shard
        begin = shard.end


def list_shards(folder: str) -> list[Shard]:
    """Return the existing shards in index order."""
    names = storage.list_names(storage.join(folder, "shards"))
    bounds = [name.removesuffix(".parquet").split("-") for name in names if name.endswith(".parquet")]
    return sorted(Shard(int(begin), int(end)) for begin, end in bounds)


# ------------------------------------------------------------------------------------------------ run.json


def check_run(folder: str, requested: dict[str, Any], platform: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the folder's run.json, or None if there is none. Check that it has the requested config and platform.

    requested: the fingerprint of a generation.
    platform: the device and software of this worker; None = not compared.

    Raises:
        ValueError: config or platform differ; the message names the differences.
    """
    uri = storage.join(folder, "run.json")
    if not storage.exists(uri):
        return None
    run = storage.read_json(uri)
    if run.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{uri}: format_version={run.get('format_version')} is not supported, {FORMAT_VERSION} is expected; pass "
            "another --output"
        )
    # A batch size that the config leaves open is not compared, nor num_samples, which only older folders have.
    compared = run["config"].keys() - {"num_samples"} - ({"batch_size"} - requested.keys())
    if changes := differences({name: run["config"][name] for name in compared}, requested):
        raise ValueError(
            f"{folder} was made with another config ({changes}); only what --help marks [operational] and "
            "--num-samples may change: choose another --output or the same config"
        )
    if platform is not None and (changes := differences(run["platform"], platform)):
        raise ValueError(
            f"{folder} was made on another platform ({changes}), so pixels may differ; pass --mixed-platforms to "
            "continue it here"
        )
    return run


def write_run(folder: str, config: dict[str, Any], platform: dict[str, Any], record: dict[str, Any]) -> None:
    """Write run.json unless it exists: `config` and `platform` are compared later, `record` is not."""
    run = {"format_version": FORMAT_VERSION, "config": config, "platform": platform, "record": record}
    storage.put_if_absent(storage.join(folder, "run.json"), storage.json_bytes(run))


# ------------------------------------------------------------------------------------------------ shards


def encode_rows(samples: Samples) -> pa.Table:
    """Return samples as the rows of a shard."""
    return pa.table(
        {
            "index": pa.array(samples.indices, pa.int64()),
            "label": pa.array(samples.labels, pa.int64()),
            "image": pa.array([png(image) for image in samples.images], pa.binary()),
            "sha256": pa.array(map(_sha256, samples.images), pa.binary(32)),
        }
    )


def put_shard(folder: str, shard: Shard, rows: pa.Table, replace: bool = False) -> str:
    """Write a shard unless it exists, and return its digest.

    replace: overwrite an existing shard.

    Raises:
        RuntimeError: another worker has written the shard with other pixels.
    """
    buffer, uri, digest = io.BytesIO(), shard.uri(folder), _digest(rows)
    pq.write_table(rows, buffer, compression="none")  # PNG does not compress again
    if replace:
        storage.write_bytes(uri, buffer.getvalue())
    elif not storage.put_if_absent(uri, buffer.getvalue()) and check_shard(folder, shard) != digest:
        raise RuntimeError(f"{uri} was written by another worker with other pixels")
    return digest


def check_shard(folder: str, shard: Shard) -> str | None:
    """Read a shard, verify all pixels, and return its digest, or None if the shard does not exist.

    Raises:
        DamagedShard: the file is truncated, pixels do not have the stored hashes, or rows are missing.
    """
    uri = shard.uri(folder)
    try:
        rows = _read_rows(uri)
    except FileNotFoundError:
        return None
    if rows["index"].to_pylist() != list(range(*shard)):
        raise DamagedShard(f"{uri} does not have exactly the indices {shard.begin} to {shard.end - 1}")
    for index, image, sha256 in zip(*(rows[name].to_pylist() for name in ("index", "image", "sha256")), strict=True):
        if _sha256(_pixels(uri, index, image)) != sha256:
            raise DamagedShard(f"{uri}: the pixels of index {index} do not have the stored SHA-256")
    return _digest(rows)


def quarantine_shard(folder: str, shard: Shard) -> None:
    """Copy a damaged shard to quarantine/."""
    storage.put_if_absent(storage.join(folder, "quarantine", shard.name), storage.read_bytes(shard.uri(folder)))


def _read_rows(uri: str) -> pa.Table:
    """Read all rows of a shard; raise DamagedShard if it is not a valid file with all columns."""
    data = storage.read_bytes(uri)
    try:
        rows = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise DamagedShard(f"{uri} is not a valid Parquet file: {error}") from error
    if missing := {"index", "label", "image", "sha256"} - set(rows.column_names):
        raise DamagedShard(f"{uri} has no column {min(missing)!r}")
    return rows


def _pixels(uri: str, index: int, image: bytes) -> np.ndarray:
    try:
        return np.asarray(decode(image))
    except ValueError as error:
        raise DamagedShard(f"{uri}: the image of index {index} cannot be decoded: {error}") from error


def _sha256(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _digest(rows: pa.Table) -> str:
    return hashlib.sha256(b"".join(rows["sha256"].to_pylist())).hexdigest()


# ------------------------------------------------------------------------------------------------ whole folders


def write_manifest(folder: str, digests: dict[Shard, str]) -> None:
    """Write manifest.json, which marks a folder as finished: its shards in index order with their digests.

    Raises:
        RuntimeError: a shard was deleted during the job.
    """
    if deleted := digests.keys() - set(list_shards(folder)):
        raise RuntimeError(f"{min(deleted).uri(folder)} was deleted during the job; the same command regenerates it")
    shards = [
        {"name": shard.name, "rows": shard.end - shard.begin, "sha256": digest}
        for shard, digest in sorted(digests.items())
    ]
    manifest = {"format_version": FORMAT_VERSION, "num_samples": max(digests).end, "shards": shards}
    storage.write_bytes(storage.join(folder, "manifest.json"), storage.json_bytes(manifest))


def is_finished(folder: str, num_samples: int) -> bool:
    """Return whether a folder is finished and has at least `num_samples` samples."""
    try:
        return count_samples(folder) >= num_samples
    except FileNotFoundError:
        return False


def count_samples(folder: str) -> int:
    """Return the number of samples in a finished folder.

    Raises:
        FileNotFoundError: the folder is not finished.
    """
    try:
        return storage.read_json(storage.join(folder, "manifest.json"))["num_samples"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} has no finished samples; generate them first") from error


def read_range(folder: str, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [n, H, W, 3] and labels int64 [n] of the indices [begin, end) in a samples folder.

    Raises:
        FileNotFoundError: some of the samples do not exist.
        DamagedShard: a shard cannot be read.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    with ThreadPoolExecutor(DECODERS) as threads:  # Pillow releases the GIL while it decodes
        for _, rows in read_rows(folder, begin, end):
            images += threads.map(partial(_pixels, folder), rows["index"], rows["image"])
            labels += rows["label"]
    if len(images) != end - begin:
        raise FileNotFoundError(
            f"{folder} has only {len(images)} of the indices {begin} to {end - 1}; generate the others first"
        )
    return np.stack(images), np.array(labels, np.int64)


def read_rows(folder: str, begin: int, end: int) -> Iterator[tuple[Shard, dict[str, list[Any]]]]:
    """Yield (shard, columns) of the rows whose index is in [begin, end), shard by shard; images are PNG bytes."""
    for shard in list_shards(folder):
        if shard.begin < end and shard.end > begin:
            rows = _read_rows(shard.uri(folder))
            first = max(begin - shard.begin, 0)
            yield shard, rows.slice(first, min(end, shard.end) - shard.begin - first).to_pydict()


def pixel_hashes(images: np.ndarray) -> list[str]:
    """Return the SHA-256 of the raw pixels of each image; images uint8 [n, H, W, 3]."""
    return [_sha256(image).hex() for image in images]
