"""Test that samples depend only on (config, seed, index), and that generation resumes."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.costs import Evaluations, sampling_flops
from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from orchestrator import storage
from orchestrator.generation import job as generation
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.job import generate, make_generator, plan
from orchestrator.generation.samples import Shard, check_shard, count_samples, list_shards, pixel_hashes, read_range
from orchestrator.generation.sampling import (
    SamplingWorker,
    canonical_batch,
    counted_batch,
    load_networks,
    make_batch,
    verified_batch,
)
from orchestrator.metrics_log import history
from orchestrator.progress import Progress
from orchestrator.weights.network import save_weights
from tests.orchestrator.networks import CLASSIFIER, UNET, save_network


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with the weights of a diffusion model and a classifier."""
    folder = str(tmp_path_factory.mktemp("store"))
    save_network(folder, "unet.safetensors", UNET)
    save_network(folder, "classifier.safetensors", CLASSIFIER)
    return folder


def config(store: str, output: str, **changes: object) -> GenerationConfig:
    settings: dict = {
        "store": store, "weights": "unet.safetensors", "classifier": "classifier.safetensors", "output": output,
        "num_samples": 21, "sampler": SamplerConfig(name="ddpm", num_steps=4), "guidance": GuidanceConfig(scale=2.0),
        "batch_size": 4, "shard_size": 8, "num_workers": 0, "tracking": False,
    }  # fmt: skip
    return GenerationConfig(**settings | changes)


def test_samples_are_complete_balanced_and_listed_with_their_digests(store: str) -> None:
    folder = generate(config(store, "whole"))
    images, labels = read_range(folder, 0, 21)
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [index % 10 for index in range(21)]
    assert len(set(pixel_hashes(images))) == 21, "two samples are equal"
    manifest = storage.read_json(storage.join(folder, "manifest.json"))
    assert [entry["rows"] for entry in manifest["shards"]] == [8, 8, 5]
    for entry, shard in zip(manifest["shards"], list_shards(folder), strict=True):
        assert entry["sha256"] == check_shard(folder, shard) and entry["name"] == shard.name


def test_an_index_depends_on_seed_and_index_only(store: str) -> None:
    images = read_range(generate(config(store, "whole")), 0, 21)[0]
    fewer = read_range(generate(config(store, "fewer", num_samples=6)), 0, 6)[0]
    assert np.array_equal(images[:6], fewer), "the number of samples changed one of them"
    shards = read_range(generate(config(store, "shards", shard_size=4)), 0, 21)[0]
    assert np.array_equal(images, shards), "the size of shards changed a sample"
    other = read_range(generate(config(store, "other", seed=1)), 0, 21)[0]
    assert not np.array_equal(images, other)


def test_only_missing_shards_are_regenerated(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    job_config = config(store, "resumed")
    folder = generate(job_config)
    before = pixel_hashes(read_range(folder, 0, 21)[0])
    storage.delete(storage.join(folder, "shards", "000008-000016.parquet"))
    storage.delete(storage.join(folder, "manifest.json"))
    assert "1 of 3 shards are missing" in plan(job_config)[1]
    generate(job_config)
    assert pixel_hashes(read_range(folder, 0, 21)[0]) == before
    generate(job_config)
    assert "complete: 21 samples" in capsys.readouterr().out


def test_the_progress_line_moves_within_a_shard(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Shard, int]] = []
    monkeypatch.setattr(Progress, "update_item", lambda self, shard, done: shown.append((shard, done)))
    generate(config(store, "progress"))
    assert shown == [
        (Shard(0, 8), 4), (Shard(0, 8), 8), (Shard(8, 16), 4), (Shard(8, 16), 8), (Shard(16, 21), 4), (Shard(16, 21), 5)
    ]  # fmt: skip


