"""Generation: samples that are functions of (config, seed, index), written as finished shards by a pool of workers."""

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cluster.session import session
from cluster.workers import map_items
from orchestrator import storage
from orchestrator.arithmetic import platform
from orchestrator.closing import next_command, print_closing
from orchestrator.cost import peak_flops
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.cost import Trained, cost_lines, flops_per_sample
from orchestrator.generation.exports import export_npz, export_png
from orchestrator.generation.samples import (
    DamagedShard,
    Shard,
    check_run,
    check_shard,
    encode_rows,
    is_finished,
    list_shards,
    pixel_hashes,
    put_shard,
    quarantine_shard,
    read_range,
    shards_of,
    write_manifest,
    write_run,
)
from orchestrator.generation.sampling import (
    Networks,
    canonical_batch,
    fingerprint,
    load_networks,
)
from orchestrator.generation.worker import SamplingWorker
from orchestrator.pictures import grid_png, png
from orchestrator.progress import Progress, counted, progress_line
from orchestrator.tracking import Tracker, catch_up, tracked
from orchestrator.weights.network import weights_file

METRICS_SECONDS = 5.0  # between two reports to MLflow
PICTURE_SECONDS = 30.0  # between two contact sheets
SHEET = 100  # images of a contact sheet

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ in the driver


def generate(config: GenerationConfig) -> str:
    """Make the samples that are still missing, export them if asked to; return their folder's URI.

    Raises:
        ValueError: weights, classifier and output folder do not fit each other.
        ItemsFailed: some shards failed; all others are written.
    """
    config, networks = _checked(config)
    output, folders = config.path(config.output), folders_of(config)
    if config.indices:
        regenerate(config)
        return output
    if all(is_finished(folder, config.num_samples) for folder in folders):
        print(f"{output} is complete: {counted(config.num_samples, 'sample')}")
        catch_up("generate", config, folders[0])
    else:
        _make_missing(config, folders, flops_per_sample(config, networks))
        print(f"{output}: {counted(config.num_samples, 'sample')}")
    command = next_command("evaluate_samples", samples=config.output)
    print_closing([storage.join(folder, "samples.png") for folder in folders], [command])
    if config.export:
        for folder in folders:
            print(f"exported to {_export(config, folder)}")
    return output


def _checked(config: GenerationConfig) -> tuple[GenerationConfig, Networks]:
    """Return the config with its files of weights, and the networks, after all checks that need no worker.

    Raises what `generate` does.
    """
    config = _with_files(config)
    networks, output = load_networks(config, "cpu"), config.path(config.output)
    wanted = fingerprint(config, networks)
    for folder in folders_of(config):
        check_run(folder, wanted)
    most = max((shard.end for folder in folders_of(config) for shard in list_shards(folder)), default=0)
    if most > config.num_samples and not config.indices:
        raise ValueError(
            f"--num-samples {config.num_samples}: {output} has samples up to index {most - 1} already; pass "
            f"--num-samples {most} or more, or choose another --output"
        )
    return config, networks


def _with_files(config: GenerationConfig) -> GenerationConfig:
    """Return the config with the files of weights that it means: those of the first attempt, which run.json notes."""
    run = storage.join(config.path(config.output), "run.json")
    noted = storage.read_json(run)["record"] if storage.exists(run) else {}
    files = {name: getattr(config, name) for name in ("weights", "classifier", "upsampler")}
    for name, path in files.items():
        if path is not None:
            kind, at = (config.ema, config.at) if name == "weights" else (None, None)
            same = name != "weights" or (noted.get("ema"), noted.get("at")) == (kind, at)
            files[name] = weights_file(path, config.path, noted.get(name) if same else None, kind, at)
    if config.guidance.weak_weights is not None:
        weak = weights_file(config.guidance.weak_weights, config.path, noted.get("weak_weights"), None)
        files["guidance"] = config.guidance.model_copy(update={"weak_weights": weak})
    return config.model_copy(update=files)


def _make_missing(config: GenerationConfig, folders: list[str], flops: float) -> None:
    """Hand every shard to the pool: those that are there are verified, the others made; then declare them finished.

    flops: of one sample.
    """
    digests: dict[str, dict[Shard, str]] = {folder: {} for folder in folders}
    with (
        session(
            config.num_workers * config.num_threads,
            num_gpus=config.num_workers * config.num_gpus,
            shared=config.shared,
        ),
        tracked("generate", config, folders[0]) as tracker,
        progress_line(config.num_samples, "samples") as progress,
    ):
        live = _Live(tracker, progress, folders[-1], flops / max(config.num_workers, 1))
        finished = map_items(
            partial(make_generator, config),
            _shards(config),
            config.num_workers,
            num_cpus=config.num_threads,
            num_gpus=config.num_gpus,
        )
        for shard, made in finished:
            live.update(shard, made)
            for folder, digest in zip(folders, made.digests, strict=True):
                digests[folder][shard] = digest
        live.report()
        for folder in folders:
            first, _ = read_range(folder, 0, min(SHEET, config.num_samples))
            sheet = _sheet(first)
            storage.write_bytes(storage.join(folder, "samples.png"), sheet)
            tracker.picture(f"{folder.rsplit('/', 1)[-1]}.png", sheet)
            write_manifest(folder, digests[folder])


