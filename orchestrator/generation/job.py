"""Generate samples: a pool of workers draws them and writes them as shards.

A sample depends only on the config, the seed and its index.
"""

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cluster.relay import Report, item_progress, no_report
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
    SamplingWorker,
    canonical_batch,
    fingerprint,
    load_networks,
    make_batch,
)
from orchestrator.pictures import grid_png, png
from orchestrator.progress import counted, progress_line
from orchestrator.tracking import catch_up, tracked
from orchestrator.weights.network import weights_file

METRICS_SECONDS = 5.0  # between two records of metrics
SHEET = 100  # images in samples.png

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ in the driver


def generate(config: GenerationConfig) -> str:
    """Generate the samples that are missing, export them if the config says so, and return their folder's URI.

    Raises:
        ValueError: weights, classifier and output folder do not fit each other.
        ItemsFailed: some shards failed; all others are written.
    """
    config, networks = _check_and_load(config)
    output = config.path(config.output)
    folders = folders_of(config)
    if config.indices:
        regenerate(config)
        return output
    if all(is_finished(folder, config.num_samples) for folder in folders):
        print(f"{output} is complete: {counted(config.num_samples, 'sample')}")
        catch_up("generate", config, folders[0])
    else:
        _generate_missing(config, folders, flops_per_sample(config, networks))
        print(f"{output}: {counted(config.num_samples, 'sample')}")
    command = next_command("evaluate_samples", samples=config.output)
    print_closing([storage.join(folder, "samples.png") for folder in folders], [command])
    if config.export:
        export, name = {"npz": (export_npz, "samples.npz"), "png": (export_png, "png")}[config.export]
        for folder in folders:
            target = storage.join(folder, name)
            export(folder, target)
            print(f"exported to {target}")
    return output


def _check_and_load(config: GenerationConfig) -> tuple[GenerationConfig, Networks]:
    """Run all checks that need no worker. Return the config with its weights resolved to files, and the networks.

    Raises what `generate` does.
    """
    config = _resolve_weights(config)
    networks = load_networks(config, "cpu")
    requested = fingerprint(config, networks)
    for folder in folders_of(config):
        check_run(folder, requested)
    num_existing = max((shard.end for folder in folders_of(config) for shard in list_shards(folder)), default=0)
    if num_existing > config.num_samples and not config.indices:
        raise ValueError(
            f"--num-samples {config.num_samples}: {config.path(config.output)} has samples up to index "
            f"{num_existing - 1} already; pass --num-samples {num_existing} or more, or choose another --output"
        )
    return config, networks


def _resolve_weights(config: GenerationConfig) -> GenerationConfig:
    """Return the config with a file in place of each run folder: the file that run.json records, or else the newest."""
    run = storage.join(config.path(config.output), "run.json")
    recorded = storage.read_json(run)["record"] if storage.exists(run) else {}
    if (recorded.get("ema"), recorded.get("at")) != (config.ema, config.at):  # another snapshot is requested
        recorded.pop("weights", None)

    def resolve(name: str, path: str | None) -> str | None:
        return path and weights_file(path, config.path, recorded.get(name))

    weights = weights_file(config.weights, config.path, recorded.get("weights"), config.ema, config.at)
    try:
        classifier = resolve("classifier", config.classifier)
    except FileNotFoundError as error:
        if config.guidance.scale:
            raise
        raise FileNotFoundError(f"{error}; --guidance.scale 0 needs none: pass --classifier none") from error
    weak_weights = resolve("weak_weights", config.guidance.weak_weights)
    changes = {
        "weights": weights,
        "classifier": classifier,
        "upsampler": resolve("upsampler", config.upsampler),
        "guidance": config.guidance.model_copy(update={"weak_weights": weak_weights}),
    }
    return config.model_copy(update=changes)


def _session(config: GenerationConfig) -> contextlib.AbstractContextManager[None]:
    cpus, gpus = config.num_workers * config.num_threads, config.num_workers * config.num_gpus
    return session(cpus, num_gpus=gpus, shared=config.shared)


