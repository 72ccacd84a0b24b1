"""Training: one loop for the diffusion model, the noisy classifier and the upsampler.

Lengths and intervals are in images, not steps, so that they do not depend on the batch size. The order of the samples
and all randomness come from the order plan and its keys; nothing depends on the rank of a worker.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from cluster.collectives import Group
from cluster.session import session
from cluster.trainer import WorkerContext, run_workers
from cluster.watchdog import Watchdog
from models.costs import count_parameters, training_state_bytes
from models.diffusion import LossSecondMomentTimesteps
from orchestrator import storage
from orchestrator.arithmetic import arithmetic, choose_device, is_out_of_memory, platform
from orchestrator.closing import print_closing
from orchestrator.config import read_config
from orchestrator.cost import GPUS, not_there_yet, priced, training_cost
from orchestrator.data.dataset import Manifest, ahead, batches, load_manifest
from orchestrator.order import OrderPlan
from orchestrator.progress import Progress, counted, progress_line
from orchestrator.tracking import Tracker, catch_up, tracked
from orchestrator.training import checkpoints
from orchestrator.training.audit_log import AuditLog
from orchestrator.training.checkpoint_writer import CheckpointWriter
from orchestrator.training.checkpoints import Checkpoint, UnusableCheckpoints
from orchestrator.training.config import AdmConfig, Config, TrainingConfig
from orchestrator.training.continuing import branch_off, check_and_write_config, check_folder, parent_of
from orchestrator.training.gradients import make_reduction, memory_of, prepare_network, recomputes
from orchestrator.training.initial_weights import check_initial_weights, load_initial_weights
from orchestrator.training.lease import Lease
from orchestrator.training.losses import Losses, Microbatch, Terms, make_losses, make_microbatches
from orchestrator.training.meter import Meter
from orchestrator.training.page import REPORT, STARTED, classifier_lines, command_for_next_job, write_run_page
from orchestrator.training.previews import previews
from orchestrator.training.profiling import step_profiler
from orchestrator.training.snapshots import final_weights, is_snapshot_due, write_snapshots
from orchestrator.training.state import TrainingState, take_step
from orchestrator.training.validation import Validation, validation_count

DATA_CPUS = 1  # CPUs of each worker for reading its data, in addition to num_threads for its arithmetic

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ in the driver


def train(config: Config) -> str:
    """Train until `config.total_images` images, from the newest checkpoint if there is one; return the run's URI.

    With `config.report`, only write the page of the run in its current state, which may be unfinished.

    Raises:
        FileNotFoundError: there is no dataset or, with `config.report`, no run.
        ValueError: config, dataset and output folder do not fit each other.
        RuntimeError: the training failed, or another driver trains this run.
        KeyboardInterrupt: a signal stopped the training before its end; it wrote a checkpoint.
    """
    if config.report:
        run = config.path(config.output)
        if not read_config(run):
            raise FileNotFoundError(f"--output {config.output}: {run} is not a training run; train it first")
        write_run_page(run, config)
        print_closing([storage.join(run, REPORT)], [])
        return run
    manifest = load_manifest(config.path(config.dataset))
    config = _check_and_resolve(config, manifest)
    run = config.path(config.branch or config.output)
    if not config.branch and storage.exists(final_weights(run, config)):
        check_and_write_config(config)
        print(f"{run} is trained already: {config.total_images:,} images")
        write_run_page(run, config)
        catch_up(config.job, config, run)
        return run
    with Lease(run, config.takeover) as lease:
        if config.branch:
            config = branch_off(config)
        check_and_write_config(config)
        if not checkpoints.positions(run):
            check_initial_weights(config)
        _run(config, run, lease)
    print(f"{run} is trained: {config.total_images:,} images, weights in {storage.join(run, 'weights')}")
    for line in classifier_lines(run, config):
        print(line)
    print_closing([storage.join(run, REPORT)], [command_for_next_job(config)])
    return run


def _run(config: Config, run: str, lease: Lease) -> None:
    """Run the workers until the end of the training. Raises what `train` does."""
    with (
        session(
            config.num_workers * (config.num_threads + DATA_CPUS),
            num_gpus=config.num_workers * config.num_gpus,
            shared=config.shared,
        ),
        tracked(config.job, config, run, parent_of(run)) as tracker,
        progress_line(
            config.total_images, "images", f"starting {counted(config.num_workers or 1, 'worker')}"
        ) as progress,
    ):
        stopped = run_workers(
            partial(train_loop, config),
            config.num_workers,
            partial(_on_record, run, tracker, progress),
            num_cpus=config.num_threads + DATA_CPUS,
            max_failures=config.max_failures,
            num_gpus=config.num_gpus,
            stop=lease.is_lost,
        )
        tracker.flush()
        tracker.record(REPORT, write_run_page(run, config))
        if stopped and not storage.exists(final_weights(run, config)):
            if lease.is_lost():
                raise RuntimeError(f"another driver took over {run}, so this one stopped; its checkpoints are kept")
            raise KeyboardInterrupt


def _on_record(run: str, tracker: Tracker, progress: Progress, record: dict[str, Any]) -> None:
    """Handle a record that a worker reported: show its progress, write its files, and log its metrics to MLflow."""
    if "picture" in record:
        storage.write_bytes(storage.join(run, record["picture"]), record["png"])
        tracker.picture(record["picture"], record["png"])
    if "started" in record:
        progress.start(record["started"])
        tracker.metrics({STARTED: 1.0}, step=record["started"])
    if "metrics" in record:
        shown = {name: value for name, value in record["metrics"].items() if name in ("loss", "accuracy")}
        progress.update_to(record["images"], **shown)
        tracker.metrics(record["metrics"], step=record["images"])
    if "platform" in record:
        tracker.record("platform.json", record)
    if "stacks" in record:
        uri = storage.join(run, f"stacks/images-{progress.done:012d}-rank-{record['rank']}.txt")
        storage.write_bytes(uri, record["stacks"].encode())
        log.warning("worker %d is stalled; its stacks are in %s, the job still waits for it", record["rank"], uri)


def plan(config: Config) -> tuple[Config, str]:
    """Return the resolved config and the text of a dry run: what the training would read, write and cost.

    Raises:
        ValueError: what `train` would refuse before it starts.
    """
    dataset = config.path(config.dataset)
    absent: list[str] = []
    lines = [f"reads   {dataset}"]
    if storage.exists(storage.join(dataset, "manifest.json")):
        manifest = load_manifest(dataset)
        config = _check_and_resolve(config, manifest)
        order = _order(config, manifest)
        epochs = config.total_images / order.images_per_epoch
        open_bytes = _open_bytes(config, manifest)
        workers = counted(max(config.num_workers, 1), "worker")
        lines += [
            f"        {manifest.num_samples('train'):,} images; {epochs:.1f} epochs of {order.images_per_epoch:,}",
            f"        {open_bytes / 2**20:.1f} MiB of decoded images in memory, in each of {workers}",
        ]
    else:
        absent.append(dataset)
    if config.init_from:
        lines.append(f"starts  from {config.path(config.init_from)}")
        try:
            check_initial_weights(config)
        except FileNotFoundError:
            absent.append(config.path(config.init_from))
    if config.branch:
        lines.append(f"resumes a checkpoint of {config.path(config.output)}")
    elif extension := check_folder(config):
        lines.append(f"extends {extension}")
    return config, "\n".join([*lines, *_cost_lines(config), *not_there_yet(absent)])


def _cost_lines(config: Config) -> list[str]:
    """Return the lines of a dry run about what is written and what it costs."""
    workers = max(config.num_workers, 1)
    gpu_memory = GPUS[config.cost.gpu].memory if config.num_gpus else None
    recompute = recomputes(config, workers, gpu_memory)
    network = config.model.model_copy(update={"gradient_checkpointing": recompute})
    cost = training_cost(network, config.length, memory_of(config, network, workers))
    checkpoint = training_state_bytes(config.model, len(config.ema_rates) + len(config.power_emas))
    steps = f"{config.length // config.batch_size:,} steps of {config.batch_size}"
    return [
        f"writes  {config.path(config.branch or config.output)}: weights, and a checkpoint of "
        f"{checkpoint / 2**30:.2f} GiB every {config.checkpoint_every:,} images",
        f"network {count_parameters(config.model):,} parameters, {config.model.num_classes or 'no'} classes",
        f"length  {config.total_images:,} images = {steps}",
        *(["memory  activations are recomputed in the backward pass"] if recompute else []),
        priced(cost, config.cost, config.num_workers, config.num_gpus, config.dtype != "float32"),
    ]


def _check_and_resolve(config: Config, manifest: Manifest) -> Config:
    """Make all checks that need no worker, and return the config with the final number of classes and null class.

    Raises:
        ValueError: config, dataset and this machine do not fit each other.
    """
    dataset_classes = len(manifest.classes)
    num_classes = config.model.num_classes
    if config.classes == "dataset":
        num_classes = dataset_classes or None
    manifest.check("train", config.model.image_size, config.crop, conditional=bool(num_classes))
    if num_classes not in (None, dataset_classes):
        raise ValueError(
            f"model.num_classes={num_classes}, but {config.dataset} has {dataset_classes} classes; "
            f"pass --model.num-classes {dataset_classes}, or --classes dataset"
        )
    if num_classes is None and config.model.kind == "classifier":
        raise ValueError(
            f"--dataset {config.dataset} has no classes, but a classifier needs them; prepare it with --labels"
        )
    if config.label_dropout and num_classes is None:
        raise ValueError(
            f"--label-dropout {config.label_dropout} needs a class-conditional model; set --model.num-classes"
        )
    if not config.num_workers and not config.dry_run:
        choose_device(config.num_gpus)  # raises if there is no GPU
    _open_bytes(config, manifest)  # raises if it is too much, or if the order is impossible
    validation_count(config, manifest)  # raises if there is no validation split, but eval_every is set
    changes: dict[str, Any] = {"num_classes": num_classes}
    if config.label_dropout:
        changes["null_class"] = True
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _open_bytes(config: Config, manifest: Manifest) -> int:
    """Return the bytes of decoded images that a worker shuffles at a time; raise ValueError if they are too many."""
    return _order(config, manifest).open_bytes(max(config.num_workers, 1), config.model.image_size**2 * 3)


def _order(config: TrainingConfig, manifest: Manifest) -> OrderPlan:
    return OrderPlan(manifest.row_group_sizes("train"), config.batch_size, config.order, config.seed)


# ------------------------------------------------------------------------------------------------ in every worker


def train_loop(config: Config, context: WorkerContext) -> None:
    """Train from the newest checkpoint until the end, or until the driver asks the workers to stop."""
    with arithmetic(config.num_threads, config.reduction == "exact", config.tf32):
        try:
            _train(config, context)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows, exact = config.microbatch_rows(context.world_size), config.reduction == "exact"
            smaller = "a larger --order.num-streams, " if exact else f"--microbatch-size {rows // 2}, "
            raise torch.OutOfMemoryError(
                f"out of memory with microbatches of {counted(rows, 'image')}: pass {smaller if rows > 1 else ''}"
                "--recompute true or --dtype bfloat16"
            ) from error


def _train(config: Config, context: WorkerContext) -> None:
    """Prepare the state, then run the training steps of this worker."""
    run = config.path(config.output)
    manifest = load_manifest(config.path(config.dataset))
    group = Group(context.rank, context.world_size)
    report_platform(config, context, group)

    def after_saving(checkpoint: Checkpoint) -> None:
        context.report({"saved": checkpoint.position})
        if is_snapshot_due(config, checkpoint.position):
            write_snapshots(run, config, manifest.classes, checkpoint)

    state, losses = _load_or_initialise(config, context, group, manifest, after_saving)
    profiled_steps = config.profile_steps if context.rank == 0 else None
    with (
        CheckpointWriter(run, config, after_saving) as writer,
        step_profiler(storage.join(run, "profile"), profiled_steps) as end_of_step,
        Watchdog(context.rank, context.report) as watchdog,
    ):
        compute_gradients = make_reduction(config, context, group, state, losses)
        validation = Validation(config, manifest, group) if config.eval_every else None
        meter = Meter(config, context, group)
        audit = AuditLog(config.path(config.audit_dir), context.rank, context.world_size) if config.audit_dir else None
        stream = ahead(_read_microbatches(config, context, manifest, state.position))
        if context.rank == 0:
            context.report({"started": state.position})

        while state.position < config.length:
            # One step: load this worker's images, compute gradients, update the weights.
            watchdog.step()
            with meter.waiting():
                undecodable, microbatches = next(stream)
            microbatches = [batch.to(context.device) for batch in microbatches]
            terms = compute_gradients(microbatches)
            if audit:
                audit.write(state.position, microbatches, terms)
            stopping, preempted = group.any(context.stopping(), context.preempted())
            norm = take_step(config, state)
            _update_timestep_sampler(state, group, terms)
            meter.add(terms, norm, undecodable)

            # Report and save at the intervals of the config. All workers stop after the same step.
            for record in _records(config, state, manifest, group, meter, validation):
                context.report(record)
            if context.rank == 0:
                last = stopping or state.position >= config.length
                needed = preempted or is_snapshot_due(config, state.position)
                if last or needed or config.is_due(config.checkpoint_every, state.position):
                    writer.save(state, needed=needed, last=last)
                writer.poll()
            end_of_step()
            if stopping:
                break


def _load_or_initialise(
    config: Config,
    context: WorkerContext,
    group: Group,
    manifest: Manifest,
    after_saving: Callable[[Checkpoint], None],
) -> tuple[TrainingState, Losses]:
    """Return the state of the newest usable checkpoint, or the initial state if there is none, and the losses.

    Raises:
        UnusableCheckpoints: no checkpoint can be used, and restart_from_scratch is not set.
    """
    make_state = partial(TrainingState, config, context.device, validation_count(config, manifest))
    state = make_state()
    resumed: bool | None = None  # None = there are checkpoints, but none can be used
    try:
        resumed = state.restore(config.path(config.output), group)
    except UnusableCheckpoints:
        if not config.restart_from_scratch:
            raise
        log.warning("--restart-from-scratch: no checkpoint can be used; the training starts at image 0")
    if resumed is None:
        del state  # a damaged checkpoint may have changed it, and there may be no memory for two states
        state = make_state()
    losses = make_losses(config, state.timesteps)
    prepare_network(config, context, group, state, losses)
    if not resumed:
        load_initial_weights(config, state, group)
        return state, losses
    state.check_finite()
    if context.rank == 0:  # an attempt that was killed may not have written the snapshot of its last checkpoint
        after_saving(Checkpoint(state.position, state.tensors(), state.facts()))
    return state, losses


def report_platform(config: Config, context: WorkerContext, group: Group) -> None:
    """Report the device and software of the workers.

    Raises:
        ValueError: they differ between workers, and the config has reduction=exact.
    """
    platforms = group.gather(platform(context.device))
    others = [other for other in platforms if other != platforms[0]]
    if others and config.reduction == "exact":
        differing = {name: (platforms[0].get(name), others[0].get(name)) for name in platforms[0] | others[0]}
        description = ", ".join(f"{name}: {a} and {b}" for name, (a, b) in differing.items() if a != b)
        raise ValueError(
            f"reduction=exact needs equal devices and software on all workers, but they differ ({description}); choose "
            "nodes of one kind by ADMIRAL_ACCELERATOR, or pass --reduction fast"
        )
    if context.rank == 0:
        context.report({"platform": platforms[0], "others": others})


def _records(
    config: Config,
    state: TrainingState,
    manifest: Manifest,
    group: Group,
    meter: Meter,
    validation: Validation | None,
) -> Iterator[dict[str, Any]]:
    """Yield the metrics and pictures that are due after this step, on rank 0; all workers must iterate over them."""
    if config.is_due(config.log_every, state.position):
        yield from meter.report(state)
    every = config.eval_every
    if validation and every and (config.is_due(every, state.position) or state.position >= config.length):
        yield from validation.evaluate(state)
    if isinstance(config, AdmConfig) and config.is_due(config.preview_every, state.position):
        yield from previews(config, state, manifest, group)


def _read_microbatches(
    config: Config, context: WorkerContext, manifest: Manifest, position: int
) -> Iterator[tuple[int, list[Microbatch]]]:
    """Yield for each step from `position` on this worker's number of undecodable images and its microbatches."""
    stream = batches(
        manifest,
        _order(config, manifest),
        rank=context.rank,
        world_size=context.world_size,
        position=position,
        image_size=config.model.image_size,
        crop=config.crop,
        flip=config.random_flip,
        end=config.length,
        use_ray=context.streams_on_cluster,
    )
    rows, pin_memory = config.microbatch_rows(context.world_size), context.device.type == "cuda"
    for shares in stream:
        undecodable = sum(int(share.undecodable.sum()) for share in shares)
        yield undecodable, make_microbatches(shares, config, rows, pin_memory, config.label_dropout)


def _update_timestep_sampler(state: TrainingState, group: Group, all_terms: list[Terms]) -> None:
    """Give a loss-aware timestep sampler the losses of all workers in the order of the streams, if they are finite."""
    if not isinstance(state.timesteps, LossSecondMomentTimesteps):
        return
    state.settle()
    if not state.bad_steps:
        t, losses = (torch.cat([terms[name] for terms in all_terms]).cpu().numpy() for name in ("t", "unweighted_loss"))
        for worker_t, worker_losses in group.gather((t, losses)):
            state.timesteps.update(worker_t, worker_losses)