class _Live:
    """What one sees while shards come in: the line, and now and then numbers and the newest pictures in MLflow."""

    def __init__(self, tracker: Tracker, progress: Progress, folder: str, flops: float) -> None:
        """flops: of a sample, over the number of workers."""
        self._tracker, self._progress, self._folder, self._flops = tracker, progress, folder, flops
        self._peak: float | None = None  # FLOP/s of a worker, where it is known
        self._made, self._begun = 0, time.monotonic()
        self._numbers_at = self._picture_at = self._begun

    def update(self, shard: Shard, made: "Finished") -> None:
        """Count a shard."""
        count, now = shard.end - shard.begin, time.monotonic()
        for reason in made.damaged:
            log.warning("regenerated, the old bytes are kept under quarantine/: %s", reason)
        if not made.drawn:
            self._progress.skip(count)
            return
        self._progress.update_to(self._progress.done + count)
        self._made, self._peak = self._made + count, made.peak
        if now - self._numbers_at > METRICS_SECONDS:
            self.report()
            self._numbers_at = now
        if now - self._picture_at > PICTURE_SECONDS:
            newest, _ = read_range(self._folder, shard.begin, min(shard.end, shard.begin + SHEET))
            self._tracker.picture("newest.png", _sheet(newest))
            self._picture_at = now

    def report(self) -> None:
        """Report how many there are, and how fast those of this job came: also as the share of the GPUs' peak."""
        rate = self._made / (time.monotonic() - self._begun)
        metrics = {"samples": self._progress.done, "samples_per_second": rate}
        if self._peak:
            metrics["mfu"] = rate * self._flops / self._peak
        self._tracker.metrics(metrics, self._progress.done)