def _generate_missing(config: GenerationConfig, folders: list[str], flops: float) -> None:
    """Verify the existing shards and draw the others on a pool of workers, then write the manifests.

    flops: FLOPs of one sample, for the MFU.
    """
    digests: dict[str, dict[Shard, str]] = {folder: {} for folder in folders}
    num_done = num_drawn = 0  # samples in finished shards, and those of them that this job drew
    num_workers = config.num_workers
    with (
        _session(config),
        tracked("generate", config, folders[0]) as tracker,
        progress_line(config.num_samples, "samples") as progress,
        item_progress(progress.update_item, num_workers) as report,
    ):
        make_worker = partial(make_generator, config, report=report)
        start = last_record = time.monotonic()
        shards = _shards(config)
        for shard, finished in map_items(make_worker, shards, num_workers, config.num_threads, config.num_gpus):
            for reason in finished.damaged:
                log.warning("a damaged shard was regenerated; its old bytes are in quarantine/: %s", reason)
            for folder, digest in zip(folders, finished.digests, strict=True):
                digests[folder][shard] = digest
            count = shard.end - shard.begin
            progress.finish_item(shard, count, in_rate=finished.drawn)
            num_done += count
            num_drawn += count if finished.drawn else 0
            now = time.monotonic()
            if now - last_record > METRICS_SECONDS or num_done == config.num_samples:
                metrics = {"samples": num_done, "samples_per_second": num_drawn / (now - start)}
                if finished.peak_flops:
                    total_peak = finished.peak_flops * max(num_workers, 1)
                    metrics["mfu"] = metrics["samples_per_second"] * flops / total_peak
                tracker.metrics(metrics, num_done)
                last_record = now
        for folder in folders:
            images, _ = read_range(folder, 0, min(SHEET, config.num_samples))
            sheet = grid_png(images, columns=10, scale=max(1, 48 // images.shape[1]))
            storage.write_bytes(storage.join(folder, "samples.png"), sheet)
            tracker.picture(f"{folder.rsplit('/', 1)[-1]}.png", sheet)
            write_manifest(folder, digests[folder])


def regenerate(config: GenerationConfig) -> None:
    """Draw `indices` again in their canonical batches, write them to regenerated/, and compare their pixels.

    Raises:
        RuntimeError: some of them differ from the samples in the folder.
    """
    indices = sorted(set(config.indices))
    differing: list[str] = []
    with _session(config):
        make_worker = partial(make_index_maker, config)
        images = dict(map_items(make_worker, indices, config.num_workers, config.num_threads, config.num_gpus))
    for stage, folder in enumerate(folders_of(config)):
        shards = list_shards(folder)
        for index in indices:
            image = images[index][stage]
            storage.write_bytes(storage.join(folder, "regenerated", f"{index:06d}.png"), png(image))
            outcome = "not in the folder, so not compared"
            if any(shard.begin <= index < shard.end for shard in shards):
                stored = read_range(folder, index, index + 1)[0][0]
                difference = np.abs(stored.astype(int) - image).max()
                outcome = f"differs by up to {difference} grey levels" if difference else "equal"
                differing += [f"{index} in {folder}"] if difference else []
            print(f"{folder} index {index}: {pixel_hashes(image[None])[0]} {outcome}")
    if differing:
        raise RuntimeError(f"{len(differing)} regenerated samples differ from the stored ones: {', '.join(differing)}")


def folders_of(config: GenerationConfig) -> list[str]:
    """Return the folder of the samples and, in a cascade, the folder of the enlarged samples."""
    output = config.path(config.output)
    return [output, storage.join(output, "upsampled")] if config.upsampler else [output]


def _shards(config: GenerationConfig) -> Iterator[Shard]:
    """Yield the shards that the folders will have when they are finished."""
    existing = {shard for folder in folders_of(config) for shard in list_shards(folder)}
    return shards_of(config.num_samples, config.shard_size, existing)


def plan(config: GenerationConfig, trained: Trained | None = None) -> tuple[GenerationConfig, str]:
    """Return the resolved config, and the text of a dry run: what the generation would read, write and cost.

    trained: networks for weights that do not exist yet, see `orchestrator.generation.cost.Trained`.

    Raises:
        ValueError: what `generate` would refuse before it starts.
    """
    with contextlib.suppress(FileNotFoundError):  # the last line of the text names the files that are missing
        config, _ = _check_and_load(config)
    shards, in_all_folders = list(_shards(config)), set.intersection(*(set(list_shards(f)) for f in folders_of(config)))
    missing = [shard for shard in shards if shard not in in_all_folders]  # existing shards are not read
    num_images = sum(shard.end - shard.begin for shard in missing)
    summary = f"makes   {config.path(config.output)}: {len(missing)} of {len(shards)} shards are missing"
    return config, "\n".join([summary, *cost_lines(config, num_images, trained or {})])


# ------------------------------------------------------------------------------------------------ in every worker


class Finished(NamedTuple):
    """The result of a worker for one shard."""

    digests: tuple[str, ...]  # of the shard in each folder
    drawn: bool  # False if the shard existed already in all folders
    damaged: tuple[str, ...]  # for each folder whose shard was damaged and replaced, what was wrong with it
    peak_flops: float | None  # peak FLOP/s of the worker's device, if it is known


def _make_worker(config: GenerationConfig) -> tuple[SamplingWorker, GenerationConfig]:
    """Return a worker, and the config with the batch size B: that of the folders or the config, or else a chosen one.

    Raises:
        ValueError: the folders were made with another config or on another platform.
    """
    worker = SamplingWorker(config)
    size = _batch_size_of(config, worker) or canonical_batch(config, worker.networks, worker.device)
    if config.compile:
        worker.compile()
    return worker, config.model_copy(update={"batch_size": size})


def _batch_size_of(config: GenerationConfig, worker: SamplingWorker) -> int:
    """Return the batch size in the folders' run.json, or else that of the config; 0 if both leave it open.

    Raises what `_make_worker` does.
    """
    this_platform = None if config.mixed_platforms else platform(worker.device)
    for folder in folders_of(config):
        if run := check_run(folder, fingerprint(config, worker.networks), this_platform):
            config = config.model_copy(update={"batch_size": run["config"]["batch_size"]})
    return config.batch_size


def _write_run_files(config: GenerationConfig, requested_size: int, worker: SamplingWorker) -> int:
    """Write run.json into the folders unless another worker did; return the batch size in it.

    requested_size: the batch size in the config of the job, 0 if that leaves the choice to the workers.
    """
    for folder in folders_of(config):
        record = _run_record(config, worker.networks)
        write_run(folder, fingerprint(config, worker.networks), platform(worker.device), record)
    return _batch_size_of(config.model_copy(update={"batch_size": requested_size}), worker)


def _run_record(config: GenerationConfig, networks: Networks) -> dict[str, Any]:
    """Return the part of run.json that later attempts are not compared with: what was run, and the files it used."""
    commit = None
    with contextlib.suppress(OSError):  # git is not installed
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    names = {"weights", "ema", "at", "classifier", "upsampler", "recipe", "labels", "num_workers"}
    fields = config.model_dump(mode="json", include=names)
    fields["weak_weights"] = config.guidance.weak_weights
    return {"commit": commit, "begun": begun, "classes": networks.classes, **fields}


def make_generator(config: GenerationConfig, report: Report = no_report) -> Callable[[Shard], Finished]:
    """Load the networks; return a function that verifies a shard if it exists and draws it if it does not.

    The first shard that is drawn binds the folders to the config, so an attempt that fails earlier binds nothing.

    report: called after every batch with the shard and the number of its samples that are drawn.
    """
    requested_size = config.batch_size
    worker, config = _make_worker(config)
    folders = folders_of(config)
    device_flops = peak_flops(platform(worker.device)["device"], config.dtype)
    encoder = ThreadPoolExecutor(1, "encoder")  # encodes PNGs while the next batch is drawn

    def draw(shard: Shard) -> list[pa.Table]:
        """Return the rows of a shard in each stage."""
        size = config.batch_size
        first_batch = shard.begin // size
        encoded: list[tuple[Future[pa.Table], ...]] = []  # for each batch, its rows in each stage
        for number in range(first_batch, -(-shard.end // size)):
            stages = make_batch(worker.networks, config, number)
            encoded.append(tuple(encoder.submit(encode_rows, samples) for samples in stages))
            report(shard, min((number + 1) * size, shard.end) - shard.begin)
        tables = [pa.concat_tables([future.result() for future in futures]) for futures in zip(*encoded, strict=True)]
        # The batches at both ends may have samples of other shards.
        return [rows.slice(shard.begin - first_batch * size, shard.end - shard.begin) for rows in tables]

    def make_shard(shard: Shard) -> Finished:
        nonlocal config
        existing, damaged = zip(*(_verify(folder, shard) for folder in folders), strict=True)
        if all(existing):
            return Finished(existing, drawn=False, damaged=(), peak_flops=device_flops)
        tables = draw(shard)
        size = _write_run_files(config, requested_size, worker)
        if size != config.batch_size:  # another worker wrote run.json first, with another batch size
            config = config.model_copy(update={"batch_size": size})
            tables = draw(shard)
        digests = tuple(
            digest or put_shard(folder, shard, rows, replace=bool(reason))
            for folder, rows, digest, reason in zip(folders, tables, existing, damaged, strict=True)
        )
        return Finished(digests, drawn=True, damaged=tuple(filter(None, damaged)), peak_flops=device_flops)

    return make_shard


def _verify(folder: str, shard: Shard) -> tuple[str | None, str]:
    """Return (digest, "") for a valid shard, (None, "") if there is none, and (None, reason) for a damaged one.

    Copy a damaged shard to quarantine/.
    """
    for _ in range(2):  # read twice, because the first read may have been truncated
        try:
            return check_shard(folder, shard), ""
        except DamagedShard as error:
            reason = str(error)
    quarantine_shard(folder, shard)
    return None, reason


def make_index_maker(config: GenerationConfig) -> Callable[[int], tuple[np.ndarray, ...]]:
    """Load the networks; return a function from an index to its image in each stage, uint8 [H, W, 3].

    The function draws the canonical batch that contains the index.
    """
    worker, config = _make_worker(config)

    def make_index(index: int) -> tuple[np.ndarray, ...]:
        number, row = divmod(index, config.batch_size)
        return tuple(samples.images[row] for samples in make_batch(worker.networks, config, number))

    return make_index