def test_mfu_counts_every_evaluation_of_every_network(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not history(generate(config(store, "whole")), "mfu"), "the peak of this CPU is unknown"
    monkeypatch.setattr(generation, "peak_flops", lambda device, dtype: 1e9)
    folder = generate(config(store, "mfu", num_samples=4))
    (_, rate), (_, mfu) = history(folder, "samples_per_second")[-1], history(folder, "mfu")[-1]
    assert mfu / rate * 1e9 == pytest.approx(sampling_flops(Evaluations(4, 4), UNET, CLASSIFIER))
    assert history(folder, "samples")[-1][1] == 4


def test_the_same_folder_with_other_settings_is_refused(store: str) -> None:
    generate(config(store, "claimed", num_samples=4))
    generate(config(store, "claimed", num_samples=4, upsampling=SamplerConfig(num_steps=7)))  # there is no upsampler
    with pytest.raises(ValueError, match=r"guidance\.scale: 2\.0 before, 3\.0 now"):
        generate(config(store, "claimed", num_samples=4, guidance=GuidanceConfig(scale=3.0)))


def test_a_start_that_fails_before_its_first_shard_binds_nothing(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "make_batch", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(config(store, "failed", num_samples=4))
    folder = generate(config(store, "failed", num_samples=4, batch_size=2))
    assert storage.read_json(storage.join(folder, "run.json"))["config"]["batch_size"] == 2


def test_more_samples_draw_only_what_is_missing(store: str) -> None:
    """The last shard of the finished folder stays, and the samples equal those of a single start."""
    folder = generate(config(store, "grown", num_samples=6))
    first = Path(folder, "shards", "000000-000006.parquet")
    written = first.stat().st_mtime_ns
    assert generate(config(store, "grown", export="npz")) == folder
    names = storage.list_names(storage.join(folder, "shards"))
    assert names == [f"{a:06d}-{b:06d}.parquet" for a, b in ((0, 6), (6, 8), (8, 16), (16, 21))]
    assert first.stat().st_mtime_ns == written and count_samples(folder) == 21
    expected = read_range(generate(config(store, "whole")), 0, 21)[0]
    assert np.array_equal(read_range(folder, 0, 21)[0], expected)
    with pytest.raises(ValueError, match=r"--num-samples 6: .*pass --num-samples 21 or more"):
        generate(config(store, "grown", num_samples=6))


def test_indices_read_all_other_settings_from_the_folder(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate(config(store, "whole"))
    job = config(store, "whole", indices=(3,), seed=9, num_samples=1, classifier=None, guidance=GuidanceConfig())
    generate(job.starting_from(job.model_copy(update={"indices": ()})).model_copy(update={"indices": (3,)}))
    assert capsys.readouterr().out.count("equal") == 1


def test_a_plan_needs_no_weights(store: str) -> None:
    absent = config(store, "planned", weights="a/run", classifier=None, guidance=GuidanceConfig(), num_gpus=1)
    unknown = plan(absent)[1]
    assert "cost    unknown until the weights exist" in unknown and f"not there yet: {store}/a/run" in unknown
    assert "FLOPs" in plan(absent, {"a/run": (UNET, DiffusionConfig())})[1]
    resolved, text = plan(config(store, "planned"))
    assert "not there yet" not in text and resolved.weights == "unet.safetensors"
    with pytest.raises(ValueError, match="is not for images of 8 pixels"):
        plan(config(store, "planned", upsampler="unet.safetensors"))


def test_guidance_without_a_classifier_is_refused(store: str) -> None:
    with pytest.raises(ValueError, match="needs a classifier"):
        config(store, "unguided", classifier=None)


def test_a_cascade_keeps_both_stages(store: str) -> None:
    save_network(store, "upsampler.safetensors", UNET.model_copy(update={"image_size": 16, "low_res_size": 8}), seed=2)
    cascade = {"upsampler": "upsampler.safetensors", "upsampling": SamplerConfig(name="ddpm", num_steps=3)}
    folder = generate(config(store, "cascade", num_samples=10, **cascade))
    base, labels = read_range(folder, 0, 10)
    large, large_labels = read_range(storage.join(folder, "upsampled"), 0, 10)
    assert large.shape == (10, 16, 16, 3) and np.array_equal(labels, large_labels)
    assert np.array_equal(base, read_range(generate(config(store, "whole")), 0, 10)[0]), "the base samples changed"
    assert storage.read_json(storage.join(folder, "upsampled", "manifest.json"))["num_samples"] == 10

    with pytest.raises(ValueError, match="is not for images of 8 pixels"):
        generate(config(store, "wrong", upsampler="unet.safetensors"))


def test_half_precision_gives_nearly_the_same_images(store: str) -> None:
    exact = read_range(generate(config(store, "whole")), 0, 8)[0]
    half = read_range(generate(config(store, "bfloat16", num_samples=8, dtype="bfloat16")), 0, 8)[0]
    difference = np.abs(exact.astype(int) - half)
    assert 0 < difference.mean() < 4, f"mean difference {difference.mean()} grey levels"


@pytest.mark.slow
def test_compiled_networks_draw_the_same_images(store: str) -> None:
    exact = read_range(generate(config(store, "whole")), 0, 4)[0]
    compiled = read_range(generate(config(store, "compiled", num_samples=4, compile=True)), 0, 4)[0]
    assert np.abs(exact.astype(int) - compiled).max() <= 1, "rounding errors change a grey level by at most one"


# ------------------------------------------------------------------------------------------------ resuming


def finished_copy(store: str, output: str) -> Path:
    """Return a copy of a finished folder without its manifest, so that the next job verifies every shard."""
    folder = Path(store, output)
    shutil.copytree(generate(config(store, "whole")), folder)
    (folder / "manifest.json").unlink()
    return folder


def change_a_picture(data: bytes) -> bytes:
    begin = data.index(b"IDAT") + 12
    return data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, other: data[: len(data) // 2],
        lambda data, other: change_a_picture(data),
        lambda data, other: b"",
        lambda data, other: other,  # a valid shard with the name of another one
    ],
    ids=["truncated", "changed", "empty", "misnamed"],
)
def test_a_damaged_shard_is_regenerated_and_its_bytes_are_kept(
    store: str, damage: Callable[[bytes, bytes], bytes], caplog: pytest.LogCaptureFixture, request: Any
) -> None:
    folder = finished_copy(store, request.node.callspec.id)
    shard, other = folder / "shards" / "000008-000016.parquet", folder / "shards" / "000000-000008.parquet"
    intact, written = shard.read_bytes(), other.stat().st_mtime_ns
    damaged = damage(intact, other.read_bytes())
    shard.write_bytes(damaged)
    generate(config(store, folder.name))
    assert shard.read_bytes() == intact
    assert (folder / "quarantine" / shard.name).read_bytes() == damaged
    assert other.stat().st_mtime_ns == written, "an intact shard was rewritten"
    assert "regenerated" in caplog.text and shard.name in caplog.text


def test_two_jobs_on_one_folder_give_the_same_samples(store: str) -> None:
    jobs = [threading.Thread(target=generate, args=(config(store, "shared"),)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    expected = pixel_hashes(read_range(generate(config(store, "whole")), 0, 21)[0])
    assert pixel_hashes(read_range(storage.join(store, "shared"), 0, 21)[0]) == expected
    assert len(list_shards(storage.join(store, "shared"))) == 3


def test_a_shard_of_another_worker_with_other_pixels_is_an_error(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = generate(config(store, "other", seed=1))
    make_shard = make_generator(config(store, "raced"))

    def verify(folder: str, shard: Shard) -> tuple[None, str]:  # as if another worker writes the shard after this check
        shutil.copytree(Path(other, "shards"), Path(folder, "shards"))
        return None, ""

    monkeypatch.setattr(generation, "_verify", verify)
    with pytest.raises(RuntimeError, match="was written by another worker with other pixels"):
        make_shard(Shard(0, 8))


# ------------------------------------------------------------------------------------------------ platform and batch


def test_another_platform_is_refused_unless_it_is_allowed(store: str) -> None:
    folder = finished_copy(store, "elsewhere")
    run = json.loads((folder / "run.json").read_text())
    assert run["platform"]["torch"] == torch.__version__ and run["platform"]["threads"] == 1
    assert run["config"]["rounding"] == "truncate" and run["config"]["batch_size"] == 4
    run["platform"]["device"] = "NVIDIA H100"
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"another platform \(device: NVIDIA H100 before"):
        generate(config(store, "elsewhere"))
    generate(config(store, "elsewhere", mixed_platforms=True))


def test_a_probed_batch_size_is_recorded_and_reused(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = generate(config(store, "probed", batch_size=0))
    assert storage.read_json(storage.join(folder, "run.json"))["config"]["batch_size"] == 8  # the shard's size
    monkeypatch.setattr(generation, "canonical_batch", lambda *_: pytest.fail("probed again"))
    storage.delete(storage.join(folder, "manifest.json"))
    generate(config(store, "probed", batch_size=0))
    with pytest.raises(ValueError, match="batch_size: 8 before, 4 now"):
        generate(config(store, "probed", batch_size=4))


def test_on_a_cpu_the_batch_size_depends_on_the_image_size(store: str) -> None:
    networks = load_networks(config(store, "any"), "cpu")
    job_config = config(store, "any", batch_size=0, shard_size=512)
    assert canonical_batch(job_config, networks, torch.device("cpu")) == 64
    large = replace(networks.weights, architecture=UNET.model_copy(update={"image_size": 256}))
    assert canonical_batch(job_config, networks._replace(weights=large), torch.device("cpu")) == 4


@pytest.mark.parametrize(("gigabytes", "expected"), [(80, 256), (16, 64), (4, 8), (0.001, 1)])
def test_on_a_gpu_the_batch_size_depends_on_the_counted_memory(store: str, gigabytes: float, expected: int) -> None:
    """The batch size of ADM-64 with its classifier in half precision is equal on all GPUs of a kind."""
    loaded = load_networks(config(store, "any"), "cpu")
    networks = loaded._replace(
        weights=replace(loaded.weights, architecture=zoo.entry("adm-64").network),
        classifier=replace(loaded.weights, architecture=zoo.entry("classifier-64").network),
    )
    job_config = config(store, "any", batch_size=0, shard_size=512, dtype="float16")
    assert counted_batch(job_config, networks, gigabytes * 1e9, most=512) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_counted_batch_that_does_not_fit_is_halved(error: RuntimeError) -> None:
    tried = []

    def draw(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise error

    limit = 32
    assert verified_batch(128, draw) == 32 and tried == [128, 64, 32]
    limit = 0
    with pytest.raises(RuntimeError, match="not even one"):
        verified_batch(2, draw)


def test_other_errors_of_the_first_batch_are_not_taken_for_memory() -> None:
    def draw(size: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="assert triggered"):
        verified_batch(4, draw)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "heun"])
def test_a_worker_samples_by_other_settings_than_its_own(store: str, name: str) -> None:
    """Trials of a search share the networks, and change sampler, guidance and seed."""
    own = config(store, "any")
    setting = {"sampler": SamplerConfig(name=name, num_steps=3), "guidance": GuidanceConfig(), "seed": 9}
    other, worker = own.model_copy(update=setting), SamplingWorker(own)
    batches = (make_batch(networks, other, 0) for networks in (worker.networks, load_networks(other, "cpu")))
    (batch,), (expected,) = batches
    np.testing.assert_array_equal(batch.images, expected.images)
    assert not np.array_equal(batch.images, make_batch(worker.networks, own, 0)[0].images)


# ------------------------------------------------------------------------------------------------ kinds of guidance


def guided_images(store: str, output: str, **guidance: Any) -> np.ndarray:
    changes = {"guidance": GuidanceConfig(**guidance), "weights": "free.safetensors", "num_samples": 8}
    return read_range(generate(config(store, output, **changes)), 0, 8)[0]


def test_every_kind_draws_other_samples_and_scale_0_the_unguided_ones(store: str) -> None:
    free = UNET.model_copy(update={"null_class": True})
    save_network(store, "free.safetensors", free)
    weak = save_network(store, "weak.safetensors", free.model_copy(update={"num_res_blocks": 2}), seed=7)
    plain = guided_images(store, "guided-none", kind="none")
    for kind in ("classifier", "classifier_free", "auto"):
        weak_weights = {"weak_weights": weak} if kind == "auto" else {}
        assert np.array_equal(guided_images(store, f"guided-{kind}-0", kind=kind, **weak_weights), plain)
        assert not np.array_equal(guided_images(store, f"guided-{kind}", kind=kind, scale=2.0, **weak_weights), plain)


def test_the_weaker_model_is_compared_by_its_hash(store: str) -> None:
    save_network(store, "weaker.safetensors", UNET, seed=7)
    changes = {"guidance": GuidanceConfig(kind="auto", scale=1.0, weak_weights="weaker.safetensors")}
    folder = generate(config(store, "auto", **changes))
    run = storage.read_json(storage.join(folder, "run.json"))
    assert run["record"]["weak_weights"].endswith("weaker.safetensors")
    assert "weak_weights" not in run["config"]["guidance"]
    storage.delete(storage.join(store, "weaker.safetensors"))
    save_network(store, "weaker.safetensors", UNET, seed=8)
    storage.delete(storage.join(folder, "manifest.json"))
    with pytest.raises(ValueError, match="weak_weights"):
        generate(config(store, "auto", **changes))


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"kind": "classifier_free", "scale": 1.0}, "--label-dropout"),
        ({"kind": "auto", "scale": 1.0, "weak_weights": "small.safetensors"}, "differ in image_size"),
    ],
)
def test_networks_that_cannot_guide_are_refused(store: str, guidance: dict[str, Any], message: str) -> None:
    save_network(store, "small.safetensors", UNET.model_copy(update={"image_size": 4}))
    with pytest.raises(ValueError, match=message):
        generate(config(store, "refused", guidance=GuidanceConfig(**guidance)))


