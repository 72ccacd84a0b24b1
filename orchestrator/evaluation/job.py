"""The evaluation job: features from a pool of workers, then the metrics with their intervals, a report and a page."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from cluster.session import session
from models.features import DigitsNetwork
from orchestrator import storage
from orchestrator.closing import print_closing
from orchestrator.config import check_or_write_config
from orchestrator.cost import extraction_cost, not_there_yet, priced
from orchestrator.data.dataset import load_manifest
from orchestrator.evaluation.compatibility import Side, check_compatible
from orchestrator.evaluation.config import EvaluationConfig
from orchestrator.evaluation.extraction import EXTRACTOR_BATCH, FeatureFiles, extract_all, subset
from orchestrator.evaluation.extractors import CPU, LoadedExtractor, LoadExtractor, extractor_loader
from orchestrator.evaluation.inputs import ImageSet, check_ending, image_size_of, open_images, split_images
from orchestrator.evaluation.measurement import Limits, Measurement, measure_files
from orchestrator.evaluation.memorization import nearest_training_pixels
from orchestrator.evaluation.metrics import Estimates, bias_note, describe
from orchestrator.evaluation.page import evaluation_page
from orchestrator.evaluation.references import (
    Reference,
    ReferenceInput,
    extract_reference,
    find_reference,
    load_reference_manifest,
)
from orchestrator.generation.presets import generation_presets
from orchestrator.redaction import command, redact_tree
from orchestrator.tracking import catch_up, tracked

ASSUMED_SIZE = 64  # image size in a plan, if the samples do not exist yet
CLOSEST_PAIRS = 10  # samples nearest to training images, in the report and on the page


def evaluate(config: EvaluationConfig) -> str:
    """Evaluate the samples, and return the URI of report.json; report.html is in the same folder.

    Raises:
        ValueError: samples, reference, extractor and output folder do not fit together.
        FileNotFoundError: samples, reference or the extractor's weights do not exist or are not finished.
    """
    output = config.path(config.output)
    images = _open_samples(config)
    reference_input = _open_reference(config, images)
    loader = _make_loader(config, images, reference_input)
    warnings, class_mismatch = _check_set(config, "samples", images, reference_input)
    if reference_input.images is not None:
        warnings += [f"--reference {config.reference}: {warning}" for warning in reference_input.images.warnings]
    floor, floor_warnings, floor_mismatch = _open_floor(config, images, reference_input)
    warnings += floor_warnings
    loaded = loader(CPU)
    with _option_in_errors(config, "reference"):
        reference_input.statistics(loaded)  # checks the reference before the features of the samples are extracted
    _print_warnings(warnings)
    report_uri = storage.join(output, "report.json")
    finished = storage.exists(report_uri)
    identities: dict[str, Any] = {
        "samples": images.identity,
        "extractor": loaded.fingerprint,
        "extractor_weights": None,  # the fingerprint identifies them
    }
    check_or_write_config(output, config, finished, **identities)
    if finished:
        print(f"{output} is complete: {images.count:,} samples were evaluated")
        catch_up("evaluate", config, output)
        return report_uri
    with (
        session(config.num_workers, num_gpus=config.num_workers * config.num_gpus, shared=config.shared),
        tracked("evaluate", config, output) as tracker,
    ):
        sample_features = _features(config, images, loader, "samples")
        folder = storage.join(output, "reference-features")
        reference = extract_reference(reference_input, loader, loaded, folder, config.num_workers, config.num_gpus)
        if extractor_mismatch := loaded.class_mismatch(reference.classes):
            reference = replace(reference, missing=reference.missing | {"accuracy": extractor_mismatch})
        name, policy = loaded.network.name, images.made_by.get("config", {}).get("labels")
        workers = (config.num_workers, config.num_gpus)
        measured = measure_files(
            sample_features, _without_classes(reference, class_mismatch), name, Limits(), *workers, policy
        )
        held_out = None
        if floor is not None:
            floor_features = _features(config, floor, loader, "floor")
            against = _without_classes(reference, floor_mismatch)
            floor_estimates = measure_files(floor_features, against, name, Limits(), *workers).estimates
            held_out = {"uri": floor.uri, "n": floor.count, "metrics": _describe_all(floor_estimates)}
        if measured.same_images:
            warnings.append("samples and reference are the same images, so the distances are lower than for any model")
        report = _report(config, images, reference, loaded, measured) | {"held_out": held_out, "warnings": warnings}
        report = redact_tree(report)
        page, pictures = evaluation_page(report, images, reference, measured, sample_features.labels())
        tracker.metrics(_tracked_metrics(report))
        tracker.record("report.json", report)
        tracker.record("report.html", page)
        for name, picture in pictures.items():
            tracker.picture(f"{name}.png", picture)
    storage.write_bytes(storage.join(output, "report.html"), page.encode())
    storage.put_if_absent(report_uri, storage.json_bytes(report))
    _print_metrics(report)
    _print_warnings(warnings)
    print_closing([storage.join(output, "report.html"), report_uri], [])
    return report_uri


def plan(config: EvaluationConfig) -> tuple[EvaluationConfig, str]:
    """Return the config, and what an evaluation would read, write, cost and hold in memory.

    Inputs that do not exist yet are listed; if they come from a preset, their number of images is assumed.

    Raises:
        ValueError: `evaluate` would raise it too, before it starts.
    """
    samples, reference = config.path(config.samples), config.path(config.reference)
    absent: list[str] = []
    planned_counts = {preset.output: preset.num_samples for _, preset in generation_presets().values()}
    count, kind, size = planned_counts.get(config.samples), "samples", config.image_size or ASSUMED_SIZE
    try:
        images = _open_samples(config)
        count, kind, size = images.count, images.kind, image_size_of(images)
    except FileNotFoundError:
        absent.append(samples)
    try:
        if not storage.exists(reference):
            raise FileNotFoundError(reference)
        if not absent:
            reference_input = _open_reference(config, images)
            _check_set(config, "samples", images, reference_input)
            _open_floor(config, images, reference_input)
    except FileNotFoundError:
        absent.append(reference)
    lines = [
        f"reads   {samples} ({kind}, {f'{count:,}' if count else 'an unknown number of'} images) and {reference}",
        f"writes  {config.path(config.output)}: report.json, report.html; features beside samples and dataset",
    ]
    if count:
        try:
            lines += _cost_lines(config, count, size)
        except FileNotFoundError as error:
            lines.append(f"cost    unknown until the extractor exists: {error}")
    return config, "\n".join([*lines, *not_there_yet(absent)])


def _cost_lines(config: EvaluationConfig, count: int, size: int) -> list[str]:
    """Return the lines of a plan on the cost and memory of the features of `count` images of `size` pixels."""
    dimension, name = DigitsNetwork.dimension, DigitsNetwork.name
    cost_lines: list[str] = []
    if config.extractor != name:  # the digits network may not be trained yet, and costs next to nothing
        weights = config.path(config.extractor_weights) if config.extractor_weights else None
        network = extractor_loader(config.extractor, weights, None, config.path("extractors"), 0)(CPU).network
        dimension, name = network.dimension, network.name
        cost = extraction_cost(network, size, count, EXTRACTOR_BATCH)
        cost_lines = [priced(cost, config.cost, config.num_workers, config.num_gpus, half=False)]
    gibibytes = (count + min(count, Limits.samples) + Limits.references) * dimension * 4 / 2**30
    return [
        f"images  {count:,} by {name}, and those of the reference whose features do not exist yet",
        f"memory  at most {gibibytes:.2f} GiB of features ({dimension} float32 each) and as much for computations, in "
        "the driver and in each worker",
        *cost_lines,
    ]


@contextmanager
def _option_in_errors(config: EvaluationConfig, option: str) -> Iterator[None]:
    """Replace the path in errors by the option as the user typed it."""
    value: str = getattr(config, option)
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        typed, uri, message = f"--{option} {value}", config.path(value), str(error)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(message.replace(uri, typed, 1) if uri in message else f"{typed}: {message}") from error


def _open_samples(config: EvaluationConfig) -> ImageSet:
    uri = config.path(config.reference)
    with _option_in_errors(config, "reference"):
        check_ending(uri, "reference")
        is_dataset = not uri.endswith(".npz") and storage.exists(storage.join(uri, "manifest.json"))
        manifest = load_reference_manifest(uri) if is_dataset else None
    with _option_in_errors(config, "samples"):
        return open_images(config.path(config.samples), manifest, config.image_size)


def _open_reference(config: EvaluationConfig, images: ImageSet) -> ReferenceInput:
    uri = config.path(config.reference)
    size = 0 if uri.endswith(".npz") else _image_size(config, images)
    with _option_in_errors(config, "reference"):
        return find_reference(uri, size)


def _open_floor(
    config: EvaluationConfig, images: ImageSet, reference_input: ReferenceInput
) -> tuple[ImageSet | None, list[str], str]:
    """Return at most as many held-out real images as there are samples, and what `_check_set` returns for them.

    Return None if there are no held-out images.
    """
    dataset = config.path(config.reference) if reference_input.batch is None else None
    manifest = load_manifest(dataset) if dataset else None
    if config.floor is None:
        if dataset is None or manifest is None or "validation" not in manifest.splits:
            return None, [], ""
        return subset(split_images(dataset, "validation", reference_input.image_size), images.count), [], ""
    with _option_in_errors(config, "floor"):
        uri = config.path(config.floor)
        if not uri.endswith((".npz", ".tar")) and storage.exists(storage.join(uri, "manifest.json")):
            floor = split_images(uri, "validation", _image_size(config, images))
        else:
            floor = open_images(uri, manifest, config.image_size)
    return subset(floor, images.count), *_check_set(config, "floor", floor, reference_input)


def _features(
    config: EvaluationConfig, images: ImageSet, loader: LoadExtractor, option: Literal["samples", "floor"]
) -> FeatureFiles:
    """Extract features beside images of Admiral, which others can use too, and those of other images into the output.

    Those are samples that Admiral generated, and the validation split of the reference.
    """
    folder = storage.join(config.path(config.output), "features" if option == "samples" else "floor-features")
    folder = storage.join(folder, images.identity)
    if option == "samples" and images.kind == "samples":
        folder = storage.join(images.uri, "features")
    if option == "floor" and config.floor is None:
        folder = storage.join(config.path(config.reference), "features", f"validation-{images.identity}")
    return extract_all(images, folder, loader, config.num_workers, config.num_gpus)


def _without_classes(reference: Reference, mismatch: str) -> Reference:
    """Return the reference without its classes if there is a reason why they cannot be matched with the labels."""
    return replace(reference, missing=reference.missing | {"classes": mismatch}) if mismatch else reference


def _check_set(
    config: EvaluationConfig, option: str, images: ImageSet, reference_input: ReferenceInput
) -> tuple[list[str], str]:
    """Return warnings about a set, and why its labels cannot be matched with those of the reference ("" = they can)."""
    name, reference = f"--{option} {getattr(config, option)}", reference_input.images
    warnings = [f"{name}: {warning}" for warning in images.warnings]
    if reference is None:
        return warnings, ""
    sides = Side.of(name, images), Side.of(f"--reference {config.reference}", reference)
    more_warnings, class_mismatch = check_compatible(*sides, config.extractor)
    return warnings + more_warnings, class_mismatch


def _make_loader(config: EvaluationConfig, images: ImageSet, reference_input: ReferenceInput) -> LoadExtractor:
    reference = config.path(config.reference)
    return extractor_loader(
        config.extractor,
        config.path(config.extractor_weights) if config.extractor_weights else None,
        None if reference.endswith(".npz") else reference,
        config.path("extractors"),
        _image_size(config, images) if config.extractor == "digits" else 0,
        reference_input.batch.extractor if reference_input.batch else None,
    )


def _image_size(config: EvaluationConfig, images: ImageSet) -> int:
    """Return the size of the samples; ValueError if --image-size is another one."""
    size = image_size_of(images)
    if config.image_size not in (None, size):
        raise ValueError(
            f"image_size={config.image_size}, but the samples in {images.uri} have {size} pixels; leave it out"
        )
    return size


def _report(
    config: EvaluationConfig, images: ImageSet, reference: Reference, loaded: LoadedExtractor, measured: Measurement
) -> dict[str, Any]:
    """Return the content of report.json."""
    seeds = {"seed": images.seed, "indices": [0, images.count]}
    samples = {"uri": images.uri, "kind": images.kind, "identity": images.identity, "n": images.count}
    return {
        "samples": {**samples, **seeds, "made_by": images.made_by},
        "reference": {
            "uri": reference.uri,
            "n": reference.count,
            "what": "training images" if reference.training else "reference images",
        },
        "intervals": "95%, for the sampling error of the samples; the reference is fixed",
        "extractor": {
            "name": loaded.network.name,
            "fingerprint": loaded.fingerprint,
            "held_out_accuracy": loaded.held_out_accuracy,
        },
        "metrics": {
            name: metric | {"seeds": seeds, "extractor": loaded.fingerprint}
            for name, metric in _describe_all(measured.estimates).items()
        },
        "per_class": {
            reference.classes[label] if reference.classes else str(label): _describe_all(estimates)
            for label, estimates in measured.per_class.items()
        },
        "not_available": measured.missing,
        "closest_pairs": [] if measured.closest is None else measured.closest.first(CLOSEST_PAIRS),
        "nearest_training_image": _pixel_distances(config, images),
        "reproduce": {
            "command": command(),
            "config": config.model_dump(mode="json"),
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "torch")},
        },
    }


def _pixel_distances(config: EvaluationConfig, images: ImageSet) -> dict[str, list[float]]:
    """Return pixel distances to the nearest training image, of samples and of held-out real images if there are any."""
    uri = config.path(config.reference)
    if uri.endswith(".npz") or not config.num_memorization_samples:
        return {}
    size = _image_size(config, images)
    training = split_images(uri, "train", size)
    queries = {"samples": images}
    if "validation" in load_manifest(uri).splits:
        queries["held_out"] = split_images(uri, "validation", size)
    count, workers = config.num_memorization_samples, (config.num_workers, config.num_gpus)
    return {name: nearest_training_pixels(query, count, training, *workers) for name, query in queries.items()}


def _describe_all(estimates: Estimates) -> dict[str, dict[str, Any]]:
    return {name: describe(estimate) for name, estimate in estimates.items()}


def _tracked_metrics(report: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a report for MLflow: values, their bias, and the values of held-out images."""
    held_out = report["held_out"]["metrics"] if report["held_out"] else {}
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    bias = {f"{name}_bias": metric["bias"] for name, metric in report["metrics"].items() if metric["bias"] is not None}
    return values | bias | {f"held_out_{name}": metric["value"] for name, metric in held_out.items()}


def _print_metrics(report: dict[str, Any]) -> None:
    """Print one line for each metric."""
    held_out = report["held_out"]["metrics"] if report["held_out"] else {}
    for name, metric in report["metrics"].items():
        interval = "{:.4g} to {:.4g}".format(*metric["interval"]) if metric["interval"] else "none"
        counts = f"n={metric['n']}" + (f", {metric['n_reference']} references" if metric["n_reference"] else "")
        notes = []
        if name in held_out:
            notes.append(f"held-out real images: {held_out[name]['value']:.4g}")
        if metric["bias"] is not None:
            notes.append(bias_note(metric["bias"]))
        if metric["note"]:
            notes.append(metric["note"])
        print(f"{name:30} {metric['value']:10.4g}   95%: {interval:22} {'; '.join([counts, *notes])}")
    for name, reason in report["not_available"].items():
        print(f"{name:30} {'-':>10}   {reason}")


def _print_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")