def _sheet(images: np.ndarray) -> bytes:
    return grid_png(images, columns=10, scale=max(1, 48 // images.shape[1]))


def regenerate(config: GenerationConfig) -> None:
    """Regenerate `indices` by their canonical batches, keep them under regenerated/ and compare their pixels.

    Raises:
        RuntimeError: some differ from those in the folder.
    """
    wanted, differing = sorted(set(config.indices)), list[str]()
    with session(
        config.num_workers * config.num_threads,
        num_gpus=config.num_workers * config.num_gpus,
        shared=config.shared,
    ):
        make = partial(make_index_maker, config)
        made = dict(map_items(make, wanted, config.num_workers, config.num_threads, config.num_gpus))
    for stage, folder in enumerate(folders_of(config)):
        there = list_shards(folder)
        for index in wanted:
            image = made[index][stage]
            storage.write_bytes(storage.join(folder, "regenerated", f"{index:06d}.png"), png(image))
            found = "not there to be compared"
            if any(shard.begin <= index < shard.end for shard in there):
                difference = np.abs(read_range(folder, index, index + 1)[0][0].astype(int) - image).max()
                found = f"differs by up to {difference} grey levels" if difference else "equal"
                differing += [f"{index} in {folder}"] if difference else []
            print(f"{folder} index {index}: {pixel_hashes(image[None])[0]} {found}")
    if differing:
        raise RuntimeError(f"{len(differing)} regenerated samples differ from the stored ones: {', '.join(differing)}")


def _export(config: GenerationConfig, folder: str) -> str:
    if config.export == "npz":
        export_npz(folder, target := storage.join(folder, "samples.npz"))
    else:
        export_png(folder, target := storage.join(folder, "png"))
    return target


def folders_of(config: GenerationConfig) -> list[str]:
    """The folder of the samples and, in a cascade, of the enlarged ones."""
    output = config.path(config.output)
    return [output, storage.join(output, "upsampled")] if config.upsampler else [output]


def _shards(config: GenerationConfig) -> Iterator[Shard]:
    """Yield the shards that the finished folders will have."""
    there = {shard for folder in folders_of(config) for shard in list_shards(folder)}
    return shards_of(config.num_samples, config.shard_size, there)


def missing_shards(config: GenerationConfig) -> list[Shard]:
    """Return the shards that are not there yet, by their names."""
    there = [set(list_shards(folder)) for folder in folders_of(config)]
    return [shard for shard in _shards(config) if not all(shard in found for found in there)]


def plan(config: GenerationConfig, trained: Trained | None = None) -> tuple[GenerationConfig, str]:
    """Return the resolved config, and what a generation would read, write and cost.

    trained: what trainings will leave, for weights that are not there yet.

    Raises:
        ValueError: what `generate` would refuse before it starts.
    """
    with contextlib.suppress(FileNotFoundError):  # the last line names what is not there yet
        config, _ = _checked(config)
    todo, shards = missing_shards(config), len(list(_shards(config)))
    images = sum(shard.end - shard.begin for shard in todo)
    makes = f"makes   {config.path(config.output)}: {len(todo)} of {shards} shards are missing"
    return config, "\n".join([makes, *cost_lines(config, images, trained or {})])


# ------------------------------------------------------------------------------------------------ in every worker


class Finished(NamedTuple):
    """A shard as a worker left it."""

    digests: tuple[str, ...]  # in each folder
    drawn: bool  # now, by this worker
    damaged: tuple[str, ...] = ()  # what was found damaged
    peak: float | None = None  # FLOP/s of the worker's device, where it is known


def _make_worker(config: GenerationConfig) -> tuple[SamplingWorker, GenerationConfig]:
    """Set up a worker; return it and the config with B in it: the folder's, if it has finished samples, or its own.

    Raises:
        ValueError: the folder belongs to another config, or to another platform.
    """
    worker = SamplingWorker(config)
    size = _batch_size_of(config, worker) or config.batch_size
    size = size or canonical_batch(config, worker.networks, worker.device)
    if config.compile:
        worker.compile()
    return worker, config.model_copy(update={"batch_size": size})


def _batch_size_of(config: GenerationConfig, worker: SamplingWorker) -> int:
    """Return the B that the folders are bound to, 0 if to none. Raises what `_make_worker` does."""
    size = config.batch_size
    for folder in folders_of(config):
        wanted = fingerprint(config.model_copy(update={"batch_size": size}), worker.networks)
        run = check_run(folder, wanted, None if config.mixed_platforms else platform(worker.device))
        if run is None:
            return 0
        size = run["config"]["batch_size"]
    return size


def _bind(config: GenerationConfig, asked: int, worker: SamplingWorker) -> int:
    """Bind the folders to this config, unless another worker did; return the B that they are bound to.

    asked: the batch size that the job's config states, 0 if it leaves it open.
    """
    for folder in folders_of(config):
        wanted = fingerprint(config, worker.networks)
        write_run(folder, wanted, platform(worker.device), _record(config, worker.networks))
    return _batch_size_of(config.model_copy(update={"batch_size": asked}), worker)


def _record(config: GenerationConfig, networks: Networks) -> dict[str, Any]:
    """Return what is noted in run.json and never compared with another attempt's config."""
    commit = None
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    names = {"weights", "ema", "at", "classifier", "upsampler", "recipe", "labels", "num_workers"}
    noted = config.model_dump(mode="json", include=names)
    noted["weak_weights"] = config.guidance.weak_weights
    return {"commit": commit, "begun": begun, "classes": networks.classes, **noted}


def make_generator(config: GenerationConfig) -> Callable[[Shard], Finished]:
    """A worker: networks loaded once, then shards, each verified where it is there and drawn where it is not.

    The first shard that is drawn binds the folders to the config, so that a start that fails before binds nothing.
    """
    asked = config.batch_size
    worker, config = _make_worker(config)
    folders, peak = folders_of(config), peak_flops(platform(worker.device)["device"], config.dtype)
    encoder = ThreadPoolExecutor(1, "encoder")  # pictures are encoded while the next batch is drawn

    def draw(shard: Shard, size: int) -> list[pa.Table]:
        encoded: list[list[Any]] = [[] for _ in folders]
        first = shard.begin // size
        sized = config.model_copy(update={"batch_size": size})
        for stages in worker.batches(sized, range(first, -(-shard.end // size))):
            for rows, samples in zip(encoded, stages, strict=True):
                rows.append(encoder.submit(encode_rows, samples))
        whole = [pa.concat_tables([part.result() for part in rows]) for rows in encoded]
        return [rows.slice(shard.begin - first * size, shard.end - shard.begin) for rows in whole]

    def make_shard(shard: Shard) -> Finished:
        nonlocal config
        found, damaged = zip(*(_verify(folder, shard) for folder in folders), strict=True)
        if all(found):
            return Finished(found, drawn=False)
        tables = draw(shard, config.batch_size)
        if (size := _bind(config, asked, worker)) != config.batch_size:  # another worker was quicker, with another B
            config = config.model_copy(update={"batch_size": size})
            tables = draw(shard, size)
        digests = []
        for folder, rows, digest, reason in zip(folders, tables, found, damaged, strict=True):
            digests.append(digest or put_shard(folder, shard, rows, replace=bool(reason)))
        return Finished(tuple(digests), drawn=True, damaged=tuple(filter(None, damaged)), peak=peak)

    return make_shard


def _verify(folder: str, shard: Shard) -> tuple[str | None, str]:
    """(digest, "") of a whole shard, (None, "") of an absent one, (None, reason) of one found damaged twice."""
    try:
        return check_shard(folder, shard), ""
    except DamagedShard:
        pass
    try:
        return check_shard(folder, shard), ""
    except DamagedShard as error:
        quarantine_shard(folder, shard)
        return None, str(error)


def make_index_maker(config: GenerationConfig) -> Callable[[int], tuple[np.ndarray, ...]]:
    """A worker that draws one index by its canonical batch: uint8 [H, W, 3] of each stage."""
    worker, config = _make_worker(config)

    def make_index(index: int) -> tuple[np.ndarray, ...]:
        number, place = divmod(index, config.batch_size)
        (stages,) = worker.batches(config, [number])
        return tuple(samples.images[place] for samples in stages)

    return make_index