# ------------------------------------------------------------------------------------------------ indices, options


def test_indices_are_regenerated_and_compared(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_copy(store, "regenerated")
    generate(config(store, "regenerated", indices=(20, 3)))
    assert capsys.readouterr().out.count("equal") == 2
    assert not (folder / "manifest.json").exists() and (folder / "regenerated" / "000003.png").exists()
    other = generate(config(store, "other", seed=1))
    shutil.copy(Path(other, "shards", "000000-000008.parquet"), folder / "shards")
    with pytest.raises(RuntimeError, match="1 regenerated samples differ"):
        generate(config(store, "regenerated", indices=(20, 3)))


def test_rounding_changes_pixels_by_at_most_one_level_and_clipping_changes_them(store: str) -> None:
    truncated = read_range(generate(config(store, "whole")), 0, 8)[0].astype(int)
    nearest = read_range(generate(config(store, "nearest", num_samples=8, rounding="nearest")), 0, 8)[0]
    assert set(np.unique(nearest - truncated)) == {0, 1}
    unclipped = read_range(generate(config(store, "unclipped", num_samples=8, clip=False)), 0, 8)[0]
    assert not np.array_equal(unclipped, truncated)


def test_averages_of_a_run_are_selected_by_name(store: str) -> None:
    for seed, ema in enumerate(("ema-0.99", "ema-0.9999")):
        save_network(store, f"run/weights/images-000000000512-{ema}.safetensors", UNET, seed)
    last, first, second = (
        load_networks(config(store, "any", weights="run", ema=ema), "cpu").weights.sha256
        for ema in (None, "ema-0.99", "ema-0.9999")
    )
    assert last == second != first


def test_a_newer_snapshot_between_two_attempts_changes_nothing(store: str) -> None:
    def write_snapshots(images: int, seed: int) -> str:
        save_network(store, f"guide/weights/images-{images:012d}-raw.safetensors", CLASSIFIER, seed)
        name = f"going/weights/images-{images:012d}-ema-0.9.safetensors"
        save_network(store, name, UNET, seed)
        return name

    first = write_snapshots(512, seed=1)
    job_config = config(store, "attempts", weights="going", classifier="guide")
    folder = generate(job_config)
    before = pixel_hashes(read_range(folder, 0, 21)[0])
    second = write_snapshots(1024, seed=7)
    storage.delete(storage.join(folder, "manifest.json"))
    storage.delete(storage.join(folder, "shards", "000008-000016.parquet"))
    assert pixel_hashes(read_range(generate(job_config), 0, 21)[0]) == before
    assert storage.read_json(storage.join(folder, "run.json"))["record"]["weights"] == first
    for changes in ({"weights": second}, {"ema": "ema-0.9"}):
        with pytest.raises(ValueError, match=r"weights: .* before, .* now"):
            generate(job_config.model_copy(update=changes))


def save_with_classes(store: str, name: str, classes: tuple[str, ...], **changes: object) -> str:
    """Write a network with random weights, these changes of its architecture and these names of classes."""
    architecture = UNET.model_copy(update=changes)
    save_weights(f"{store}/{name}", architecture.build().state_dict(), architecture, DiffusionConfig(), classes)
    return name


DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghij")
UNGUIDED = {"classifier": None, "guidance": GuidanceConfig()}


def test_samples_of_a_model_without_classes_have_no_labels(store: str) -> None:
    """The weights of such a model name the classes of its dataset too."""
    weights = save_with_classes(store, "unconditional.safetensors", DIGITS, num_classes=None)
    folder = generate(config(store, "no-classes", weights=weights, num_samples=4, **UNGUIDED))
    assert read_range(folder, 0, 4)[1].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "unconditional.safetensors", "upsampler": "letters-up.safetensors"}, "different classes"),
        ({"weights": "unconditional.safetensors", "upsampler": "digits-up.safetensors", **UNGUIDED}, "no classes"),
        ({"upsampler": "grey-up.safetensors"}, "with 3 channels"),
        ({"classifier": "grey-classifier.safetensors"}, "with 3 channels"),
        (
            {"guidance": GuidanceConfig(kind="auto", scale=1.0, weak_weights="letters.safetensors")},
            "--guidance.weak-weights letters.safetensors .*different classes",
        ),
        ({"guidance": GuidanceConfig(scale=1.0, interval=(0.4, 0.5))}, "none of the 4 steps"),
    ],
)
def test_networks_and_settings_that_do_not_fit_are_refused(
    store: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_with_classes(store, "unconditional.safetensors", DIGITS, num_classes=None)
    save_with_classes(store, "letters.safetensors", LETTERS)
    for name, classes, channels in (("letters", LETTERS, 3), ("digits", DIGITS, 3), ("grey", DIGITS, 1)):
        changes_up = {"image_size": 16, "low_res_size": 8, "in_channels": channels, "out_channels": 2 * channels}
        save_with_classes(store, f"{name}-up.safetensors", classes, **changes_up)
    save_network(store, "grey-classifier.safetensors", CLASSIFIER.model_copy(update={"in_channels": 1}))
    with pytest.raises(ValueError, match=message):
        plan(config(store, "mistaken", **changes))
